"""From a candidate to its measurements, in four steps: plan, compress, deploy, measure."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch

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
from search.config.cache import cache_folder
from search.config.progress import Progress, Say
from search.config.study import FinetuneSection, Study
from search.loading.user_code import load, source_of
from search.pipeline.channel_steps import NOT_MEASURED, Widths, width_remarks
from search.pipeline.compressor import CompressedNetwork, Compressor
from search.pipeline.depth_order import depth_space
from search.pipeline.early_stopping import EarlyStopping, Stop
from search.pipeline.evaluators import all_evaluators
from search.pipeline.given_network import GivenNetwork, fingerprint_of, timed, validation_parts
from search.pipeline.references import References
from search.pipeline.search_space import (
    build_space,
    input_sizes,
    split_remarks,
    unsupported_options,
    without_fixed_dimensions,
    without_unsupported_gates,
)
from search.recovery.base import QatContext, RecoveryContext
from search.results.evaluation import Evaluation
from search.training.block_gates import skip_blocks
from search.training.dense import UNCUT, augmentation, exit_places, trained_network
from search.training.loop import VERSION
from spaces.candidate import Candidate
from spaces.depth import ALL_BLOCKS
from spaces.dynamic.cut_points import CutPoints
from spaces.dynamic.exit_network import ExitNetwork
from spaces.dynamic.skippable_blocks import removable_blocks
from spaces.joint import JointSpace
from spaces.pruning.groups import ChannelGroup, Groups
from spaces.pruning.prunable import find_groups

_FINDING_GROUPS = "Finding the channels that can be cut"


@dataclass(frozen=True)
class CompressionPipeline:
    """Compresses, deploys and measures the candidates of a study. `build_pipeline` makes one.

    Args:
        study: what to search, without the dimensions that it leaves out.
        given: the user's dense network, without exits, gates or masks.
        runtime: executes the artifacts.
        target: device, batch size and threads.
        data: the study's images.
        network: the dense network with its exits and gates, trained, in evaluation mode.
        exit_places: layers after which exits sit, and why others have none.
        builder: exports artifacts.
        groups: channels that are pruned together.
        space: the search space.
        threshold_images: images that thresholds of exits are chosen on.
        scored: validation images that every candidate is scored on.
        flops: counts a candidate's FLOPs.
        compressor: prunes and recovers a candidate's network.
        references: the dense network in each precision.
        widths: of layers, as measured on the target when the search began.
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
    widths: Widths

    @property
    def solves_thresholds(self) -> bool:
        """Whether thresholds of exits are solved for each candidate, rather than proposed by the sampler."""
        return bool(self.space.thresholds.solved and self.space.thresholds.exits)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the dense network's weights and the images, sixteen hexadecimal digits."""
        return fingerprint_of(self.network, self.data)

    def compress(self, candidate: Candidate, finetune: FinetuneSection | None = None) -> CompressedNetwork:
        """Returns a candidate's network, recovered as the study says.

        Args:
            candidate: the version.
            finetune: fine-tuning on top of the study's recovery.

        Raises:
            DivergedError: the loss is not finite for the second time.
        """
        return self.compressor.compress(candidate, self.compressor.plan(candidate, finetune))

    def deploy(self, candidate: Candidate, compressed: CompressedNetwork) -> DeployedCandidate:
        """Returns a compressed candidate as it would run on the target; thresholds may differ from those compressed."""
        artifact = self.builder.build(compressed.network, candidate, compressed.ranges, compressed.grids)
        threshold = candidate.thresholds.frames
        if self.study.frames and threshold:
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
        """Returns the measurements of a candidate, cheapest metrics first.

        Args:
            candidate: the version, its thresholds resolved.
            latency: times it against the references.
            stopping: rules that may end the evaluation early.
            finetune: fine-tuning on top of the study's recovery.
        """
        seconds: dict[str, float] = {}
        with timed(seconds, "compress"):
            compressed = self.compress(candidate, finetune)
        with timed(seconds, "build"):
            deployed = self.deploy(candidate, compressed)
        with timed(seconds, "load"):
            _ = deployed.session
        measured, stop = _measure(deployed, all_evaluators(self.flops, latency), stopping, seconds)
        plan = compressed.plan
        requested = plan.requested.model_dump(mode="json") if plan.requested else None
        reason = stop.reason if stop and stop.is_estimated else ""
        trained = compressed.trained
        return Evaluation(
            candidate,
            measured,
            plan.effort,
            deployed.artifact.digest,
            seconds,
            requested,
            ended=reason,
            trained={"images": trained.images, "seconds": trained.seconds} if trained.images else {},
        )

    def structure(self) -> dict[str, Any]:
        """Returns, JSON-ready, the places of exits and gates, the channel groups, and the layers never pruned."""
        return {
            "exits": asdict(self.exit_places),
            "skips": list(self.network.skip_blocks),
            "groups": [group.name for group in self.groups.free],
            "members": {name: group.name for group in self.groups.free for name in self._layers_of(group)},
            "whole": [asdict(group) for group in self.groups.whole],
            "stages": [asdict(stage) for stage in self.space.depth.stages],
        }

    def _layers_of(self, group: ChannelGroup) -> list[str]:
        """Returns the layers whose outputs are the group's channels, by the names that are used for precisions."""
        names = [member.path.removeprefix("trunk.") for member in group.members if member.axis == "out"]
        return [name for name in names if name in self.builder.layers]

    @property
    def remarks(self) -> list[str]:
        """Remarks for the user: widths, options that the target lacks, places of gates, the split of the images."""
        remarks = width_remarks(self.study, self.runtime, self.widths)
        remarks += unsupported_options(self.study, self.runtime, self.target, self.space)
        remarks += self.flops.remarks
        if self.network.skip_blocks:
            image = torch.zeros(1, *self.data.image_shape)
            remarks.append(str(skip_blocks(self.network.trunk, self.study.skips, image)).rstrip("."))
        counts = len(self.threshold_images), len(self.scored)
        return remarks + (split_remarks(*counts) if self.solves_thresholds else [])


