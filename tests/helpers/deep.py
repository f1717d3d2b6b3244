"""Networks with stages of residual blocks, and a study in which whole blocks are left out."""

import torch
from torch import Tensor, nn

from evaluators.artifact_builder import ArtifactBuilder
from evaluators.runtimes.base import Runtime
from evaluators.runtimes.onnxruntime_cpu import OnnxRuntime
from spaces.depth import BlockStage, DepthSpace, find_stages, ordered_by_damage
from spaces.dynamic.exit_network import ExitHead, ExitNetwork
from spaces.dynamic.skippable_blocks import removable_blocks
from spaces.testing import Block, pictures

REMOVABLE = ("stage1.0", "stage1.1", "stage1.2", "stage2.1", "stage2.2")
"""The blocks of `Stages` that return their input's shape."""


class Stages(nn.Module):
    """Three blocks of one shape, then one that halves the resolution and two that keep it; four logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.stage1 = nn.Sequential(Block(8, 8), Block(8, 8), Block(8, 8))
        self.stage2 = nn.Sequential(Block(8, 16, 2), Block(16, 16), Block(16, 16))
        self.pool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.classifier = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits `(n, 4)`."""
        return self.classifier(self.flatten(self.pool(self.stage2(self.stage1(self.stem(x))))))


class PreActivation(nn.Module):
    """A block that normalises its input first, so that no layer reads the stream itself."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.relu = nn.BatchNorm2d(channels), nn.ReLU()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Returns feature maps of the input's shape."""
        return x + self.conv(self.relu(self.norm(x)))


class Normalising(nn.Module):
    """A stem, two blocks that normalise first, and a convolution that reads the stream behind them; four logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.GELU())
        self.blocks = nn.Sequential(PreActivation(8), PreActivation(8))
        self.down, self.relu = nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU()
        self.pool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.classifier = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits `(n, 4)`."""
        return self.classifier(self.flatten(self.pool(self.relu(self.down(self.blocks(self.stem(x)))))))


def network() -> nn.Module:
    return Stages()


def normalising() -> nn.Module:
    return Normalising()


def settled(trunk: nn.Module, seed: int = 0) -> nn.Module:
    """Returns the network with batch statistics that are not the trivial ones, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    for norm in trunk.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean = torch.randn(norm.num_features, generator=generator) * 0.1
            norm.running_var = torch.rand(norm.num_features, generator=generator) + 0.5
            norm.weight.data = torch.rand(norm.num_features, generator=generator) * 0.5 + 0.5
            norm.bias.data = torch.randn(norm.num_features, generator=generator) * 0.1
    return trunk.eval()


def stages(seed: int = 0) -> ExitNetwork:
    """Returns a `Stages` without exits, in evaluation mode."""
    torch.manual_seed(seed)
    return ExitNetwork(settled(Stages(), seed), (), ()).eval()


def with_exits(seed: int = 0) -> ExitNetwork:
    """Returns a `Stages` with exits after its stem and its second stage's first block, in evaluation mode."""
    torch.manual_seed(seed)
    heads = [ExitHead(8, 4, 2), ExitHead(16, 4, 2)]
    return ExitNetwork(settled(Stages(), seed), ["stem", "stage2.0"], heads).eval()


def builder_of(network: ExitNetwork, runtime: Runtime | None = None, images: Tensor | None = None) -> ArtifactBuilder:
    """Returns a builder of files from which any block that can go may be left out."""
    given = pictures(12) if images is None else images
    blocks = tuple(removable_blocks(network.trunk, given[:1], network.cut_points))
    return ArtifactBuilder(network, given.numpy(), runtime or OnnxRuntime(), removable=blocks)


def space_of_depth(network: ExitNetwork, minimum: float = 0.0) -> DepthSpace:
    """Returns the numbers of blocks that stages may keep, in the order of measured damage."""
    found: list[BlockStage] = find_stages(network, pictures(1))
    return DepthSpace(ordered_by_damage(network, found, pictures(16)), minimum)


STUDY = """
name = "deep"
question = "How deep has the network to be?"
budget = ["latency<1000%"]
model.source = "tests.helpers.deep:network"
data.source = "tests.helpers.tiny:splits"
training = {epochs = 2, batch = 50, learning_rate = 0.05}
exits = {after = ["stage1"], grid = 2, epochs = 5}
target = {batch = 4}
recovery = {level = "bn", images = 64, final = {versions = 0}}
search = {trials = 8}
space = {keep_blocks_at_least = 0.0}
"""
