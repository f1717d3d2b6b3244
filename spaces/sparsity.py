"""Channels kept per dependency group, in steps that the target likes."""

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from spaces.criteria import Scores
from spaces.groups import Axis, ChannelGroup, dropped_positions, is_depthwise
from spaces.network import ExitNetwork
from spaces.space import Dimension, Integer, Value

PREFIX = "channels."


class SparsitySpace:
    """How many channels each group keeps; which ones follows from their scores, most important first.

    Args:
        groups: the dense network's dependency groups.
        scores: of each group's channels, by a criterion.
        step: channels come in multiples of it, as the target's kernels want.
        minimum: the smallest share of its channels that a group may keep, rounded up to a step.
    """

    def __init__(self, groups: Sequence[ChannelGroup], scores: Scores, step: int, minimum: float) -> None:
        self.groups = tuple(groups)
        self.step = step
        self.minimum = minimum
        self._order = {group.name: np.argsort(-scores[group.name], kind="stable") for group in groups}

    @property
    def description(self) -> dict[str, list[int]]:
        """All that decides which slices there are: the order of each group's channels, the step and the minimum."""
        orders = {name: [int(channel) for channel in order] for name, order in self._order.items()}
        return orders | {"": [self.step, *(self.smallest(group) for group in self.groups)]}

    def dimensions(self) -> dict[str, Dimension]:
        """Returns one dimension per group that has a choice: its kept channels."""
        sizes = {group.name: (self.smallest(group), group.channels) for group in self.groups}
        return {
            PREFIX + name: Integer(low, low + (high - low) // self.step * self.step, self.step)
            for name, (low, high) in sizes.items()
            if high - low >= self.step
        }

    def smallest(self, group: ChannelGroup) -> int:
        """Returns the fewest channels that `group` may keep.

        What remains above it up to the full width divides by the step, so that the dense width is always on offer.
        """
        steps = int(np.ceil(max(group.channels * self.minimum, 1) / self.step - 1e-9))
        lowest = steps * self.step + group.channels % self.step
        return min(lowest, group.channels)

    def read(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """Returns the kept channels of every group."""
        free = self.dimensions()
        return {
            group.name: values[PREFIX + group.name] if PREFIX + group.name in free else group.channels
            for group in self.groups
        }

    def kept(self, channels: Mapping[str, int]) -> dict[str, NDArray[np.int64]]:
        """Returns the indices of the channels that stay, ascending, for each group that loses some.

        Raises:
            ValueError: a group keeps none of its channels, or more than it has.
        """
        kept = {}
        for group in self.groups:
            count = channels.get(group.name, group.channels)
            if not 1 <= count <= group.channels:
                raise ValueError(f"group {group.name!r} keeps 1 to {group.channels} channels, got {count}")
            if count < group.channels:
                kept[group.name] = np.sort(self._order[group.name][:count])
        return kept

    def apply(self, network: ExitNetwork, channels: Mapping[str, int]) -> ExitNetwork:
        """Returns a smaller copy of `network`, whose weights are slices of its own.

        Raises:
            ValueError: a group keeps none of its channels, or more than it has.
        """
        smaller = copy.deepcopy(network)
        modules = dict(smaller.named_modules())
        for path, axes in dropped_positions(self.groups, self.kept(channels)).items():
            cut(modules[path], axes)
        return smaller


def cut(module: nn.Module, dropped: Mapping[Axis, NDArray[np.int64]]) -> None:
    """Removes channels from a convolution, linear layer or batch norm, in place."""
    if isinstance(module, nn.BatchNorm2d):
        _cut_batch_norm(module, dropped["out"])
    elif isinstance(module, nn.Conv2d | nn.Linear):
        for axis, positions in dropped.items():
            _cut_weight(module, 0 if axis == "out" else 1, positions)


def _remaining(size: int, dropped: NDArray[np.int64]) -> torch.Tensor:
    return torch.from_numpy(np.setdiff1d(np.arange(size), dropped))


def _cut_batch_norm(norm: nn.BatchNorm2d, dropped: NDArray[np.int64]) -> None:
    keep = _remaining(norm.num_features, dropped)
    norm.num_features = len(keep)
    norm.weight = nn.Parameter(norm.weight.detach()[keep])
    norm.bias = nn.Parameter(norm.bias.detach()[keep])
    norm.running_mean = _buffer(norm.running_mean)[keep]
    norm.running_var = _buffer(norm.running_var)[keep]


def _buffer(buffer: torch.Tensor | None) -> torch.Tensor:
    if buffer is None:
        raise ValueError("batch norm keeps running statistics, got track_running_stats=False; train it with them")
    return buffer


def _cut_weight(layer: nn.Conv2d | nn.Linear, axis: int, dropped: NDArray[np.int64]) -> None:
    depthwise = is_depthwise(layer)
    keep = _remaining(layer.weight.shape[axis], dropped)
    layer.weight = nn.Parameter(layer.weight.detach().index_select(axis, keep))
    if axis == 0 and layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.detach()[keep])
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
        return
    layer.out_channels = layer.weight.shape[0]
    if depthwise:
        layer.groups = layer.in_channels = layer.out_channels
    else:
        layer.in_channels = layer.weight.shape[1]
