"""No recovery: what pruning alone leaves."""

from collections.abc import Mapping

from evaluators.quantization.int8 import Ranges
from search.recovery.base import NO_PATTERNS, NO_RANGES, Ground
from spaces.dynamic.exit_network import ExitNetwork


class Nothing:
    """Leaves weights and statistics as the dense network had them."""

    effort = "none"
    ranges: Ranges = NO_RANGES

    def __init__(self, ground: Ground) -> None:
        self.source = ground.network

    def recover(
        self,
        network: ExitNetwork,
        channels: Mapping[str, int],
        patterns: Mapping[str, str] = NO_PATTERNS,
    ) -> None:
        """Does nothing."""
