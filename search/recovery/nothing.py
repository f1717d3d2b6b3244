"""No recovery: what pruning alone leaves."""

from collections.abc import Mapping

from search.recovery import Ground
from spaces.network import ExitNetwork


class Nothing:
    """Leaves weights and statistics as the dense network had them."""

    effort = "none"

    def __init__(self, ground: Ground) -> None:
        self.source = ground.network

    def recover(self, network: ExitNetwork, channels: Mapping[str, int]) -> None:
        """Does nothing."""
