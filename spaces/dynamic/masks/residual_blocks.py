"""Finds the residual blocks that masks can sit in: with a shortcut and a chain of convolutions."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from spaces.dynamic.cut_points import Edge
from spaces.dynamic.skippable_blocks import ModuleCall, observed
from spaces.errors import StructureError


@dataclass(frozen=True)
class Conv:
    """A convolution of a block's branch that can be masked.

    Args:
        path: its path in the trunk.
        end: the path of the batch normalisation after it, or its own path without one.
        inputs: the number of input channels.
        outputs: the number of output channels.
        size: height and width of the output.
        source: height and width of the input.
        groups: of the convolution.
    """

    path: str
    end: str
    inputs: int
    outputs: int
    size: tuple[int, int]
    source: tuple[int, int]
    groups: int


@dataclass(frozen=True)
class Site:
    """A residual block.

    Args:
        block: its path.
        channels: of its input.
        source: height and width of its input.
        size: height and width of its output.
        convs: the convolutions of its branch, in the order in which they run.
    """

    block: str
    channels: int
    source: tuple[int, int]
    size: tuple[int, int]
    convs: tuple[Conv, ...]


def find_sites(trunk: nn.Module, image: Tensor, blocks: Sequence[str] | None = None) -> tuple[Site, ...]:
    """Returns the residual blocks of a network, in the order in which they run.

    Such a block has a chain of two or more convolutions, with only normalisations and activations between them, and a
    shortcut around them to the block's output.

    Args:
        trunk: maps an image to logits, in evaluation mode.
        image: one input, `(1, c, h, w)`.
        blocks: their paths; None for all.

    Raises:
        StructureError: one of `blocks` is no residual block, or the network has none.
    """
    _, _, calls = observed(trunk, image)
    found = [site for path in calls if (site := _site(trunk, path, calls)) is not None]
    inner = [one for one in found if not any(other.block.startswith(f"{one.block}.") for other in found)]
    if blocks is None:
        if not inner:
            raise StructureError("masks sit in residual blocks of two convolutions or more, got a network without any")
        return tuple(inner)
    known = {site.block: site for site in inner}
    for path in blocks:
        if path not in known:
            able = ", ".join(known) or "none"
            raise StructureError(
                f"masks sit in residual blocks of two convolutions or more, got {path!r}; able: {able}"
            )
    return tuple(known[path] for path in known if path in set(blocks))


def _site(trunk: nn.Module, path: str, calls: dict[str, ModuleCall]) -> Site | None:
    """Returns a block's site; None if it is no residual block."""
    block = calls[path]
    inside = [name for name in calls if name.startswith(f"{path}.")]
    convs = {name: calls[name] for name in inside if isinstance(trunk.get_submodule(name), nn.Conv2d)}
    if len(convs) < 2 or block.source.ndim != 4 or block.result.ndim != 4 or block.before[0] is None:
        return None
    chain = _chain(convs, block)
    if len(chain) < 2 or not _leads(block.after, block.before, {convs[chain[-1]].after}):
        return None
    norms = {
        calls[name].before: name
        for name in inside
        if isinstance(trunk.get_submodule(name), nn.modules.batchnorm._BatchNorm)
    }
    described = tuple(_conv(trunk, name, convs[name], norms.get(convs[name].after, name)) for name in chain)
    return Site(path, block.source.shape[1], _size(block.source), _size(block.result), described)


def _chain(convs: dict[str, ModuleCall], block: ModuleCall) -> list[str]:
    """Returns the longest chain of convolutions from the block's input to its output."""
    ends = {call.after: name for name, call in convs.items()}
    before = {name: _nearest(call.before, {*ends, block.before}) for name, call in convs.items()}
    chains = []
    for edge in _nearest(block.after, {*ends, block.before}):
        chain: list[str] = []
        while edge in ends and before[ends[edge]] and len(before[ends[edge]]) == 1:
            chain.insert(0, ends[edge])
            (edge,) = before[ends[edge]]
        chains.append(chain if edge == block.before else [])
    return max(chains, key=len, default=[])


def _nearest(start: Edge, ends: set[Edge]) -> set[Edge]:
    """Returns which of some tensors a tensor is computed from, without passing through another of them."""
    nearest: set[Edge] = set()
    seen: set[Edge] = set()
    todo = [start]
    while todo:
        edge = todo.pop()
        if edge in ends:
            nearest.add(edge)
        elif edge[0] is not None and edge not in seen:
            seen.add(edge)
            todo += edge[0].next_functions
    return nearest


def _leads(start: Edge, end: Edge, without: set[Edge]) -> bool:
    """Returns whether a tensor is computed from another by a path that avoids some others."""
    return end in _nearest(start, {end, *without})


def _conv(trunk: nn.Module, path: str, call: ModuleCall, end: str) -> Conv:
    module = trunk.get_submodule(path)
    assert isinstance(module, nn.Conv2d)
    return Conv(
        path, end, module.in_channels, module.out_channels, _size(call.result), _size(call.source), module.groups
    )


def _size(features: Tensor) -> tuple[int, int]:
    height, width = features.shape[2:]
    return int(height), int(width)
