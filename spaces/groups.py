"""Which channels must go together: torch-pruning's dependency groups, taken once as index plans."""

import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch_pruning
from numpy.typing import NDArray
from torch import Tensor, nn

from spaces.network import layer_name

Axis = Literal["out", "in"]


@dataclass(frozen=True)
class Member:
    """One side of one module that follows a group.

    `positions[c]` are the indices along that axis that belong to the group's channel `c`: one for a convolution, a
    whole grid of them for a linear layer behind a flattened feature map. Shape `(channels, k)`.
    """

    path: str
    axis: Axis
    positions: NDArray[np.int64]


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that are kept or dropped together, because additions and layers between them tie them."""

    name: str
    channels: int
    members: tuple[Member, ...]


def find_groups(network: nn.Module, image: Tensor) -> list[ChannelGroup]:
    """Returns the groups of `network` whose channels may be cut, in the order in which the network runs.

    The groups that hold a classifier's classes or the image's channels are not among them.

    Args:
        network: returns a tuple of logits.
        image: one input, `(1, c, h, w)`.
    """
    paths = {module: path for path, module in network.named_modules()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = torch_pruning.DependencyGraph().build_dependency(network, image)
        found = list(graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear]))
    outputs = _classifiers(network, image)
    groups = []
    for group in found:
        members = _members(group, paths)
        if members and not any(member.axis == "out" and member.path in outputs for member in members):
            groups.append(ChannelGroup(layer_name(members[0].path), len(group[0].idxs), members))
    return groups


def _classifiers(network: nn.Module, image: Tensor) -> set[str]:
    """Returns the paths of the layers whose output is one of the network's outputs."""
    layers: dict[int, str] = {}
    hooks = [
        module.register_forward_hook(lambda _module, _args, out, path=path: layers.__setitem__(id(out), path))
        for path, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    outputs = network(image)
    for hook in hooks:
        hook.remove()
    return {layers[id(out)] for out in outputs if id(out) in layers}


def _members(group: "torch_pruning.Group", paths: Mapping[nn.Module, str]) -> tuple[Member, ...]:
    """Returns the modules of a group that hold its channels; none at all where one of them cannot be cut."""
    members = []
    for item in group:
        module = item.dep.target.module
        if _is_cuttable(module):
            members.append(Member(paths[module], _axis(item), _positions(item)))
        elif isinstance(module, nn.Parameter) or any(True for _ in module.parameters()):
            return ()
    return tuple(members)


def _is_cuttable(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 or is_depthwise(module)
    return isinstance(module, nn.Linear | nn.BatchNorm2d)


def is_depthwise(module: nn.Module) -> bool:
    """Returns whether each input channel of a convolution has filters of its own."""
    return isinstance(module, nn.Conv2d) and module.groups > 1 and module.groups == module.in_channels


def _axis(item: Any) -> Axis:
    # A depthwise convolution has one axis only: cutting an input channel cuts its filter.
    reads = "in_channels" in item.dep.handler.__name__ and not is_depthwise(item.dep.target.module)
    return "in" if reads and not isinstance(item.dep.target.module, nn.BatchNorm2d) else "out"


def _positions(item: Any) -> NDArray[np.int64]:
    by_channel: dict[int, list[int]] = defaultdict(list)
    for index, root in zip(item.idxs, item.root_idxs, strict=True):
        by_channel[root].append(index)
    return np.array([by_channel[channel] for channel in sorted(by_channel)], dtype=np.int64)


def dropped_positions(
    groups: Sequence[ChannelGroup], kept: Mapping[str, NDArray[np.int64]]
) -> dict[str, dict[Axis, NDArray[np.int64]]]:
    """Returns, for each module that loses channels, the indices that go along each axis.

    Args:
        groups: the network's groups.
        kept: the channels that remain, for each group that loses some.
    """
    dropped: dict[str, dict[Axis, list[NDArray[np.int64]]]] = defaultdict(lambda: defaultdict(list))
    for group in groups:
        if group.name in kept:
            gone = np.setdiff1d(np.arange(group.channels), kept[group.name])
            for member in group.members:
                dropped[member.path][member.axis].append(member.positions[gone].ravel())
    return {
        path: {axis: np.concatenate(positions) for axis, positions in axes.items()} for path, axes in dropped.items()
    }
