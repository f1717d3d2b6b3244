"""The network. Put your own here: any function that returns a torch.nn.Module will do."""

from torch import Tensor, nn


class SmallNetwork(nn.Module):
    """Six convolutions and a linear layer."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(*_layer(1, 8, 2), *_layer(8, 8, 1))
        self.stage2 = nn.Sequential(*_layer(8, 16, 1), *_layer(16, 16, 1))
        self.stage3 = nn.Sequential(*_layer(16, 32, 2), *_layer(32, 32, 1))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(32, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Returns one logit a class, `(n, classes)`, for images `(n, 1, h, w)`."""
        features = self.stage3(self.stage2(self.stage1(images)))
        logits: Tensor = self.classifier(self.flatten(self.pool(features)))
        return logits


def build(num_classes: int = 10) -> nn.Module:
    """Returns the network; `num_classes`, where a factory takes it, is the data's number of classes."""
    return SmallNetwork(num_classes)


def _layer(in_channels: int, out_channels: int, stride: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(out_channels), nn.ReLU()
