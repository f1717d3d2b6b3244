"""Everything that a study's trials share, prepared once, and the way of one candidate through it."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch

from evaluators.accuracy import AccuracyEvaluator
from evaluators.artifact import Artifact
from evaluators.artifact_builder import ArtifactBuilder
from evaluators.deployed import Evaluator, Subject
from evaluators.flops.evaluator import FlopsEvaluator
from evaluators.graph.digest import form_of
from evaluators.inference.frame_reuse import Reuse
from evaluators.latency.cache import LatencyCache
from evaluators.latency.evaluator import LatencyEvaluator
from evaluators.latency.slow_layer_timing import PlacementExaminer
from evaluators.latency.slow_layers import Examined, seconds_for
from evaluators.measurement import Measurement
from evaluators.quantization.equalization import equalized
from evaluators.quantization.int8 import Ranges
from evaluators.quantization.scheme import Scheme
from evaluators.runtimes.base import Runtime, Spent
from evaluators.size import ParamsEvaluator, SizeEvaluator
from search.config.cache import cache_folder
from search.config.progress import Progress, Say
from search.config.registries import RECOVERIES
from search.config.study import FinetuneSection, Study
from search.loading.user_code import load, source_of
from search.pipeline.early_stopping import SUBSET, Screen
from search.pipeline.given_network import (
    AS_GIVEN,
    GivenNetwork,
    fingerprint_of,
    latency_evaluator,
    time_references,
    timed,
    validation_parts,
)
from search.pipeline.search_space import halves_told, left_out, runnable, searched, space_of
from search.recovery.adaround_cache import LearnedRounding
from search.recovery.base import Ground, Int8Ground, Recovery, effort_of
from search.recovery.finetune import finetune_kept
from search.recovery.qat import NOTHING, Learned, train_int8_kept
from search.results.evaluation import Evaluation
from search.training.batchnorm import recovery_images
from search.training.block_gates import skip_blocks
from search.training.dense import UNCUT, augmentation, exit_places, trained_network
from spaces.candidate import FRAMES, Candidate
from spaces.dynamic.exit_network import ExitNetwork
from spaces.dynamic.masks.base import move_masks
from spaces.pruning.groups import ChannelGroup
from spaces.pruning.prunable import find_groups

StopEarly = Callable[[Mapping[str, Measurement]], bool]


@dataclass(frozen=True)
class Compressed:
    """A candidate's network in torch.

    Args:
        network: recovered as the study says.
        learned: what its file takes over from a training that felt int8.
    """

    network: ExitNetwork
    learned: Learned = NOTHING


class Workbench:
    """The dense network, the space, and what is needed to build and measure a version of it.

    Args:
        study: the question.
        progress: told about the steps that take long.
        library: what runs the artifacts; the study's runtime where not given.
        say: told what the user should know about the network and the images.
        download: whether weights and images that are not here may be fetched.
        given: the study's network and images, where they are here already.

    Raises:
        SourceError: there is no such network, or there are no such images.
        UserCodeError: the study's factories give something else than a network and images.
        TargetError: the study's runtime is not available here.
    """

    def __init__(
        self,
        study: Study,
        progress: Progress,
        library: Runtime | None = None,
        say: Say = lambda _: None,
        download: bool = False,
        given: GivenNetwork | None = None,
    ) -> None:
        self.study = study = searched(study)
        self._progress = progress
        self.given = given or GivenNetwork(study, progress, library, say, download)
        self.runtime, self.target = self.given.runtime, self.given.target
        self.loaded, self.data = self.given.loaded, self.given.data
        built, wanted = self.given.built, runnable(study, self.runtime)
        places = exit_places(built.network.eval(), study.exits, self.data)
        self.network: ExitNetwork = trained_network(wanted, built, self.data, progress, places)
        self.exit_places = places.only(self.network.cut_points, UNCUT)
        calibration = self.data.calibration.images[:]
        image = torch.from_numpy(calibration[:1])
        if study.quantization.equalize:
            self.network = equalized(self.network, image)
        scheme = Scheme(**study.quantization.model_dump())
        self.builder = ArtifactBuilder(
            self.network, calibration, self.runtime, self.target.fp32_in, scheme, study.exits.confidence
        )
        progress("Finding the channels that can be cut", 0, 1)
        self.groups = find_groups(self.network, image, self.builder.disagreement)
        progress("Finding the channels that can be cut", 1, 1)
        self.space = space_of(study, self.network, self.groups, self.data, self.builder.layers, self.runtime)
        self.has_gates = bool(self.space.gates.solved and self.space.gates.exits)
        self.gate_images, self.scored = validation_parts(self.data, self.has_gates)
        self._last: tuple[tuple[Candidate, FinetuneSection | None], Compressed] | None = None
        self.flops = FlopsEvaluator(self.network, image)
        self._cheap: tuple[Evaluator, ...] = (ParamsEvaluator(), SizeEvaluator(), self.flops)
        self._accuracy = AccuracyEvaluator()
        self.ground = self._recovery_ground(progress)
        self._rounding = LearnedRounding(self.ground, self.builder, study.quantization, calibration)

    def _recovery_ground(self, progress: Progress) -> Ground:
        augment = self.study.data.augment
        source = source_of(load(augment)) if augment else ""
        parts = (self.fingerprint, repr(self.space.sparsity.description), source, torch.__version__)
        return Ground(
            network=self.network,
            sparsity=self.space.sparsity,
            train=self.data.train,
            augment=augmentation(augment) if augment else None,
            settings=self.study.recovery,
            folder=cache_folder(),
            key="\0".join(parts),
            say=progress,
            int8=self._int8_ground(),
        )

    def _int8_ground(self) -> Int8Ground | None:
        able = self.runtime.capabilities()
        offered = {each for left in self.space.precision.allowed.values() for each in left}
        if self.study.recovery.qat is None or "int8" not in offered:
            return None
        key = repr((self.study.quantization, able.weight_bits, able.quantized_add, able.int8_channels))
        return Int8Ground(self.builder, self.builder.trainable(), self.data.calibration.images[:], key)

    @cached_property
    def recovery(self) -> Recovery:
        """How pruned networks win accuracy back while the search runs: the same way for all of them."""
        settings = self.study.recovery
        needed = settings if self.recovers else settings.model_copy(update={"level": "none"})
        made: Recovery = RECOVERIES[needed.level](replace(self.ground, settings=needed))
        return made

    @property
    def recovers(self) -> bool:
        """Whether a version may need the recovery: it may lose channels or weights, or shared weights feel int8."""
        shares_int8 = self.ground.int8 is not None and self.study.recovery.level == "elastic"
        return bool(self.space.sparsity.dimensions() or self.space.patterns.dimensions() or shares_int8)

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
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits over the dense network's weights and the images: what every trial builds on."""
        return fingerprint_of(self.network, self.data)

    def references(self) -> dict[str, Artifact]:
        """Returns the dense network in each of the target's precisions: what candidates are timed beside."""
        dense = self.space.dense()
        return {
            precision: self.builder.build(
                self.network, Candidate(dense.channels, dict.fromkeys(dense.precision, precision), dense.thresholds)
            )
            for precision in self.space.precision.precisions
        }

    @property
    def remarks(self) -> list[str]:
        """What of the study's wishes does not come true on this target, where gates are, and what the validation images
        are for.
        """
        found = left_out(self.study, self.runtime, self.target, self.space)
        if self.network.skip_blocks:
            image = torch.zeros(1, *self.data.image_shape)
            found.append(str(skip_blocks(self.network.trunk, self.study.skips, image)).rstrip("."))
        return found + (halves_told(len(self.gate_images), len(self.scored)) if self.has_gates else [])

    def writes(self, candidate: Candidate, form: str) -> bool:
        """Returns whether a candidate's one file is of a form, whatever its tensors are called."""
        deployed = self.subject(candidate).artifact.deployed
        return len(deployed) == 1 and form_of(deployed[0]) == form

    def has_references(self, forms: Mapping[str, str]) -> bool:
        """Returns whether the references are files of these forms, by precision."""
        return {name: form_of(artifact.deployed[0]) for name, artifact in self.references().items()} == dict(forms)

    def time_references(self) -> dict[str, Spent]:
        """Returns what each reference takes for its batch, medians in seconds, timed side by side."""
        return time_references(self.references(), self.runtime, self.target, self.data)

    def latency_evaluator(self, reference_seconds: Mapping[str, float]) -> LatencyEvaluator:
        """Returns the evaluator that tells latencies at the speed which the references had."""
        return latency_evaluator(self.references(), reference_seconds, self.runtime, self.target)

    @property
    def examines(self) -> bool:
        """Whether a search begins with a look for layers that are slower in a lower precision."""
        precision = self.space.precision
        return self.study.space.drop_slower and len(precision.computed) > 1 and bool(precision.dimensions())

    def examine(self, search_s: float) -> Examined:
        """Returns which layers are slower in a lower precision, measured now or kept from the same network.

        Args:
            search_s: the seconds that the search will take, of which this is a share.
        """
        examiner = PlacementExaminer(
            self.builder,
            self.network,
            self.space.dense(),
            self.space.precision.computed,  # what is stored smaller is not asked to be faster
            self.runtime,
            self.target,
            self.data.validation.images,
            LatencyCache(cache_folder() / "placements"),
        )
        return examiner.examine(self._progress, seconds_for(search_s))

    def compress(self, candidate: Candidate, more: FinetuneSection | None = None) -> ExitNetwork:
        """Returns the candidate's network in torch, recovered as the study says.

        A network with all of its channels and weights is the one that was given, whatever the level, unless the study
        asks for trainings that feel int8 and it has int8 layers.

        Args:
            candidate: the version.
            more: fine-tuning that comes on top.

        Raises:
            DivergedError: the loss is not finite for the second time.
        """
        return self._compress(candidate, more).network

    def _compress(self, candidate: Candidate, more: FinetuneSection | None) -> Compressed:
        start = self.study.recovery.model_dump_json(exclude={"final"})
        network = self.space.apply(self.recovery.source if self._is_slice(candidate) else self.network, candidate)
        if self._is_slice(candidate):
            self.recovery.recover(network, candidate.channels, candidate.patterns)
        if more is not None and self.is_pruned(candidate):
            images, kept = recovery_images(self.data.train, self.study.recovery.images), candidate.channels
            finetune_kept(self.ground, network, kept, more, images, start, candidate.patterns, self.recovery.source)
            start += more.model_dump_json()
        move_masks(network, candidate.masks)  # weights that were kept have the thresholds of another version
        int8, qat = self.ground.int8, self.study.recovery.qat
        if int8 is None or qat is None or not self._trains_int8(candidate, more):
            return Compressed(network)
        learned = train_int8_kept(self.ground, int8, network, candidate, qat, start)
        return Compressed(network, learned)

    def effort(self, candidate: Candidate, more: FinetuneSection | None = None) -> str:
        """Returns what was done to win the candidate's accuracy back, for the record."""
        parts = [self.recovery.effort if self._is_slice(candidate) else AS_GIVEN]
        if more and self.is_pruned(candidate):
            parts.append(f"finetune {effort_of(more)}")
        if self._trains_int8(candidate, more) and (qat := self.study.recovery.qat):
            parts.append(f"qat {effort_of(qat)} ({qat.quantizer})")
        elif self._rounding.is_due(candidate, self.is_pruned(candidate), more is not None):
            parts.append("adaround")
        return " + ".join(parts)

    def _artifact(self, candidate: Candidate, compressed: Compressed, more: FinetuneSection | None) -> Artifact:
        network, learned = compressed.network, compressed.learned
        ranges, grids = {**self._ranges(candidate), **learned.ranges}, learned.grids
        if not grids:  # what a training has put on its grid stays there
            grids = self._rounding.grids(network, candidate, ranges, self.is_pruned(candidate), more is not None)
        return self.builder.build(network, candidate, ranges, grids)

    def _ranges(self, candidate: Candidate) -> Ranges:
        """Returns the ranges of the activations of the network that the candidate is a slice of."""
        if not self._is_slice(candidate) or self.recovery.source is self.network:
            return self.builder.ranges
        return self._source_ranges

    @cached_property
    def _source_ranges(self) -> Ranges:
        measured = self.builder.read_ranges(self.recovery.source, self.data.calibration.images[:])
        return {**measured, **self.recovery.ranges}

    def _is_slice(self, candidate: Candidate) -> bool:
        """Returns whether the candidate's weights come from the recovery's source, not from the network as given."""
        shares_int8 = self._feels_int8(candidate) and self.study.recovery.level == "elastic"
        return self.is_pruned(candidate) or shares_int8

    def _feels_int8(self, candidate: Candidate) -> bool:
        """Returns whether it has int8 layers and the study asks for trainings that feel them."""
        return self.ground.int8 is not None and "int8" in candidate.precision.values()

    def _trains_int8(self, candidate: Candidate, more: FinetuneSection | None) -> bool:
        """Returns whether the candidate is trained for itself in its own precisions."""
        return self._feels_int8(candidate) and (more is not None or self.study.recovery.level == "finetune")

    def may_recover(self, candidate: Candidate) -> bool:
        """Returns whether training may win accuracy back: it is pruned, or has int8 layers that a training can feel."""
        return self.is_pruned(candidate) or self._feels_int8(candidate)

    def is_pruned(self, candidate: Candidate) -> bool:
        """Returns whether the candidate lacks any channel or weight of the dense network."""
        return bool(candidate.patterns) or bool(self.space.sparsity.kept(candidate.channels))

    def subject(self, candidate: Candidate, more: FinetuneSection | None = None) -> Subject:
        """Returns the candidate, built and ready to be measured; `more` is fine-tuning that comes on top."""
        return self.built(candidate, self.compressed(candidate, more), more)

    def _subject(self, candidate: Candidate, network: ExitNetwork, artifact: Artifact) -> Subject:
        threshold = candidate.thresholds.get(FRAMES, 0.0)
        if self.study.frames and threshold > 0:
            artifact = replace(artifact, reuse=Reuse(threshold, self.study.frames.max_age))
        return Subject(network, candidate, artifact, self.scored, self.runtime, self.target)

    def built(self, candidate: Candidate, compressed: Compressed, more: FinetuneSection | None = None) -> Subject:
        """Returns a candidate that has been compressed, with `more` fine-tuning on top, ready to be measured."""
        return self._subject(candidate, compressed.network, self._artifact(candidate, compressed, more))

    def compressed(self, candidate: Candidate, more: FinetuneSection | None = None) -> Compressed:
        """Returns the candidate's network, recovered; the same again where only thresholds are others."""
        key = (replace(candidate, thresholds=candidate.mask_thresholds), more)
        if self._last is None or self._last[0] != key:
            self._last = key, self._compress(candidate, more)
        return self._last[1]

    def evaluate(
        self,
        candidate: Candidate,
        latency: LatencyEvaluator,
        stop: StopEarly,
        more: FinetuneSection | None = None,
        screen: Screen | None = None,
    ) -> Evaluation:
        """Returns what was measured of a candidate, cheapest metrics first.

        Args:
            candidate: the version, no threshold open.
            latency: measures it beside the references.
            stop: told what is known after each metric; where it says so, the rest is not measured.
            more: fine-tuning that comes on top of the study's recovery.
            screen: ends it after some of the images where the rest would change nothing; no version where not given.
        """
        seconds: dict[str, float] = {}
        with timed(seconds, "compress"):
            compressed = self.compressed(candidate, more)
        with timed(seconds, "build"):
            subject = self.built(candidate, compressed, more)
        with timed(seconds, "load"):
            _ = subject.opened
        measured: dict[str, Measurement] = {}
        ended = None
        # Where the path depends on the input, costs follow from answers to all images: some are asked for before.
        asks = self.flops if subject.artifact.is_dynamic else self._accuracy
        for evaluator in (*self._cheap, latency, self._accuracy):
            if screen is not None and evaluator is asks:
                with timed(seconds, SUBSET):
                    ended = screen.judge(subject, measured)
                if ended is not None:
                    measured["accuracy"] = ended.accuracy
                    break
            with timed(seconds, evaluator.metric):
                measured[evaluator.metric] = evaluator.measure(subject)
            if stop(measured):
                break
        added = more.model_dump(mode="json") if more and self.may_recover(candidate) else None
        found = Evaluation(candidate, measured, self.effort(candidate, more), subject.artifact.digest, seconds, added)
        return replace(found, ended=ended.reason) if ended else found

    def costs(self, subject: Subject) -> dict[str, Measurement]:
        """Returns what is measured of a version without running it."""
        return {evaluator.metric: evaluator.measure(subject) for evaluator in self._cheap}
