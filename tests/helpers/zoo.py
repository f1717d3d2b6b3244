"""Tiny networks, each with one habit of a well-known architecture that makes compression hard."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class Classifier(nn.Module):
    """A stem, a body that subclasses give, and a linear layer on pooled features."""

    def __init__(self, body: nn.Module, channels: int, stem: int = 16) -> None:
        super().__init__()
        self.stem = conv(3, stem)
        self.body = body
        self.classifier = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.body(self.stem(x)).mean((2, 3)))


class OptionA(nn.Module):
    """A CIFAR ResNet's block: the shortcut subsamples, and pads the channels with zeros on both sides."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.inner = conv(inputs, outputs, stride=2)
        self.outer = nn.Sequential(nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs))
        self.quarter = outputs // 4

    def forward(self, x: Tensor) -> Tensor:
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.quarter, self.quarter))
        return F.relu(self.outer(self.inner(x)) + shortcut)


class Shuffle(nn.Module):
    """ShuffleNet's unit: half of the channels go through, then both halves are dealt like cards."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(conv(half, half, 1), conv(half, half, groups=half), conv(half, half, 1))

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = x.chunk(2, 1)
        x = torch.cat([kept, self.branch(changed)], 1)
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class Dense(nn.Module):
    """DenseNet's layers: a batch norm first, and everything that came before as input."""

    def __init__(self, channels: int, growth: int = 8) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels + index * growth) for index in range(3))
        self.layers = nn.ModuleList(nn.Conv2d(channels + index * growth, growth, 3, 1, 1) for index in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = torch.cat([x, layer(F.relu(norm(x)))], 1)
        return x


class SqueezeExcite(nn.Module):
    """MobileNetV3's block: depthwise, a gate per channel, hard activations."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(channels, 32, 1), nn.BatchNorm2d(32), nn.Hardswish())
        self.depthwise = nn.Sequential(nn.Conv2d(32, 32, 5, 2, 2, groups=32), nn.BatchNorm2d(32))
        self.reduce, self.restore = nn.Conv2d(32, 8, 1), nn.Conv2d(8, 32, 1)
        self.project = nn.Conv2d(32, 24, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.expand(x))
        gate = F.hardsigmoid(self.restore(F.relu(self.reduce(F.adaptive_avg_pool2d(x, 1)))))
        return self.project(x * gate)


class Tokens(nn.Module):
    """ConvNeXt's block: linear layers on channels that come last, behind a LayerNorm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 32), nn.GELU(), nn.Linear(32, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


class Twice(nn.Module):
    """One convolution that runs twice, with a batch norm of its own for each time."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shared = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.first, self.second = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.shared(F.relu(self.first(self.shared(x)))))


def padded(inputs: int, outputs: int, kernel: int, padding: str, dilation: int = 1) -> nn.Sequential:
    """Returns a convolution whose padding is a word, its norm and its activation."""
    convolution = nn.Conv2d(inputs, outputs, kernel, padding=padding, dilation=dilation)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


class Head(nn.Module):
    """Pooling to a grid that does not divide the features, and a batch norm between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 16)
        self.pool = nn.AdaptiveAvgPool2d(3)
        self.hidden, self.norm, self.classifier = nn.Linear(144, 24), nn.BatchNorm1d(24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.relu(self.norm(self.hidden(self.pool(self.stem(x)).flatten(1)))))


class Unexportable(nn.Module):
    """Something that ONNX has no operator for."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


NETWORKS = {
    "option-a": lambda: Classifier(nn.Sequential(OptionA(16, 32), OptionA(32, 64)), 64),
    "shuffle": lambda: Classifier(nn.Sequential(Shuffle(16), Shuffle(16)), 16),
    "grouped": lambda: Classifier(nn.Sequential(conv(16, 32, 1), conv(32, 32, groups=4), conv(32, 24, 1)), 24),
    "concat": lambda: Classifier(Dense(16), 40),
    "squeeze-excite": lambda: Classifier(SqueezeExcite(16), 24),
    "tokens": lambda: Classifier(nn.Sequential(Tokens(16), conv(16, 24)), 24),
    "twice": lambda: Classifier(nn.Sequential(Twice(16), conv(16, 24)), 24),
    "head": Head,
    "padding": lambda: Classifier(
        nn.Sequential(padded(16, 24, 4, "same"), padded(24, 24, 3, "same", 2), padded(24, 24, 3, "valid")), 24
    ),
}


def build(name: str) -> nn.Module:
    """Returns a network with random weights and the batch statistics of noise, in evaluation mode."""
    torch.manual_seed(0)
    made = NETWORKS[name]()
    for module in made.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.2)
            module.momentum = None
    with torch.no_grad():
        made.train()(torch.randn(16, 3, 8, 8))
    return made.eval()
