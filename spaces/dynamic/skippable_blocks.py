"""Finds the blocks that a gate may skip: blocks with an identity shortcut."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spaces.dynamic.cut_points import Edge, reaches
from spaces.errors import StructureError

_PASSING = {"AddBackward0", "ReluBackward0", "HardtanhBackward0", "CloneBackward0", "AliasBackward0"}
"""The nodes of autograd's graph that an identity shortcut may have: the addition, and a clamp after it."""
MOST = 48
"""The largest number of blocks with gates: the skipped ones are encoded in one integer."""


@dataclass(frozen=True)
class Blocks:
    """The blocks that can be skipped.

    Args:
        gated: their paths, in the order in which they run.
        others: blocks of the same classes that cannot be skipped, because their output has another shape than their
            input or they have no identity shortcut: usually those that halve the resolution.
    """

    gated: tuple[str, ...]
    others: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.gated:
            return "No blocks can be skipped: none has an identity shortcut."
        more = f"; {', '.join(self.others)} always run, having no identity shortcut" if self.others else ""
        return f"Gates around {', '.join(self.gated)}{more}."


@dataclass(frozen=True)
class ModuleCall:
    """The input and output of a module in one forward pass."""

    source: Tensor
    result: Tensor
    edges: tuple[Edge, Edge]
    versions: tuple[int, int]

    @property
    def before(self) -> Edge:
        """The input, in autograd's graph."""
        return self.edges[0]

    @property
    def after(self) -> Edge:
        """The output, in autograd's graph."""
        return self.edges[1]

    @property
    def is_changed(self) -> bool:
        """Whether the input or output was changed in place, inside the block or after it."""
        return (self.source._version, self.result._version) != self.versions


def find_blocks(trunk: nn.Module, image: Tensor) -> Blocks:
    """Returns all blocks that can be skipped, the innermost of nested ones.

    Such a block can be replaced by the identity: its output has its input's shape, both separate the network, and there
    is a path from the input to the output that only adds and clamps.

    Args:
        trunk: maps an image to logits, in evaluation mode.
        image: one input, `(1, c, h, w)`.
    """
    logits, source, seen = observed(trunk, image)
    able = [path for path in seen if _refusal(trunk, path, seen, logits, source) is None]
    gated = _innermost(able)
    kinds = tuple({type(trunk.get_submodule(path)) for path in gated} - {nn.Sequential})
    same = [path for path, module in trunk.named_modules() if kinds and isinstance(module, kinds)]
    return _few(Blocks(gated, tuple(path for path in same if path not in able)))


def removable_blocks(trunk: nn.Module, image: Tensor, cut_points: Sequence[str] = ()) -> dict[str, tuple[int, ...]]:
    """Returns the shape, `(c, h, w)`, of what each block maps that can be left out, by its path, in order.

    They are those of `find_blocks`, any number of them, but for blocks with a cut point inside or at their end: exits
    that read the same features would be one.

    Args:
        trunk: maps an image to logits, in evaluation mode.
        image: one input, `(1, c, h, w)`.
        cut_points: paths of modules after which exits sit.
    """
    logits, source, seen = observed(trunk, image)
    able = [path for path in seen if _refusal(trunk, path, seen, logits, source) is None]
    ends = {seen[path].after for path in cut_points if path in seen}
    return {
        path: tuple(seen[path].source.shape[1:])
        for path in _innermost(able)
        if seen[path].after not in ends and not any(f"{cut}.".startswith(f"{path}.") for cut in cut_points)
    }


def _innermost(paths: Sequence[str]) -> tuple[str, ...]:
    return tuple(path for path in paths if not any(other.startswith(f"{path}.") for other in paths))


def check_blocks(trunk: nn.Module, image: Tensor, paths: Sequence[str]) -> Blocks:
    """Returns the blocks with given paths, in the order in which they run.

    Raises:
        StructureError: one of them cannot be skipped, or is inside another.
    """
    logits, source, seen = observed(trunk, image)
    for path in paths:
        refusal = _refusal(trunk, path, seen, logits, source)
        if refusal is not None:
            raise StructureError(f"a gate sits around a block with an identity shortcut, got {path!r}: {refusal}")
        if any(other.startswith(f"{path}.") for other in paths):
            raise StructureError(f"gates sit around blocks that do not hold each other, got {path!r} and one in it")
    return _few(Blocks(tuple(path for path in seen if path in set(paths))))


def _few(blocks: Blocks) -> Blocks:
    if len(blocks.gated) > MOST:
        raise StructureError(f"at most {MOST} blocks have gates, got {len(blocks.gated)}; name some in [skips] blocks")
    return blocks


def observed(trunk: nn.Module, image: Tensor) -> tuple[Tensor, Tensor, dict[str, ModuleCall]]:
    """Returns the logits, their input image, and the call of each module that runs once, by path."""
    source = image.detach().clone().requires_grad_()
    begun: dict[str, tuple[Tensor, Edge, int]] = {}
    seen: dict[str, ModuleCall] = {}
    calls: dict[str, int] = {}

    def begin(path: str, args: tuple[object, ...]) -> None:
        calls[path] = calls.get(path, 0) + 1
        if len(args) == 1 and isinstance(args[0], Tensor):
            begun[path] = args[0], (args[0].grad_fn, args[0].output_nr), args[0]._version

    def finish(path: str, out: object) -> None:
        if path in begun and isinstance(out, Tensor):
            given, edge, version = begun[path]
            seen[path] = ModuleCall(given, out, (edge, (out.grad_fn, out.output_nr)), (version, out._version))

    hooks = []
    for path, module in trunk.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda _module, args, path=path: begin(path, args)))
        hooks.append(module.register_forward_hook(lambda _module, _args, out, path=path: finish(path, out)))
    try:
        with torch.enable_grad():
            logits: Tensor = trunk(source.clone())  # it may be changed in place, which a leaf may not
    finally:
        for hook in hooks:
            hook.remove()
    return logits, source, {path: one for path, one in seen.items() if path and calls[path] == 1}


def _refusal(trunk: nn.Module, path: str, seen: dict[str, ModuleCall], logits: Tensor, image: Tensor) -> str | None:
    """Returns why a block cannot be skipped; None if it can."""
    if path not in seen:
        return "no module of the network that runs once, with one tensor in and one out"
    one = seen[path]
    if one.source.ndim != 4 or one.source.shape != one.result.shape:
        return f"it maps {tuple(one.source.shape)} to {tuple(one.result.shape)}"
    before, after = one.edges
    if not any(True for _ in trunk.get_submodule(path).parameters()) or before == after:
        return "it has no weights, so that skipping it saves nothing"
    if before[0] is None or one.is_changed or not _passes(after, before):
        return "its input does not reach its output past it"
    if logits.grad_fn is None or any(reaches(logits.grad_fn, image, edge) for edge in (before, after)):
        return "it is bypassed, so that more than one tensor enters or leaves it"
    return None


def _passes(start: Edge, end: Edge) -> bool:
    """Returns whether a tensor is another one after additions and clamps only."""
    seen, todo = set(), [start]
    while todo:
        edge = todo.pop()
        if edge == end:
            return True
        node = edge[0]
        if node is not None and node not in seen and node.name() in _PASSING:
            seen.add(node)
            todo += node.next_functions
    return False
