"""Finds cut points for exits: modules whose output alone separates the image from the logits."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from spaces.errors import StructureError

Edge = tuple[Any, int]
"""A tensor in autograd's graph: the node that computed it, and the index among the node's outputs."""

EARLIEST, LATEST = 0.05, 0.9
"""The range of shares of FLOPs for exits: earlier, features say little about the class; later, exits save nothing."""
_FARTHEST = 0.2
"""The largest distance of an exit from the requested share of multiply-adds."""
_NEAR = 0.08
"""The end of a block is preferred to its inside up to this much additional distance."""


@dataclass(frozen=True)
class CutPoints:
    """Cut points for exits.

    Args:
        after: the paths of the modules after which exits sit, in the order in which they run.
        shares: the share of the network's multiply-adds up to each cut point.
        reason: why there are fewer than requested; empty if there are not.
    """

    after: tuple[str, ...]
    shares: tuple[float, ...]
    reason: str = ""

    def __str__(self) -> str:
        places = [f"{path} ({share:.0%} of the FLOPs)" for path, share in zip(self.after, self.shares, strict=True)]
        found = f"Exits after {', '.join(places)}." if places else "No exits."
        return f"{found} {self.reason}".strip() if self.reason else found

    def only(self, after: Sequence[str], reason: str) -> Self:
        """Returns the cut points after the named modules; with the reason if others are left out."""
        kept = [(path, share) for path, share in zip(self.after, self.shares, strict=True) if path in after]
        dropped = [path for path in self.after if path not in after]
        message = f"{self.reason} None after {' and '.join(dropped)}: {reason}.".strip() if dropped else self.reason
        return replace(
            self, after=tuple(path for path, _ in kept), shares=tuple(share for _, share in kept), reason=message
        )


@dataclass(frozen=True)
class _Output:
    """The output of a module in one forward pass."""

    path: str
    tensor: Tensor
    edge: Edge
    version: int
    macs: float
    rank: int


@dataclass
class _Run:
    """One forward pass of the network, with the outputs of its modules."""

    outputs: list[_Output] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)
    macs: float = 0.0


def find_cut_points(trunk: nn.Module, image: Tensor, shares: Sequence[float]) -> CutPoints:
    """Returns cut points for exits, one near each of the requested shares of the network's multiply-adds.

    A tensor separates the network if autograd cannot get from the logits back to the image without it, and if another
    image gives the same logits once the tensor is put in, because autograd does not see detached tensors. The ends of
    blocks are preferred to their insides.

    Args:
        trunk: maps an image to logits, in evaluation mode.
        image: one input, `(1, c, h, w)`.
        shares: of the multiply-adds of convolutions and linear layers, between 0 and 1.
    """
    source = image.detach().clone().requires_grad_()
    lost = "The way from the image to the logits cannot be followed"
    try:
        with torch.enable_grad():
            logits, run = _observed(trunk, source)
    except Exception as error:  # it runs without gradients, as every network that gets here has: only exits need them
        return CutPoints((), (), f"{lost}: {str(error).strip().partition(chr(10))[0] or type(error).__name__}.")
    if logits.grad_fn is None or not reaches(logits.grad_fn, source, None):
        return CutPoints((), (), f"{lost}.")
    usable = [one for one in _distinct(run, image) if EARLIEST <= one.macs / run.macs <= LATEST]
    separates: dict[str, bool] = {}
    found: dict[str, _Output] = {}
    for share in sorted(shares):
        near = [one for one in usable if abs(one.macs / run.macs - share) <= _FARTHEST]
        for one in sorted(near, key=lambda one: _distance(one, run.macs, share)):
            if one.path not in separates:
                bypassed = reaches(logits.grad_fn, source, one.edge) or _is_bypassed(trunk, one.path, image)
                separates[one.path] = not bypassed
            if separates[one.path] and one.path not in found:
                found[one.path] = one
                break
    chosen = sorted(found.values(), key=lambda one: one.macs)
    reason = ""
    if len(chosen) < len(shares):
        reason = (
            f"{len(chosen)} of {len(shares)} places were found where one feature map alone separates the network near"
            f" {' and '.join(f'{share:.0%}' for share in sorted(shares))} of its FLOPs."
        )
    return CutPoints(tuple(one.path for one in chosen), tuple(one.macs / run.macs for one in chosen), reason)


def check_cut_points(trunk: nn.Module, image: Tensor, after: Sequence[str]) -> CutPoints:
    """Returns the cut points after given modules.

    Raises:
        StructureError: the output of one of them does not separate the image from the logits.
    """
    source = image.detach().clone().requires_grad_()
    with torch.enable_grad():
        logits, run = _observed(trunk, source)
    given = {one.path: one for one in run.outputs}
    for path in after if logits.grad_fn is not None else ():
        if path not in given:
            continue
        if reaches(logits.grad_fn, source, given[path].edge) or _is_bypassed(trunk, path, image):
            raise StructureError(
                f"an exit sits where one tensor separates the network in two, got {path!r}, which is bypassed;"
                " move it behind the block"
            )
    return CutPoints(tuple(after), tuple(given[path].macs / run.macs if path in given else 0.0 for path in after))


def _is_bypassed(trunk: nn.Module, path: str, image: Tensor) -> bool:
    """Returns whether another image changes the logits although a module's output is kept."""
    one, other = torch.randn(2, *image.shape, generator=torch.Generator().manual_seed(0)).to(image.dtype)
    given: list[Tensor] = []

    def give(_module: nn.Module, _args: object, out: Tensor) -> Tensor:
        given.append(out.clone())  # what follows may change it in place
        return given[0].clone()

    hook = trunk.get_submodule(path).register_forward_hook(give)
    try:
        with torch.no_grad():
            expected, found = trunk(one), trunk(other)
    finally:
        hook.remove()
    scale = float(expected.abs().max())
    return not torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * scale, equal_nan=True)


