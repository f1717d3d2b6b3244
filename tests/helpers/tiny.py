"""The tiny network of `spaces.testing`, and images small enough to train it in a second."""

from collections import OrderedDict

import numpy as np
import torch
from torch import nn

from evaluators.data import LabelledImages, Splits
from spaces.channels import SparsitySpace
from spaces.dynamic.exit_network import ExitNetwork
from spaces.pruning.criteria import CRITERIA
from spaces.pruning.criteria.base import Evidence
from spaces.pruning.groups import ChannelGroup
from spaces.testing import TinyNetwork, randomized

__all__ = ["TinyNetwork", "randomized"]


def network() -> nn.Module:
    return TinyNetwork()


def short() -> nn.Module:
    """Returns a network of two layers whose feature map an exit may read."""
    layers = {"pool": nn.Sequential(nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU()), "shrink": nn.AdaptiveAvgPool2d(2)}
    return nn.Sequential(OrderedDict(layers | {"flatten": nn.Flatten(), "classifier": nn.Linear(64, 4)}))


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

    return Splits(make(400), make(40), make(80), make(80), classes=4, names=("top", "upper", "lower", "bottom"))


def no_network() -> nn.Module:
    raise RuntimeError("this factory is broken on purpose")


RECOVERY = 'recovery = {level = "bn", images = 64, final = {versions = 0}}'
STUDY = f"""
name = "tiny"
question = "Which version of the tiny network is worth deploying?"
budget = ["latency<1000%", "size<80%"]
model.source = "tests.helpers.tiny:network"
data.source = "tests.helpers.tiny:splits"
training = {{epochs = 4, batch = 50, learning_rate = 0.05}}
exits = {{after = ["pool"], grid = 2, epochs = 10}}
target = {{batch = 4}}
{RECOVERY}
search = {{trials = 12}}
"""
