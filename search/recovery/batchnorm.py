"""Recomputes batch norm statistics: the cheapest recovery, and a part of every other."""

from collections.abc import Mapping
from functools import cached_property
from typing import ClassVar

from evaluators.quantization.int8 import Ranges
from search.recovery.base import NO_PATTERNS, NO_RANGES, RecoveryContext
from search.training.batchnorm import InputStatistics, check_images, correct_statistics, norm_inputs, recovery_images
from search.training.loop import Fitted
from spaces.dynamic.exit_network import ExitNetwork
from spaces.pruning.groups import dropped_positions


class BatchNormRecovery:
    """Recomputes the batch norm statistics of a pruned network on some training images."""

    trains_per_candidate: ClassVar[bool] = False
    shares_weights: ClassVar[bool] = False

    effort = "bn"
    ranges: Ranges = NO_RANGES
    trained = Fitted()

    def __init__(self, context: RecoveryContext) -> None:
        self.source = context.network
        self._context = context
        self._images = recovery_images(context.train, context.settings.images)
        self._check = check_images(context.train, context.settings.images)

    def recover(
        self,
        network: ExitNetwork,
        channels: Mapping[str, int],
        patterns: Mapping[str, str] = NO_PATTERNS,  # noqa: ARG002
    ) -> None:
        """Corrects the running statistics of batch norms whose inputs differ from the source's."""
        sparsity = self._context.sparsity
        gone = dropped_positions(sparsity.groups, sparsity.kept(channels))
        dropped = {path: axes["out"] for path, axes in gone.items() if "out" in axes}
        correct_statistics(network, self._source_inputs, dropped, self._images, self._check)

    @cached_property
    def _source_inputs(self) -> "Mapping[str, InputStatistics]":
        """Statistics of the inputs of the source's batch norms on the same images."""
        return norm_inputs(self.source, self._images)
