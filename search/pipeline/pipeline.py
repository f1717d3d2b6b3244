"""From a candidate to its measurements: plan, compress, deploy, measure, each given the result of the last."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch

from evaluators.accuracy import AccuracyEvaluator
from evaluators.artifact_builder import ArtifactBuilder
from evaluators.data import LabelledImages, Splits
from evaluators.deployed import DeployedCandidate, Evaluator
from evaluators.flops.evaluator import FlopsEvaluator
from evaluators.inference.frame_reuse import Reuse
from evaluators.latency.evaluator import LatencyEvaluator
from evaluators.measurement import Measurement
from evaluators.quantization.equalization import equalized
from evaluators.quantization.scheme import Scheme
from evaluators.runtimes.base import Runtime, Target
from evaluators.size import ParamsEvaluator, SizeEvaluator
from search.config.cache import cache_folder
from search.config.progress import Progress, Say
from search.config.study import FinetuneSection, Study
from search.loading.user_code import load, source_of
from search.pipeline.compressor import CompressedNetwork, Compressor
from search.pipeline.early_stopping import EarlyStopping, Stop
from search.pipeline.given_network import GivenNetwork, fingerprint_of, timed, validation_parts
from search.pipeline.references import References
from search.pipeline.search_space import halves_told, left_out, runnable, searched, space_of
from search.recovery.base import QatContext, RecoveryContext
from search.results.evaluation import Evaluation
from search.training.block_gates import skip_blocks
from search.training.dense import UNCUT, augmentation, exit_places, trained_network
from spaces.candidate import FRAMES, Candidate
from spaces.dynamic.cut_points import CutPoints
from spaces.dynamic.exit_network import ExitNetwork
from spaces.joint import JointSpace
from spaces.pruning.groups import ChannelGroup, Groups
from spaces.pruning.prunable import find_groups

_FINDING_GROUPS = "Finding the channels that can be cut"


@dataclass(frozen=True)
class CompressionPipeline:
    """What a study's candidates share, and the way of each of them through it. `build_pipeline` makes one.

    Args:
        study: the question, without what it does not search.
        given: the study's dense network as it came, with nothing added to it.
        runtime: what runs the artifacts.
        target: where they run: device, batch size, threads.
        data: the study's images.
        network: the dense network with its exits and gates, trained, in evaluation mode.
        exit_places: where exits sit, and why others do not.
        builder: writes artifacts.
        groups: the channels that hang together.
        space: what may vary.
        threshold_images: what thresholds of exits are chosen on.
        scored: the validation images that every candidate is scored on.
        flops: counts a candidate's FLOPs.
        compressor: makes a candidate's network.
        references: the dense network in each precision.
    """

    study: Study
    given: GivenNetwork
    runtime: Runtime
    target: Target
    data: Splits
    network: ExitNetwork
    exit_places: CutPoints
    builder: ArtifactBuilder
    groups: Groups
    space: JointSpace
    threshold_images: LabelledImages
    scored: LabelledImages
    flops: FlopsEvaluator
    compressor: Compressor
    references: References

    @property
    def solves_thresholds(self) -> bool:
        """Whether thresholds of exits are solved for each candidate, and no choice of the sampler's."""
        return bool(self.space.thresholds.solved and self.space.thresholds.exits)

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits over the dense network's weights and the images: what every trial builds on."""
        return fingerprint_of(self.network, self.data)

    @cached_property
    def cheap_evaluators(self) -> tuple[Evaluator, ...]:
        """What is measured of a candidate without running it, in this order."""
        return (ParamsEvaluator(), SizeEvaluator(), self.flops)

    def compress(self, candidate: Candidate, finetune: FinetuneSection | None = None) -> CompressedNetwork:
        """Returns a candidate's network, recovered as the study says.

        Args:
            candidate: the version.
            finetune: fine-tuning that comes on top.

        Raises:
            DivergedError: the loss is not finite for the second time.
        """
        return self.compressor.compress(candidate, self.compressor.plan(candidate, finetune))

    def deploy(self, candidate: Candidate, compressed: CompressedNetwork) -> DeployedCandidate:
        """Returns a candidate that has been compressed as it would run on the target; it may have other thresholds."""
        artifact = self.builder.build(compressed.network, candidate, compressed.ranges, compressed.grids)
        threshold = candidate.thresholds.get(FRAMES, 0.0)
        if self.study.frames and threshold > 0:
            artifact = replace(artifact, reuse=Reuse(threshold, self.study.frames.max_age))
        return DeployedCandidate(compressed.network, candidate, artifact, self.scored, self.runtime, self.target)

    def deployed(self, candidate: Candidate, finetune: FinetuneSection | None = None) -> DeployedCandidate:
        """Returns a candidate, compressed and deployed; see `compress`."""
        return self.deploy(candidate, self.compress(candidate, finetune))

    def evaluate(
        self,
        candidate: Candidate,
        latency: LatencyEvaluator,
        stopping: Sequence[EarlyStopping] = (),
        finetune: FinetuneSection | None = None,
    ) -> Evaluation:
        """Returns what was measured of a candidate, cheapest metrics first.

        Args:
            candidate: the version, its thresholds resolved.
            latency: measures it beside the references.
            stopping: what may end the evaluation early.
            finetune: fine-tuning that comes on top of the study's recovery.
        """
        seconds: dict[str, float] = {}
        with timed(seconds, "compress"):
            compressed = self.compress(candidate, finetune)
        with timed(seconds, "build"):
            deployed = self.deploy(candidate, compressed)
        with timed(seconds, "load"):
            _ = deployed.session
        evaluators = (*self.cheap_evaluators, latency, AccuracyEvaluator())
        measured, stop = _measure(deployed, evaluators, stopping, seconds)
        plan = compressed.plan
        asked = plan.asked.model_dump(mode="json") if plan.asked else None
        reason = stop.reason if stop and stop.is_estimated else ""
        return Evaluation(candidate, measured, plan.effort, deployed.artifact.digest, seconds, asked, ended=reason)

    def structure(self) -> dict[str, Any]:
        """Returns, JSON-ready, where exits and gates are, which layers' outputs go together, and which stay whole."""
        return {
            "exits": asdict(self.exit_places),
            "skips": list(self.network.skip_blocks),
            "groups": [group.name for group in self.groups.free],
            "members": {name: group.name for group in self.groups.free for name in self._layers_of(group)},
            "whole": [asdict(group) for group in self.groups.whole],
        }

    def _layers_of(self, group: ChannelGroup) -> list[str]:
        """Returns the layers whose outputs are the group's channels, by the names that precisions go by."""
        names = [member.path.removeprefix("trunk.") for member in group.members if member.axis == "out"]
        return [name for name in names if name in self.builder.layers]

    @property
    def remarks(self) -> list[str]:
        """What of the study's wishes does not come true on this target, where gates are, and what the validation images
        are for.
        """
        remarks = left_out(self.study, self.runtime, self.target, self.space)
        if self.network.skip_blocks:
            image = torch.zeros(1, *self.data.image_shape)
            remarks.append(str(skip_blocks(self.network.trunk, self.study.skips, image)).rstrip("."))
        counts = len(self.threshold_images), len(self.scored)
        return remarks + (halves_told(*counts) if self.solves_thresholds else [])