def _distance(one: _Output, macs: float, share: float) -> float:
    return abs(one.macs / macs - share) + _NEAR * one.rank


def _observed(trunk: nn.Module, image: Tensor) -> tuple[Tensor, _Run]:
    run = _Run()

    def finished(module: nn.Module, path: str, out: object) -> None:
        run.calls[path] += 1
        if not isinstance(out, Tensor):
            return
        if isinstance(module, nn.Conv2d | nn.Linear):
            run.macs += out.numel() * module.weight[0].numel()
        if out.ndim == 4 and out.grad_fn is not None and path:
            edge = (out.grad_fn, out.output_nr)
            run.outputs.append(_Output(path, out, edge, out._version, run.macs, _rank(module)))

    hooks = [
        module.register_forward_hook(lambda module, _args, out, path=path: finished(module, path, out))
        for path, module in trunk.named_modules()
    ]
    try:
        logits: Tensor = trunk(image.clone())  # it may be changed in place, which a leaf may not
    finally:
        for hook in hooks:
            hook.remove()
    return logits, run


def _rank(module: nn.Module) -> int:
    """Returns the rank of a module as a cut point: 0 for a block, 1 for an activation or pooling, 2 for a layer."""
    if any(True for _ in module.children()):
        return 0
    return 2 if any(True for _ in module.parameters()) else 1


def _distinct(run: _Run, image: Tensor) -> list[_Output]:
    """Returns the feature maps, each with the outermost module that returns it.

    Modules that run twice and tensors that are changed in place afterwards are left out.
    """
    outermost: dict[Edge, _Output] = {}
    for one in run.outputs:
        if run.calls[one.path] > 1 or one.tensor._version != one.version or not _is_map(one.tensor, image):
            continue
        other = outermost.get(one.edge)
        if other is None or one.path.count(".") < other.path.count("."):
            outermost[one.edge] = one
    return list(outermost.values())


def _is_map(features: Tensor, image: Tensor) -> bool:
    """Returns whether the last two axes are a height and a width: larger than 1x1, with the image's aspect ratio."""
    height, width = features.shape[2:]
    return max(height, width) > 1 and abs(height * image.shape[3] / image.shape[2] - width) <= 1


def reaches(start: Any, image: Tensor, without: Edge | None) -> bool:
    """Returns whether autograd's graph leads from a node back to the image, if one tensor is removed."""
    seen, todo = {start}, [start]
    while todo:
        node = todo.pop()
        if getattr(node, "variable", None) is image:
            return True
        for edge in node.next_functions:
            if edge[0] is not None and edge != without and edge[0] not in seen:
                seen.add(edge[0])
                todo.append(edge[0])
    return False
