"""A residual network small enough to train in a second, in which blocks may be skipped."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spaces.dynamic.block_gates import BLOCK_GATES
from spaces.dynamic.exit_network import ExitHead, ExitNetwork

BLOCKS = ("first", "second", "last")


class Block(nn.Module):
    """Two convolutions around which the input passes, unless they change its shape."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu2(self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x))))) + self.shortcut(x))


class SkippableNetwork(nn.Module):
    """Two blocks in a row that may be skipped, one that halves the resolution, and one more."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.first, self.second = Block(8, 8), Block(8, 8)
        self.down, self.last = Block(8, 16, 2), Block(16, 16)
        self.pool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.classifier = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(self.second(self.first(self.stem(x))))
        return self.classifier(self.flatten(self.pool(self.last(x))))


def network() -> nn.Module:
    return SkippableNetwork()


def gated(blocks: Sequence[str] = BLOCKS, exits: Sequence[str] = (), kind: str = "aig", seed: int = 0) -> ExitNetwork:
    """Returns a network whose gates are of different minds about different images, in evaluation mode."""
    torch.manual_seed(seed)
    trunk = SkippableNetwork()
    for norm in trunk.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean, 0, 0.1)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
    widths = {"stem": 8, "first": 8, "second": 8, "down": 16, "last": 16}
    gates = {block: BLOCK_GATES[kind](widths[block]) for block in blocks}
    heads = [ExitHead(widths[after], 4, 2) for after in exits]
    made = ExitNetwork(trunk, exits, heads, gates).eval()
    images = torch.randn(64, 1, 8, 8)
    with torch.no_grad():
        for each, logits in zip(gates.values(), made(images)[len(exits) : -1], strict=True):
            spread = (logits.max() - logits.min()).item()
            each.decide.weight.mul_(4 / spread)
            each.decide.bias.copy_((each.decide.bias - logits.median()) * 4 / spread)
    return made


STUDY = """
name = "skippable"
question = "Which blocks does which image need?"
budget = ["latency<1000%"]
model.source = "tests.helpers.skippable:network"
data.source = "tests.helpers.tiny:splits"
training = {epochs = 2, batch = 50, learning_rate = 0.05}
exits = {after = ["second"], grid = 2, epochs = 5}
skips = {blocks = "all", epochs = 2, batch = 50}
target = {batch = 4}
recovery = {level = "bn", images = 64}
search = {trials = 4}
"""
