"""SkipNet's smaller feed-forward gate: one convolution, pooled."""

from torch import Tensor, nn

from spaces.dynamic.block_gates.base import OPEN_BIAS


class SkipNetGate(nn.Module):
    """A 3x3 convolution with stride 2, global average pooling, and a linear layer to the logit.

    It uses the positions of features, and costs an eighth of a block of two 3x3 convolutions.
    Source: Wang et al., SkipNet: Learning Dynamic Routing in Convolutional Networks, 2018, FFGate-II.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.decide = nn.Linear(channels, 1)
        nn.init.constant_(self.decide.bias, OPEN_BIAS)

    def forward(self, features: Tensor) -> Tensor:
        """Returns logits `(n, 1)` for features `(n, channels, h, w)`."""
        logits: Tensor = self.decide(self.flatten(self.pool(self.relu(self.norm(self.conv(features))))))
        return logits
