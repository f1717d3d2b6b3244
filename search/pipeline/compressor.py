"""From a candidate to its network in torch: what has to be done for its accuracy is planned once, then done."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from numpy.typing import NDArray

from evaluators.artifact_builder import ArtifactBuilder
from evaluators.quantization.int8 import NO_GRIDS, Grids, Ranges
from search.config.registries import RECOVERIES
from search.config.study import FinetuneSection, QatSection, QuantizationSection
from search.pipeline.given_network import AS_GIVEN
from search.recovery.adaround_cache import LearnedRounding
from search.recovery.base import Recovery, RecoveryContext, effort_of
from search.recovery.finetune import finetune_kept
from search.recovery.qat import train_int8_kept
from search.training.batchnorm import recovery_images
from spaces.candidate import Candidate
from spaces.dynamic.exit_network import ExitNetwork
from spaces.dynamic.masks.base import move_masks
from spaces.joint import JointSpace


@dataclass(frozen=True)
class RecoveryPlan:
    """What is done to win a candidate's accuracy back; decided once, by `Compressor.plan`.

    Args:
        is_pruned: whether the candidate lacks channels or weights of the dense network.
        recovers: whether its weights are a slice of the recovery's source and are recovered; else the dense network's.
        finetune: fine-tuning on top of that; None where there is none.
        qat: training in the candidate's own precisions; None where there is none.
        learns_rounding: whether the roundings of its weights are learned.
        asked: the fine-tuning that was asked for, where it made a difference; for the record.
        effort: all of this in words, for the record.
    """

    is_pruned: bool
    recovers: bool
    finetune: FinetuneSection | None
    qat: QatSection | None
    learns_rounding: bool
    asked: FinetuneSection | None
    effort: str

    @property
    def depends_on_precision(self) -> bool:
        """Whether two candidates that differ in precision alone come to different weights."""
        return self.qat is not None or self.learns_rounding


@dataclass(frozen=True)
class CompressedNetwork:
    """A candidate's network in torch, recovered, and what its file takes over from that.

    Args:
        network: in evaluation mode.
        plan: what was done.
        ranges: of its activations.
        grids: weights that something learned has put on their grids.
    """

    network: ExitNetwork
    plan: RecoveryPlan
    ranges: Ranges
    grids: Grids


class Compressor:
    """Plans and carries out what a study's recovery does for a candidate.

    Args:
        context: the dense network, the training images and the study's recovery.
        space: cuts the dense network to a candidate's size.
        builder: reads ranges and learns roundings.
        quantization: of the study.
        calibration: images `(n, c, h, w)`.
    """

    def __init__(
        self,
        context: RecoveryContext,
        space: JointSpace,
        builder: ArtifactBuilder,
        quantization: QuantizationSection,
        calibration: NDArray[Any],
    ) -> None:
        self.context = context
        self._space = space
        self._builder = builder
        self._calibration = calibration
        self._rounding = LearnedRounding(context, builder, quantization, calibration)
        self._last: tuple[object, CompressedNetwork] | None = None

    @cached_property
    def recovery(self) -> Recovery:
        """How pruned networks win accuracy back while the search runs; shared weights are trained when it is asked for.

        Raises:
            DivergedError: the loss of that training is not finite for the second time.
        """
        settings = self.context.settings
        needed = settings if self.may_be_needed else settings.model_copy(update={"level": "none"})
        made: Recovery = RECOVERIES[needed.level](replace(self.context, settings=needed))
        return made

    @property
    def may_be_needed(self) -> bool:
        """Whether a candidate may need the recovery: it may lose channels or weights, or shared weights feel int8."""
        cuts = self._space.sparsity.dimensions() or self._space.patterns.dimensions()
        return bool(cuts) or (self._shares_weights and self.context.int8 is not None)

    @property
    def _shares_weights(self) -> bool:
        return bool(RECOVERIES[self.context.settings.level].shares_weights)

    def may_recover(self, candidate: Candidate) -> bool:
        """Returns whether training may win accuracy back: it is pruned, or has int8 layers that a training can feel."""
        return self._is_pruned(candidate) or self._feels_int8(candidate)

    def plan(self, candidate: Candidate, finetune: FinetuneSection | None = None) -> RecoveryPlan:
        """Returns what is done for a candidate.

        A network with all of its channels and weights is the one that was given, whatever the level, unless the study
        asks for trainings that feel int8 and it has int8 layers.

        Args:
            candidate: the version.
            finetune: fine-tuning that comes on top of the study's recovery.
        """
        settings = self.context.settings
        is_pruned = self._is_pruned(candidate)
        feels_int8 = self._feels_int8(candidate)
        recovers = is_pruned or (feels_int8 and self._shares_weights)
        trains_each = finetune is not None or RECOVERIES[settings.level].trains_per_candidate
        qat = settings.qat if feels_int8 and trains_each else None
        rounds = qat is None and self._rounding.is_due(candidate, is_pruned, finetune is not None)
        tuned = finetune if is_pruned else None
        efforts = [
            self.recovery.effort if recovers else AS_GIVEN,
            f"finetune {effort_of(tuned)}" if tuned else "",
            f"qat {effort_of(qat)} ({qat.quantizer})" if qat else "",
            "adaround" if rounds else "",
        ]
        asked = finetune if is_pruned or feels_int8 else None
        return RecoveryPlan(is_pruned, recovers, tuned, qat, rounds, asked, " + ".join(filter(None, efforts)))

    def compress(self, candidate: Candidate, plan: RecoveryPlan) -> CompressedNetwork:
        """Returns the candidate's network, recovered; the same one again where only thresholds of exits are others.

        Raises:
            DivergedError: the loss of a training is not finite for the second time.
        """
        precision = candidate.precision if plan.depends_on_precision else {}
        key = (replace(candidate, thresholds=candidate.mask_thresholds, precision=precision), plan)
        if self._last is None or self._last[0] != key:
            self._last = key, self._compress(candidate, plan)
        return self._last[1]

    def _compress(self, candidate: Candidate, plan: RecoveryPlan) -> CompressedNetwork:
        source = self.recovery.source if plan.recovers else self.context.network
        network = self._space.apply(source, candidate)
        history = self.context.settings.model_dump_json(exclude={"final"})
        if plan.recovers:
            self.recovery.recover(network, candidate.channels, candidate.patterns)
        if plan.finetune is not None:
            self._finetune(network, candidate, plan.finetune, history)
            history += plan.finetune.model_dump_json()
        move_masks(network, candidate.masks)  # weights that were kept have the thresholds of another version
        ranges = self._ranges(plan)
        if plan.qat is not None and self.context.int8 is not None:
            learned = train_int8_kept(self.context, self.context.int8, network, candidate, plan.qat, history)
            return CompressedNetwork(network, plan, {**ranges, **learned.ranges}, learned.grids)
        grids = self._rounding.learn(network, candidate, ranges, plan.is_pruned) if plan.learns_rounding else NO_GRIDS
        return CompressedNetwork(network, plan, ranges, grids)

    def _finetune(self, network: ExitNetwork, candidate: Candidate, settings: FinetuneSection, history: str) -> None:
        images = recovery_images(self.context.train, self.context.settings.images)
        source = self.recovery.source
        finetune_kept(self.context, network, candidate.channels, settings, images, history, candidate.patterns, source)

    def _ranges(self, plan: RecoveryPlan) -> Ranges:
        """Returns the ranges of the activations of the network that the candidate is a slice of."""
        is_own = plan.recovers and self.recovery.source is not self.context.network
        return self._source_ranges if is_own else self._builder.ranges

    @cached_property
    def _source_ranges(self) -> Ranges:
        measured: Mapping[str, Any] = self._builder.read_ranges(self.recovery.source, self._calibration)
        return {**measured, **self.recovery.ranges}

    def _is_pruned(self, candidate: Candidate) -> bool:
        return bool(candidate.patterns) or bool(self._space.sparsity.kept(candidate.channels))

    def _feels_int8(self, candidate: Candidate) -> bool:
        """Returns whether it has int8 layers and the study asks for trainings that feel them."""
        return self.context.int8 is not None and "int8" in candidate.precision.values()
