"""A residual network for grey scenes, on which depth, width and the size of the input may vary."""

from torch import Tensor, nn

from studies.digits.model import BasicBlock


class SceneNetwork(nn.Module):
    """A stem that halves the resolution, and three stages of basic blocks, 32, 64 and 128 channels wide.

    Every block but the first of the second and of the third stage returns its input's shape. The features are pooled
    globally, so images may have any height and width from 16 on.

    Args:
        classes: number of classes.
        blocks: in each stage.
    """

    def __init__(self, classes: int = 10, blocks: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.relu = nn.ReLU()
        self.stage1 = _stage(32, 32, 1, blocks)
        self.stage2 = _stage(32, 64, 2, blocks)
        self.stage3 = _stage(64, 128, 2, blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits `(n, classes)` for images `(n, 1, h, w)`."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.stage3(self.stage2(self.stage1(x)))
        logits: Tensor = self.classifier(self.flatten(self.pool(x)))
        return logits


def _stage(in_channels: int, out_channels: int, stride: int, blocks: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))


def resnet() -> nn.Module:
    """Returns the untrained network for ten classes."""
    return SceneNetwork()
