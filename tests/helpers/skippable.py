"""The network of `spaces.testing` in which blocks may be skipped, with gates that disagree, and a study of it."""

from collections.abc import Sequence

import torch
from torch import nn

from spaces.dynamic.block_gates import BLOCK_GATES
from spaces.dynamic.exit_network import ExitHead, ExitNetwork
from spaces.testing import BLOCKS, SkippableNetwork


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
            *_, last = (module for module in each.modules() if isinstance(module, nn.Linear))
            last.weight.mul_(4 / spread)
            last.bias.copy_((last.bias - logits.median()) * 4 / spread)
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
recovery = {level = "bn", images = 64, final = {versions = 0}}
search = {trials = 4}
"""