def _measure(
    deployed: DeployedCandidate,
    evaluators: Sequence[Evaluator],
    stopping: Sequence[EarlyStopping],
    seconds: dict[str, float],
) -> tuple[dict[str, Measurement], Stop | None]:
    """Returns what was measured, and why that ended early; None where it did not.

    Args:
        deployed: the candidate.
        evaluators: in the order in which they measure.
        stopping: asked before each of them.
        seconds: takes note of how long each step took.
    """
    measured: dict[str, Measurement] = {}
    for evaluator in evaluators:
        for rule in stopping:
            if not rule.is_due(evaluator.metric, deployed):
                continue
            with timed(seconds, rule.step) if rule.step else nullcontext():
                stop = rule.should_stop(deployed, measured)
            if stop is not None:
                return {**measured, **stop.estimates}, stop
        with timed(seconds, evaluator.metric):
            measured[evaluator.metric] = evaluator.measure(deployed)
    return measured, None


def build_pipeline(
    study: Study,
    progress: Progress,
    runtime: Runtime | None = None,
    say: Say = lambda _: None,
    download: bool = False,
    given: GivenNetwork | None = None,
) -> CompressionPipeline:
    """Returns the pipeline of a study: its network loaded, exits and gates trained, exported once, its space found.

    Args:
        study: the question.
        progress: told about the steps that take long.
        runtime: what runs the artifacts; the study's where not given.
        say: told what the user should know about the network and the images.
        download: whether weights and images that are not here may be fetched.
        given: the study's network and images, where they are here already.

    Raises:
        SourceError: there is no such network, or there are no such images.
        UserCodeError: the study's factories give something else than a network and images.
        TargetError: the study's runtime is not available here.
    """
    study = searched(study)
    given = given or GivenNetwork(study, progress, runtime, say, download)
    places = exit_places(given.built.network.eval(), study.exits, given.data)
    network = trained_network(runnable(study, given.runtime), given.built, given.data, progress, places)
    calibration = given.data.calibration.images[:]
    image = torch.from_numpy(calibration[:1])
    places = places.only(network.cut_points, UNCUT)
    network = equalized(network, image) if study.quantization.equalize else network
    scheme = Scheme(**study.quantization.model_dump())
    fp32_in, confidence = given.target.fp32_in, study.exits.confidence
    builder = ArtifactBuilder(network, calibration, given.runtime, fp32_in, scheme, confidence)
    progress(_FINDING_GROUPS, 0, 1)
    groups = find_groups(network, image, builder.disagreement)
    progress(_FINDING_GROUPS, 1, 1)
    space = space_of(study, network, groups, given.data, builder.layers, given.runtime)
    threshold_images, scored = validation_parts(given.data, bool(space.thresholds.solved and space.thresholds.exits))
    context = _recovery_context(study, given, network, space, builder, progress)
    return CompressionPipeline(
        study=study,
        given=given,
        runtime=given.runtime,
        target=given.target,
        data=given.data,
        network=network,
        exit_places=places,
        builder=builder,
        groups=groups,
        space=space,
        threshold_images=threshold_images,
        scored=scored,
        flops=FlopsEvaluator(network, image),
        compressor=Compressor(context, space, builder, study.quantization, calibration),
        references=References(builder, network, space, given.runtime, given.target, given.data),
    )


