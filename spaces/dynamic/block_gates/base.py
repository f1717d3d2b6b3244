"""What the gates of blocks have in common."""

from typing import Protocol

from torch import nn

OPEN_BIAS = 1.9
"""Gates start with this logit, which is a probability of 87% to run the block."""


class BlockGate(Protocol):
    '''Makes an untrained gate: mostly a class, named by a line of `spaces.dynamic.block_gates.BLOCK_GATES`.

    Example:
        """The largest value of each channel and one linear layer."""

        from torch import Tensor, nn

        from spaces.dynamic.block_gates.base import OPEN_BIAS


        class PeakGate(nn.Module):
            """Global maximum pooling and a linear layer to the logit."""

            def __init__(self, channels: int) -> None:
                super().__init__()
                self.pool = nn.AdaptiveMaxPool2d(1)
                self.flatten = nn.Flatten()
                self.decide = nn.Linear(channels, 1)
                nn.init.constant_(self.decide.bias, OPEN_BIAS)

            def forward(self, features: Tensor) -> Tensor:
                """Returns logits `(n, 1)` for features `(n, channels, h, w)`."""
                logits: Tensor = self.decide(self.flatten(self.pool(features)))
                return logits
    '''

    def __call__(self, channels: int) -> nn.Module:
        """Returns a gate for feature maps of so many channels.

        It maps features `(n, channels, h, w)` to logits `(n, 1)`: how much more likely the block is run than skipped.
        Its layers are cut with the network's channels, so they are modules, each called once.
        """
        ...
