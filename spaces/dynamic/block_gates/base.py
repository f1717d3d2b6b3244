"""What the gates of blocks have in common."""

from typing import Protocol

from torch import nn

OPEN_BIAS = 1.9
"""Gates start with this logit, which is a probability of 87% to run the block."""


class BlockGate(Protocol):
    """Makes an untrained gate."""

    def __call__(self, channels: int) -> nn.Module:
        """Returns a gate for feature maps of so many channels.

        It maps features `(n, channels, h, w)` to logits `(n, 1)`: how much more likely the block is run than skipped.
        """
        ...
