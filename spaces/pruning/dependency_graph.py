"""Dependency groups from torch-pruning's graph: which indices of which modules belong to the same channel.

torch-pruning traces the network. Its graph is followed here index by index, so that errors in the graph (reshapes that
multiply channels without end, channels that are tied to each other) are detected.
"""

import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch_pruning
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch_pruning import _helpers, ops

from spaces.dynamic.exit_network import layer_name
from spaces.dynamic.masks.base import NAME
from spaces.pruning.groups import Axis, ChannelGroup, Groups, Member, WholeGroup

_LOST = "its channels cannot be followed through reshapes"
_NO_MATCH = "the groups of a grouped convolution do not match its neighbours' channels"

Layer = nn.Conv2d | nn.Linear
Walk = dict[tuple[Any, Callable[..., Any]], dict[int, int]]
"""For each node and pruning function that was reached: the root's channel that each index belongs to."""


class _WholeError(Exception):
    """A group cannot be pruned: the reason and its details."""


@dataclass
class _LayerGroup:
    """The channels that one layer computes, and the modules that hold them."""

    name: str
    channels: int
    holds_classes: bool = False
    members: list[Member] = field(default_factory=list)
    grouped: list[tuple[str, int]] = field(default_factory=list)
    reason: tuple[str, str] | None = None


def dependency_groups(network: nn.Module, image: Tensor) -> Groups:
    """Returns the groups of `network`, in the order in which it runs, without testing that they can be pruned.

    Groups of a classifier's classes or of the image's channels are left out.

    Args:
        network: returns a tuple of logits.
        image: one input, `(1, c, h, w)`.
    """
    order, outputs = _layers_that_run(network, image)
    paths = {module: path for path, module in network.named_modules()}
    graph = torch_pruning.DependencyGraph()
    detail = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # With gradients of the image, the network is traced even if all weights are frozen.
            graph.build_dependency(network, image.clone().requires_grad_(), verbose=False)
    except Exception as error:  # a failure of torch-pruning, not of the network
        # The graph may exist in spite of the error; wrong groups are detected when they are cut.
        detail = f"{type(error).__name__}: {error}"
    seen = getattr(graph, "module2node", {})
    found, visited = [], set(outputs)
    # A mask runs before the layers of its block, but the channels are named after the block's layers.
    for root in sorted(order, key=lambda layer: NAME in paths[layer].split(".")):
        if root in visited:
            continue
        if root not in seen:
            reason = ("torch-pruning cannot follow the network there", detail)
            found.append(_LayerGroup(layer_name(paths[root]), root.weight.shape[0], reason=reason))
        else:
            one, made = _group_of(graph, root, paths)
            visited |= made
            if not one.holds_classes and not made & outputs:
                found.append(one)
    return _without_overlaps(_joined(found))


def _layers_that_run(network: nn.Module, image: Tensor) -> tuple[list[Layer], set[nn.Module]]:
    """Returns convolutions and linear layers in the order in which they run, and those that compute outputs."""
    order: dict[Layer, None] = {}
    made: dict[int, nn.Module] = {}
    kept: list[Tensor] = []  # keeps tensors alive, so that no id is used twice

    def ran(module: nn.Module, _args: object, out: Tensor) -> None:
        assert isinstance(module, Layer)
        order[module] = None
        made[id(out)] = module
        kept.append(out)

    hooks = [module.register_forward_hook(ran) for module in network.modules() if isinstance(module, Layer)]
    try:
        outputs = network(image)
    finally:
        for hook in hooks:
            hook.remove()
    return list(order), {made[id(out)] for out in outputs if id(out) in made}


def _group_of(graph: Any, root: Layer, paths: Mapping[nn.Module, str]) -> tuple[_LayerGroup, set[nn.Module]]:
    """Returns the group of the channels that `root` computes, and every layer that computes some of them."""
    found = _LayerGroup(layer_name(paths[root]), root.weight.shape[0])
    walk: Walk = {}
    limit = max(max(layer.weight.shape[0], _size(layer, "in")) for layer in paths if isinstance(layer, Layer))
    try:
        _walk(graph, root, walk, limit)
        found.holds_classes = any(isinstance(node.module, ops._OutputOp) for node, _ in walk)
        for (node, handler), roots in walk.items():
            _add_member(found, node.module, _axis(node.module, handler), roots, paths)
    except _WholeError as error:
        found.reason = error.args
    except Exception as error:  # torch-pruning's arithmetic of indices
        found.reason = (_LOST, f"{type(error).__name__}: {error}")
    made = {node.module for node, handler in walk if _axis(node.module, handler) == "out"}
    return found, {module for module in made if isinstance(module, Layer)}


def _walk(graph: Any, root: Layer, walk: Walk, limit: int) -> None:
    """Follows the channels that `root` computes to every module that holds them.

    Raises:
        _WholeError: two of them are tied to each other, or they multiply beyond `limit`.
    """
    handler = graph.get_pruner_of_module(root).prune_out_channels
    start = [_helpers._HybridIndex(index, index) for index in range(root.weight.shape[0])]
    todo = [(graph.module2node[root], handler, start)]
    while todo:
        node, handler, indices = todo.pop()
        known = walk.setdefault((node, handler), {})
        if any(known.get(one.idx, one.root_idx) != one.root_idx for one in indices):
            raise _WholeError("channels of different layers are tied to each other unevenly", _words(node.module))
        new = [one for one in indices if one.idx not in known]
        known |= {one.idx: one.root_idx for one in new}
        if max(known, default=0) >= limit:
            raise _WholeError(_LOST, _words(node.module))
        for dependency in node.dependencies if new else ():
            if dependency.is_triggered_by(handler):
                reached = _mapped(new, dependency.index_mapping)
                todo += [(dependency.target, dependency.handler, reached)] if reached else []


