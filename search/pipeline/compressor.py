"""From a candidate to its network in torch: pruned, and recovered by a plan."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from numpy.typing import NDArray

from evaluators.artifact_builder import ArtifactBuilder
from evaluators.quantization.int8 import NO_GRIDS, Grids, Ranges
from search.config.registries import RECOVERIES
from search.config.study import FinetuneSection, QatSection, QuantizationSection
from search.pipeline.given_network import NO_RECOVERY
from search.recovery.adaround_cache import LearnedRounding
from search.recovery.base import Recovery, RecoveryContext, effort_of
from search.recovery.finetune import finetune_kept
from search.recovery.qat import train_int8_kept
from search.training.batchnorm import recovery_images
from search.training.loop import Fitted
from spaces.candidate import Candidate
from spaces.dynamic.exit_network import ExitNetwork
from spaces.dynamic.masks.base import move_masks
from spaces.joint import JointSpace
from spaces.thresholds import Thresholds


@dataclass(frozen=True)
class RecoveryPlan:
    """How a candidate's accuracy is recovered; `Compressor.plan` decides it.

    Args:
        is_pruned: whether the candidate lacks channels, weights or blocks of the dense network, or has smaller inputs.
        recovers: whether its weights are cut from the recovery's source network and recovered; else they are the dense
            network's.
        finetune: fine-tuning on top of that, or None.
        qat: quantization-aware training in the candidate's own precisions, or None.
        learns_rounding: whether the rounding of its weights is learned (AdaRound).
        requested: the fine-tuning that was requested, if it applies to this candidate; for the record.
        effort: all of this in words, for the record.
    """

    is_pruned: bool
    recovers: bool
    finetune: FinetuneSection | None
    qat: QatSection | None
    learns_rounding: bool
    requested: FinetuneSection | None
    effort: str

    @property
    def depends_on_precision(self) -> bool:
        """Whether candidates that differ in precision alone get different weights."""
        return self.qat is not None or self.learns_rounding


@dataclass(frozen=True)
class CompressedNetwork:
    """A candidate's recovered network in torch, and what its export needs besides.

    Args:
        network: in evaluation mode.
        plan: how it was recovered.
        ranges: of its activations.
        grids: learned quantization grids of weights.
        trained: what its own fine-tuning took, beside weights that versions share.
    """

    network: ExitNetwork
    plan: RecoveryPlan
    ranges: Ranges
    grids: Grids
    trained: Fitted = field(default_factory=Fitted)


class Compressor:
    """Prunes candidates, and plans and runs their recovery.

    Args:
        context: the dense network, the training images and the study's recovery.
        space: prunes the dense network to a candidate's widths.
        builder: measures activation ranges and learns rounding.
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
        """The recovery of pruned networks during the search. The first access may train shared weights.

        Raises:
            DivergedError: the loss of that training is not finite for the second time.
        """
        settings = self.context.settings
        if not self.may_be_needed:
            settings = settings.model_copy(update={"level": "none"})
        recovery: Recovery = RECOVERIES[settings.level](replace(self.context, settings=settings))
        return recovery

    @property
    def may_be_needed(self) -> bool:
        """Whether any candidate may need the recovery: the space prunes, or shared weights are trained for int8."""
        parts = (self._space.sparsity, self._space.patterns, self._space.depth, self._space.input_size)
        return any(part.dimensions() for part in parts) or (self._shares_weights and self.context.int8 is not None)

    @property
    def _shares_weights(self) -> bool:
        return bool(RECOVERIES[self.context.settings.level].shares_weights)

    def may_recover(self, candidate: Candidate) -> bool:
        """Returns whether training may recover accuracy: it is pruned, or has int8 layers that the study trains."""
        return self._is_pruned(candidate) or self._trains_int8(candidate)

    def plan(self, candidate: Candidate, finetune: FinetuneSection | None = None) -> RecoveryPlan:
        """Returns how a candidate is recovered.

        A network with all channels and weights is left as it is, at every level, unless it has int8 layers and the
        study asks for quantization-aware training.

        Args:
            candidate: the version.
            finetune: fine-tuning on top of the study's recovery.
        """
        settings = self.context.settings
        is_pruned = self._is_pruned(candidate)
        trains_int8 = self._trains_int8(candidate)
        recovers = is_pruned or (trains_int8 and self._shares_weights)
        trains_each = finetune is not None or RECOVERIES[settings.level].trains_per_candidate
        qat = settings.qat if trains_int8 and trains_each else None
        learns_rounding = qat is None and self._rounding.applies(candidate, is_pruned, finetune is not None)
        finetune_pruned = finetune if is_pruned else None
        efforts = [
            self.recovery.effort if recovers else NO_RECOVERY,
            f"finetune {effort_of(finetune_pruned)}" if finetune_pruned else "",
            f"qat {effort_of(qat)} ({qat.quantizer})" if qat else "",
            "adaround" if learns_rounding else "",
        ]
        requested = finetune if is_pruned or trains_int8 else None
        return RecoveryPlan(
            is_pruned, recovers, finetune_pruned, qat, learns_rounding, requested, " + ".join(filter(None, efforts))
        )

    def compress(self, candidate: Candidate, plan: RecoveryPlan) -> CompressedNetwork:
        """Returns the candidate's recovered network; the last one again if only thresholds of exits differ.

        Raises:
            DivergedError: the loss of a training is not finite for the second time.
        """
        precision = candidate.precision if plan.depends_on_precision else {}
        key = (replace(candidate, thresholds=Thresholds(masks=candidate.thresholds.masks), precision=precision), plan)
        if self._last is None or self._last[0] != key:
            self._last = key, self._compress(candidate, plan)
        return self._last[1]

    def _compress(self, candidate: Candidate, plan: RecoveryPlan) -> CompressedNetwork:
        source = self.recovery.source if plan.recovers else self.context.network
        network = self._space.apply(source, candidate)
        history = self.context.settings.model_dump_json(exclude={"final"})
        if plan.recovers:
            self.recovery.recover(network, candidate.channels, candidate.patterns)
        trained = Fitted()
        if plan.finetune is not None:
            trained = self._finetune(network, candidate, plan.finetune, history)
            history += plan.finetune.model_dump_json()
        move_masks(network, candidate.thresholds.masks)  # cached weights may have another version's thresholds
        ranges = self._ranges(network, plan)
        if plan.qat is not None and self.context.int8 is not None:
            learned = train_int8_kept(self.context, self.context.int8, network, candidate, plan.qat, history)
            return CompressedNetwork(network, plan, {**ranges, **learned.ranges}, learned.grids, trained)
        grids = self._rounding.learn(network, candidate, ranges, plan.is_pruned) if plan.learns_rounding else NO_GRIDS
        return CompressedNetwork(network, plan, ranges, grids, trained)

    def _finetune(self, network: ExitNetwork, candidate: Candidate, settings: FinetuneSection, history: str) -> Fitted:
        images = recovery_images(self.context.train, self.context.settings.images)
        source = self.recovery.source
        channels, patterns = candidate.channels, candidate.patterns
        return finetune_kept(self.context, network, channels, settings, images, history, patterns, source)

    def _ranges(self, network: ExitNetwork, plan: RecoveryPlan) -> Ranges:
        """Returns the activation ranges of the network that the candidate was cut from; its own in another form."""
        if network.removed_blocks or network.input_size:
            return {**self._builder.read_ranges(network, self._calibration), **self.recovery.ranges}
        is_recovery_source = plan.recovers and self.recovery.source is not self.context.network
        return self._source_ranges if is_recovery_source else self._builder.ranges

    @cached_property
    def _source_ranges(self) -> Ranges:
        measured: Mapping[str, Any] = self._builder.read_ranges(self.recovery.source, self._calibration)
        return {**measured, **self.recovery.ranges}

    def _is_pruned(self, candidate: Candidate) -> bool:
        form = candidate.removed_blocks or candidate.input_size
        return bool(form or candidate.patterns or self._space.sparsity.kept(candidate.channels))

    def _trains_int8(self, candidate: Candidate) -> bool:
        """Returns whether it has int8 layers and the study asks for quantization-aware training."""
        return self.context.int8 is not None and "int8" in candidate.precision.values()
