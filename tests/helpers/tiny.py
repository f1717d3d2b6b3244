"""A network and images small enough to train in a second, with every kind of layer that slicing has to get right."""

from collections import OrderedDict

import numpy as np
import torch
from torch import Tensor, nn

from evaluators.data import LabelledImages, Splits
from spaces.channels import SparsitySpace
from spaces.dynamic.exit_network import ExitNetwork
from spaces.pruning.criteria import CRITERIA
from spaces.pruning.criteria.base import Evidence
from spaces.pruning.groups import ChannelGroup


class TinyNetwork(nn.Module):
    """A residual block, a depthwise convolution, max pooling, and a linear layer behind a flattened feature map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.inner = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU())
        self.outer = nn.Sequential(nn.Conv2d(24, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        self.join = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.depthwise = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16))
        self.pointwise = nn.Sequential(nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.shrink = nn.AdaptiveAvgPool2d(2)
        self.flatten = nn.Flatten()
        self.hidden = nn.Linear(32 * 4, 16)
        self.act = nn.ReLU()
        self.classifier = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.pool(self.join(self.outer(self.inner(x)) + x))
        x = self.pointwise(self.depthwise(x))
        return self.classifier(self.act(self.hidden(self.flatten(self.shrink(x)))))


def network() -> nn.Module:
    return TinyNetwork()


def short() -> nn.Module:
    """Returns a network of two layers whose feature map an exit may read."""
    layers = {"pool": nn.Sequential(nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU()), "shrink": nn.AdaptiveAvgPool2d(2)}
    return nn.Sequential(OrderedDict(layers | {"flatten": nn.Flatten(), "classifier": nn.Linear(64, 4)}))


def randomized(seed: int = 0) -> nn.Module:
    """Returns a network whose batch statistics are not the trivial ones, in evaluation mode."""
    torch.manual_seed(seed)
    made = TinyNetwork()
    generator = torch.Generator().manual_seed(seed)
    for norm in made.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean = torch.randn(norm.num_features, generator=generator) * 0.1
            norm.running_var = torch.rand(norm.num_features, generator=generator) + 0.5
            norm.weight.data = torch.rand(norm.num_features, generator=generator) + 0.5
            norm.bias.data = torch.randn(norm.num_features, generator=generator) * 0.1
    return made.eval()


def sparsity_space(network: ExitNetwork, groups: list[ChannelGroup], step: int, minimum: float) -> SparsitySpace:
    """Returns the space in which channels are ranked by their L2 norms."""
    nothing = Evidence(torch.empty(0), torch.empty(0))
    return SparsitySpace(groups, CRITERIA["l2"](network, groups, nothing), step, minimum)


def splits() -> Splits:
    """Returns bars in one of four places, under noise."""
    rng = np.random.default_rng(0)

    def make(count: int) -> LabelledImages:
        labels = rng.integers(0, 4, count)
        images = rng.normal(0, 0.6, (count, 1, 8, 8)).astype(np.float32)
        for image, label in zip(images, labels, strict=True):
            image[0, 2 * label : 2 * label + 2] += 1.0
        return LabelledImages(images, labels.astype(np.int64))

    return Splits(make(400), make(40), make(80), make(80), classes=4)


def no_network() -> nn.Module:
    raise RuntimeError("this factory is broken on purpose")


STUDY = """
name = "tiny"
question = "Which version of the tiny network is worth deploying?"
budget = ["latency<1000%", "size<80%"]
model.source = "tests.helpers.tiny:network"
data.source = "tests.helpers.tiny:splits"
training = {epochs = 4, batch = 50, learning_rate = 0.05}
exits = {after = ["pool"], grid = 2, epochs = 10}
target = {batch = 4}
recovery = {level = "bn", images = 64}
search = {trials = 12}
"""
