"""How many residual blocks each stage of a network keeps, as dimensions; blocks that are left out are not deployed."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from spaces.dimensions import Integer, Value
from spaces.dynamic.exit_network import ExitNetwork
from spaces.dynamic.skippable_blocks import removable_blocks

PREFIX = "depth."

Proof = Callable[[ExitNetwork], object | None]
"""Returns why a shortened network cannot be used; None if it can."""
Report = Callable[[int, int], None]
"""Called with the number of parts that are done, and of all."""
_WORST = 100.0
"""The damage, in nats, of a network whose answers are no numbers, and of any that is worse."""
_ROUNDS = 6
"""How often the damage of the blocks of a stage is measured, at most."""


@dataclass(frozen=True)
class BlockStage:
    """Residual blocks of one shape, each of which can be left out because it returns its input's shape.

    Args:
        name: the path of the module that holds them, or the paths of the blocks.
        blocks: their paths, in the order in which they run.
        leaving: the same, in the order in which they are left out: the least damage first.
        damage: what the network's answers lose when the first one is left out, the first two, and so on, in nats.
    """

    name: str
    blocks: tuple[str, ...]
    leaving: tuple[str, ...] = ()
    damage: tuple[float, ...] = ()


class DepthSpace:
    """The number of blocks that each stage keeps; those that do the least damage are left out first.

    Blocks whose shortcut changes the shape are no part of a stage: they always stay.

    Args:
        stages: with their order of leaving.
        minimum: the smallest share of its blocks that a stage may keep, rounded down.
    """

    def __init__(self, stages: Sequence[BlockStage], minimum: float = 0.0) -> None:
        self.stages = tuple(stages)
        self._minimum = minimum

    @property
    def description(self) -> dict[str, list[str]]:
        """Everything that determines shortened networks: for each stage the blocks that may go, in their order."""
        return {stage.name: list(stage.leaving[: len(stage.blocks) - self._fewest(stage)]) for stage in self.stages}

    def dimensions(self) -> dict[str, Integer]:
        """Returns one dimension per stage that may lose blocks: how many of them stay."""
        return {
            PREFIX + stage.name: Integer(self._fewest(stage), len(stage.blocks))
            for stage in self.stages
            if self._fewest(stage) < len(stage.blocks)
        }

    def _fewest(self, stage: BlockStage) -> int:
        return math.floor(self._minimum * len(stage.blocks) + 1e-9)

    def read(self, values: Mapping[str, Value]) -> dict[str, int]:
        """Returns how many blocks each stage keeps.

        Raises:
            KeyError: a dimension has no value.
        """
        free = self.dimensions()
        return {
            stage.name: int(values[PREFIX + stage.name]) if PREFIX + stage.name in free else len(stage.blocks)
            for stage in self.stages
        }

    def removed(self, kept: Mapping[str, int]) -> tuple[str, ...]:
        """Returns the paths of the blocks that are left out, for the number of blocks that each stage keeps."""
        return tuple(
            path
            for stage in self.stages
            for path in stage.leaving[: len(stage.blocks) - kept.get(stage.name, len(stage.blocks))]
        )


ALL_BLOCKS = DepthSpace(())
"""No block is left out."""


def find_stages(network: ExitNetwork, image: Tensor, proof: Proof = lambda _: None) -> list[BlockStage]:
    """Returns the stages of a network: its residual blocks that can be left out, those of one shape and place together.

    Each block has been left out: the shortened network ran, and passed `proof`. Blocks with a cut point at their end or
    inside stay, and blocks that share weights with what lies outside of them.

    Args:
        network: the dense network, in evaluation mode.
        image: one input, `(1, c, h, w)`.
        proof: a further test of a shortened network, such as whether its ONNX file has the same outputs.
    """
    removable = removable_blocks(network.trunk, image, network.cut_points)
    able = {path: shape for path, shape in removable.items() if _has_its_own_weights(network.trunk, path)}
    proven = _proven(network, list(able), proof)
    together: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for path in proven:
        together.setdefault((path.rpartition(".")[0], able[path]), []).append(path)
    parents = [parent for parent, _ in together]
    return [
        BlockStage(parent if parent and parents.count(parent) == 1 else _name(blocks), tuple(blocks))
        for (parent, _), blocks in together.items()
    ]


def _has_its_own_weights(trunk: nn.Module, path: str) -> bool:
    """Returns whether no parameter or buffer of a block is used elsewhere in the trunk too."""
    inside = f"{path}."
    tensors = [*trunk.named_parameters(remove_duplicate=False), *trunk.named_buffers(remove_duplicate=False)]
    own = {id(tensor) for name, tensor in tensors if name.startswith(inside)}
    return own.isdisjoint(id(tensor) for name, tensor in tensors if not name.startswith(inside))


def _name(blocks: Sequence[str]) -> str:
    last = blocks[-1].rpartition(".")[2]
    return blocks[0] if len(blocks) == 1 else f"{blocks[0]}-{last}"


def _proven(network: ExitNetwork, blocks: list[str], proof: Proof) -> list[str]:
    """Returns the blocks without which the network passes the proof, each alone and all together."""
    if not blocks or proof(shortened(network, blocks)) is None:
        return blocks
    alone = [block for block in blocks if proof(shortened(network, [block])) is None]
    return alone if len(alone) < len(blocks) and alone and proof(shortened(network, alone)) is None else []


def shortened(network: ExitNetwork, blocks: Iterable[str]) -> ExitNetwork:
    """Returns the network without some of its blocks, which shares the weights of all others with it.

    In place of a block there is an identity; gates around it are left out.

    Args:
        network: with or without gates.
        blocks: paths of residual blocks in the trunk.
    """
    gone = set(blocks)
    if not gone:
        return network
    trunk = _replaced(network.trunk, gone)
    gates = {block: gate for block, gate in network.gates.items() if block not in gone}
    made = ExitNetwork(trunk, network.cut_points, list(network.exits.values()), gates)
    made.input_size = network.input_size
    made.removed_blocks = tuple(sorted({*network.removed_blocks, *gone}))
    return made.train(network.training)


def _replaced(module: nn.Module, paths: set[str]) -> nn.Module:
    """Returns a module with identities at some paths; modules on the way there are copies, all others are shared."""
    copied = module.__new__(type(module))
    copied.__dict__ = dict(module.__dict__)
    children = dict(module._modules)
    for name in {path.partition(".")[0] for path in paths}:
        inner = {path.partition(".")[2] for path in paths if path.partition(".")[0] == name}
        child = children[name]
        children[name] = nn.Identity() if "" in inner or child is None else _replaced(child, inner)
    copied.__dict__["_modules"] = children
    return copied


def damage(network: ExitNetwork, dense: Tensor, images: Tensor) -> float:
    """Returns what the answers of a shortened network differ by from those of the dense one, in nats.

    It is the mean Kullback-Leibler divergence of its probabilities. Batch normalisation uses the statistics of these
    images, as it will after recovery.

    Args:
        network: without some blocks, in evaluation mode.
        dense: logits of the dense network for the images, `(n, classes)`.
        images: `(n, c, h, w)`.
    """
    with torch.no_grad(), _batch_statistics(network):
        logits = network.trunk(images)
    divergence = nn.functional.kl_div(
        logits.log_softmax(1), dense.log_softmax(1), reduction="batchmean", log_target=True
    )
    return min(float(divergence.nan_to_num(_WORST, _WORST)), _WORST)


@contextmanager
def _batch_statistics(network: nn.Module) -> Iterator[None]:
    """Lets batch normalisation in evaluation mode use the statistics of each batch; its running ones are kept."""
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    running = [(norm.running_mean, norm.running_var) for norm in norms]
    for norm in norms:
        norm.running_mean = None
        norm.running_var = None
    try:
        yield
    finally:
        for norm, (mean, variance) in zip(norms, running, strict=True):
            norm.running_mean = mean
            norm.running_var = variance


def measurements(blocks: int) -> int:
    """Returns how many forward passes `ordered_by_damage` needs for a stage of so many blocks."""
    at_once = math.ceil(blocks / _ROUNDS)
    return sum(range(blocks, 0, -at_once)) + blocks


def ordered_by_damage(
    network: ExitNetwork, stages: Sequence[BlockStage], images: Tensor, report: Report = lambda _done, _total: None
) -> list[BlockStage]:
    """Returns the stages with the order in which their blocks are left out, by measured damage.

    The block that does the least damage goes first; then the damage of the others is measured again without it. In a
    stage of many blocks several go before it is measured again, so that there are at most `_ROUNDS` rounds.

    Args:
        network: the dense network, in evaluation mode.
        stages: in any order of leaving.
        images: to measure on, `(n, c, h, w)`.
        report: called with the number of stages that are done, and of all.
    """
    images = torch.cat([images, images]) if len(images) == 1 else images  # one image may have one value per channel
    with torch.no_grad(), _batch_statistics(network):
        dense = network.trunk(images)
    ordered = []
    for done, stage in enumerate(stages):
        report(done, len(stages))
        ordered.append(_ordered(stage, lambda blocks: damage(shortened(network, blocks), dense, images)))
    report(len(stages), len(stages))
    return ordered


def _ordered(stage: BlockStage, damage_without: Callable[[Sequence[str]], float]) -> BlockStage:
    at_once = math.ceil(len(stage.blocks) / _ROUNDS)
    gone: list[str] = []
    costs: list[float] = []
    while len(gone) < len(stage.blocks):
        left = [block for block in stage.blocks if block not in gone]
        found = {block: damage_without([*gone, block]) for block in left}
        for block in sorted(left, key=found.__getitem__)[:at_once]:
            gone.append(block)
            costs.append(damage_without(gone))
    rising = [max(costs[: index + 1]) for index in range(len(costs))]  # an estimate that falls again is noise
    return replace(stage, leaving=tuple(gone), damage=tuple(rising))