def _measure(
    deployed: DeployedCandidate,
    evaluators: Sequence[Evaluator],
    stopping: Sequence[EarlyStopping],
    seconds: dict[str, float],
) -> tuple[dict[str, Measurement], Stop | None]:
    """Returns the measurements by metric, and why they ended early, or None.

    Args:
        deployed: the candidate.
        evaluators: in the order in which they measure.
        stopping: rules, checked before each evaluator.
        seconds: filled with the seconds of each step.
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
    widths: Widths = NOT_MEASURED,
) -> CompressionPipeline:
    """Returns the pipeline of a study: loads the network, trains exits and gates, exports it, and builds the space.

    Args:
        study: what to search.
        progress: called with the progress of long steps.
        runtime: executes the artifacts; by default the one that the study names.
        say: called with remarks for the user on the network and the images.
        download: whether missing weights and images may be downloaded.
        given: the study's network and images, if they are loaded already.
        widths: of layers, as `measured_widths` timed them; by default the runtime's own steps hold.

    Raises:
        SourceError: there is no such network, or there are no such images.
        UserCodeError: the study's factories do not return a network and images.
        TargetError: the study's runtime is not available here.
    """
    study = without_fixed_dimensions(study)
    given = given or GivenNetwork(study, progress, runtime, say, download)
    places = exit_places(given.built.network.eval(), study.exits, given.data)
    network = trained_network(
        without_unsupported_gates(study, given.runtime), given.built, given.data, progress, places
    )
    calibration = given.data.calibration.images[:]
    image = torch.from_numpy(calibration[:1])
    places = places.only(network.cut_points, UNCUT)
    network = equalized(network, image) if study.quantization.equalize else network
    scheme = Scheme(**study.quantization.model_dump())
    fp32_in, confidence = given.target.fp32_in, study.exits.confidence
    varies_depth = "depth" in study.space.only and study.space.keep_blocks_at_least < 1
    removable = tuple(removable_blocks(network.trunk, image, network.cut_points)) if varies_depth else ()
    builder = ArtifactBuilder(network, calibration, given.runtime, fp32_in, scheme, confidence, removable)
    progress(_FINDING_GROUPS, 0, 1)
    groups = find_groups(network, image, builder.disagreement)
    progress(_FINDING_GROUPS, 1, 1)
    depth = ALL_BLOCKS
    if removable:
        fewest, fingerprint = study.space.keep_blocks_at_least, fingerprint_of(network, given.data)
        depth = depth_space(network, builder, given.data.calibration, fewest, fingerprint, progress)
    sizes = input_sizes(study, network, image, builder.disagreement)
    space = build_space(study, network, groups, depth, sizes, given.data, builder.layers, given.runtime, widths)
    split = bool(space.thresholds.solved and space.thresholds.exits)
    threshold_images, scored = validation_parts(given.data, split, study.exits.choose_on)
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
        widths=widths,
    )


def _recovery_context(
    study: Study,
    given: GivenNetwork,
    network: ExitNetwork,
    space: JointSpace,
    builder: ArtifactBuilder,
    progress: Progress,
) -> RecoveryContext:
    """Returns the network, images and settings that every recovery of the study uses."""
    augment = study.data.augment
    source = source_of(load(augment)) if augment else ""
    fingerprint = fingerprint_of(network, given.data)
    key = "\0".join((fingerprint, repr(space.sparsity.description), source, torch.__version__, VERSION))
    return RecoveryContext(
        network=network,
        sparsity=space.sparsity,
        depth=space.depth,
        input_size=space.input_size,
        train=given.data.train,
        augment=augmentation(augment) if augment else None,
        settings=study.recovery,
        folder=cache_folder(),
        key=key,
        say=progress,
        int8=_qat_context(study, given, space, builder),
    )


def _qat_context(study: Study, given: GivenNetwork, space: JointSpace, builder: ArtifactBuilder) -> QatContext | None:
    """Returns what quantization-aware training needs; None if the study does not ask for it or no layer may be int8."""
    capabilities = given.runtime.capabilities()
    offered = {precision for allowed in space.precision.allowed.values() for precision in allowed}
    if study.recovery.qat is None or "int8" not in offered:
        return None
    # The class's name in this text is part of keys on users' disks: trainings are found by it.
    settings = repr(study.quantization).replace(type(study.quantization).__name__, "QuantizationSection", 1)
    supported = f"{capabilities.weight_bits!r}, {capabilities.quantized_add!r}, {capabilities.int8_channels!r}"
    builder.check_trainable()  # says now what cannot be trained
    return QatContext(builder, given.data.calibration.images[:], f"({settings}, {supported})")