def _recovery_context(
    study: Study,
    given: GivenNetwork,
    network: ExitNetwork,
    space: JointSpace,
    builder: ArtifactBuilder,
    progress: Progress,
) -> RecoveryContext:
    """Returns what every recovery of the study works with."""
    augment = study.data.augment
    source = source_of(load(augment)) if augment else ""
    fingerprint = fingerprint_of(network, given.data)
    key = "\0".join((fingerprint, repr(space.sparsity.description), source, torch.__version__))
    return RecoveryContext(
        network=network,
        sparsity=space.sparsity,
        train=given.data.train,
        augment=augmentation(augment) if augment else None,
        settings=study.recovery,
        folder=cache_folder(),
        key=key,
        say=progress,
        int8=_qat_context(study, given, space, builder),
    )


def _qat_context(study: Study, given: GivenNetwork, space: JointSpace, builder: ArtifactBuilder) -> QatContext | None:
    """Returns what trainings feel int8 with; None where the study does not ask for it or nothing is int8."""
    capabilities = given.runtime.capabilities()
    offered = {each for allowed in space.precision.allowed.values() for each in allowed}
    if study.recovery.qat is None or "int8" not in offered:
        return None
    # The class's name in this text is part of keys on users' disks: trainings are found by it.
    settings = repr(study.quantization).replace(type(study.quantization).__name__, "QuantizationSection", 1)
    able = f"{capabilities.weight_bits!r}, {capabilities.quantized_add!r}, {capabilities.int8_channels!r}"
    return QatContext(builder, builder.trainable(), given.data.calibration.images[:], f"({settings}, {able})")
