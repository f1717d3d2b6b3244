"""The CIFAR ResNet-20 whose shortcuts have no weights."""

import torch.nn.functional as F
from torch import Tensor, nn


class SubsampledShortcut(nn.Module):
    """Takes every second pixel and pads the channels with zeros, half of them on each side.

    Source: He et al., Deep Residual Learning for Image Recognition, 2016 (shortcut option A).
    """

    def __init__(self, added_channels: int) -> None:
        super().__init__()
        self.padding = added_channels // 2

    def forward(self, x: Tensor) -> Tensor:
        """Returns `(n, c + added_channels, h / 2, w / 2)` for `x` of shape `(n, c, h, w)`."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around which the input passes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1:
            self.shortcut = SubsampledShortcut(out_channels - in_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Returns `(n, out_channels, h / stride, w / stride)` for `x` of shape `(n, in_channels, h, w)`."""
        hidden = self.relu1(self.bn1(self.conv1(x)))
        out: Tensor = self.relu2(self.bn2(self.conv2(hidden)) + self.shortcut(x))
        return out


class ResNet20(nn.Module):
    """Three layers of three blocks, 16, 32 and 64 channels wide, with the parameter names of published weights."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = self._layer(16, 16, stride=1)
        self.layer2 = self._layer(16, 32, stride=2)
        self.layer3 = self._layer(32, 64, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(64, classes)

    @staticmethod
    def _layer(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            BasicBlock(in_channels, out_channels, stride),
            BasicBlock(out_channels, out_channels, 1),
            BasicBlock(out_channels, out_channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits `(n, classes)` for images `(n, 3, 32, 32)`."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(self.flatten(self.pool(x)))
        return logits


def resnet20() -> nn.Module:
    """Returns an untrained ResNet-20 for three colour channels and ten classes."""
    return ResNet20()
