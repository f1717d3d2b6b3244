"""The protocol of block gates."""

from typing import Protocol

from torch import nn

OPEN_BIAS = 1.9
"""The initial logit of gates: a probability of 87% to run the block."""


class BlockGate(Protocol):
    '''Returns an untrained gate: usually a class, registered by a line of `spaces.dynamic.block_gates.BLOCK_GATES`.

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
        """Returns a gate for feature maps with this number of channels.

        The gate maps features `(n, channels, h, w)` to logits `(n, 1)`, the log-odds that the block is run. Its layers
        must be modules that are called once each, because they are pruned with the network's channels.
        """
        ...