def _mapped(indices: list[Any], mappings: Sequence[Any]) -> list[Any]:
    for mapping in mappings:
        if mapping is not None and len(indices):
            indices = mapping(indices)
    return indices


def _words(module: object) -> str:
    return str(module).partition("(")[0].strip("_")


def _add_member(
    found: _LayerGroup, module: Any, axis: Axis, roots: Mapping[int, int], paths: Mapping[Any, str]
) -> None:
    if not roots:
        return
    if isinstance(module, nn.Parameter):
        raise _WholeError("a parameter outside of any layer holds its channels", f"shape {tuple(module.shape)}")
    if isinstance(module, Layer | _BatchNorm):
        member = Member(paths[module], axis, _positions(roots, found.channels))
        if member.positions.max() >= _size(module, axis):
            raise _WholeError(_LOST, paths[module])
        found.members.append(member)
        if isinstance(module, nn.Conv2d) and module.groups > 1 and not is_depthwise(module):
            if not np.array_equal(member.positions.ravel(), np.arange(_size(module, axis))):
                raise _WholeError(_NO_MATCH, paths[module])
            found.grouped.append((paths[module], module.groups))
    elif any(True for _ in module.parameters()):
        raise _WholeError(f"a {type(module).__name__} runs over its channels", paths.get(module, ""))


def _size(module: Any, axis: Axis) -> int:
    if isinstance(module, _BatchNorm):
        return int(module.num_features)
    if isinstance(module, nn.Conv2d):
        return module.in_channels if axis == "in" else module.out_channels
    return int(module.weight.shape[0 if axis == "out" else 1])


def is_depthwise(module: nn.Module) -> bool:
    """Returns whether a convolution has one filter for each of its input channels."""
    return isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels == module.out_channels


def _axis(module: Any, handler: Callable[..., Any]) -> Axis:
    # A depthwise convolution has one axis only: cutting an input channel cuts its filter.
    one_axis = isinstance(module, _BatchNorm) or (isinstance(module, nn.Module) and is_depthwise(module))
    return "in" if "in_channels" in handler.__name__ and not one_axis else "out"


def _positions(roots: Mapping[int, int], channels: int) -> NDArray[np.int64]:
    by_channel: dict[int, list[int]] = defaultdict(list)
    for index, root in roots.items():
        by_channel[root].append(index)
    sizes = {len(indices) for indices in by_channel.values()}
    if len(by_channel) != channels or len(sizes) != 1:
        raise _WholeError("a split or a concatenation divides its channels unevenly", "")
    return np.array([sorted(by_channel[channel]) for channel in range(channels)], dtype=np.int64)


def _joined(found: Sequence[_LayerGroup]) -> Groups:
    """Returns the groups, with those on both sides of a grouped convolution merged: they lose whole groups of it."""
    components: list[list[_LayerGroup]] = []
    for one in found:
        touching = [part for part in components if any(set(one.grouped) & set(other.grouped) for other in part)]
        components = [part for part in components if part not in touching]
        components.append([*(member for part in touching for member in part), one])
    position = {one.name: index for index, one in enumerate(found)}
    components = [sorted(part, key=lambda one: position[one.name]) for part in components]
    free, whole = [], []
    for part in sorted(components, key=lambda part: position[part[0].name]):
        try:
            free.append(_one_group(part))
        except _WholeError as error:
            whole += [WholeGroup(one.name, one.channels, *(one.reason or error.args)) for one in part]
    return Groups(tuple(free), tuple(whole))


def _one_group(part: Sequence[_LayerGroup]) -> ChannelGroup:
    for one in part:
        if one.reason is not None:
            raise _WholeError(*one.reason)
    first = part[0]
    convolutions = {convolution for one in part for convolution in one.grouped}
    if not convolutions:
        return ChannelGroup(first.name, first.channels, tuple(first.members))
    counts = {groups for _, groups in convolutions}
    sides = sum(len(one.grouped) for one in part)
    if len(counts) > 1 or sides != 2 * len(convolutions) or any(one.channels % min(counts) for one in part):
        raise _WholeError(_NO_MATCH, "")
    units = min(counts)
    members = [
        replace(member, positions=member.positions.reshape(units, -1))
        for one in part
        for member in one.members
        # Along its input axis a grouped convolution has one group's channels, which stay.
        if not (member.axis == "in" and member.path in {path for path, _ in convolutions})
    ]
    width = int(np.gcd.reduce([one.channels // units for one in part]))
    return ChannelGroup(first.name, units, tuple(members), width)


def _without_overlaps(groups: Groups) -> Groups:
    """Returns the groups; those that share an index with another group stay whole."""
    claims: dict[tuple[str, Axis, int], set[str]] = defaultdict(set)
    for group in groups.free:
        for member in group.members:
            for index in member.positions.ravel().tolist():
                claims[member.path, member.axis, index].add(group.name)
    clashing = set().union(*(names for names in claims.values() if len(names) > 1))
    reason = "its channels belong to another group too"
    whole = [WholeGroup(group.name, group.channels, reason) for group in groups.free if group.name in clashing]
    free = tuple(group for group in groups.free if group.name not in clashing)
    return Groups(free, (*groups.whole, *whole))
