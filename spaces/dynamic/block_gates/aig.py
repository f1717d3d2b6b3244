"""The gate of ConvNet-AIG: the mean of each channel and two small linear layers."""

from torch import Tensor, nn

from spaces.dynamic.block_gates.base import OPEN_BIAS

_HIDDEN = 16


class AigGate(nn.Module):
    """Global average pooling, a linear layer to 16 features, and one to the logit.

    The original has two logits, of which only the difference matters; the last layer here returns that difference.
    Source: Veit & Belongie, Convolutional Networks with Adaptive Inference Graphs, 2018.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.reduce = nn.Linear(channels, _HIDDEN)
        self.relu = nn.ReLU()
        self.decide = nn.Linear(_HIDDEN, 1)
        nn.init.constant_(self.decide.bias, OPEN_BIAS)

    def forward(self, features: Tensor) -> Tensor:
        """Returns logits `(n, 1)` for features `(n, channels, h, w)`."""
        logits: Tensor = self.decide(self.relu(self.reduce(self.flatten(self.pool(features)))))
        return logits
