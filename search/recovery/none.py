"""No recovery after pruning."""

from collections.abc import Mapping
from typing import ClassVar

from evaluators.quantization.int8 import Ranges
from search.recovery.base import NO_PATTERNS, NO_RANGES, RecoveryContext
from search.training.loop import Fitted
from spaces.dynamic.exit_network import ExitNetwork


class NoRecovery:
    """Leaves weights and statistics as in the dense network."""

    trains_per_candidate: ClassVar[bool] = False
    shares_weights: ClassVar[bool] = False

    effort = "none"
    ranges: Ranges = NO_RANGES
    trained = Fitted()

    def __init__(self, context: RecoveryContext) -> None:
        self.source = context.network

    def recover(
        self,
        network: ExitNetwork,
        channels: Mapping[str, int],
        patterns: Mapping[str, str] = NO_PATTERNS,
    ) -> None:
        """Does nothing."""
