"""Channels kept per dependency group, in steps that the target likes."""

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from spaces.groups import Axis, ChannelGroup, dropped_positions, is_depthwise
from spaces.network import ExitNetwork
from spaces.space import Dimension, Integer, Value

PREFIX = "channels."
CHOICES = 4
"""A group's step is narrowed until it has so many widths to choose from."""


def l2_importance(network: nn.Module, group: ChannelGroup) -> NDArray[np.float64]:
    """Returns one score per channel, `(channels,)`: its weights' L2 norm, over every layer that holds it.

    Each layer's norms are divided by their mean, so that no layer outweighs the others, and then averaged.
    Source: Li et al., Pruning Filters for Efficient ConvNets, 2017; reduced over groups as Fang et al., DepGraph, 2023.
    """
    modules = dict(network.named_modules())
    scores = []
    for member in group.members:
        weight = modules[member.path].weight
        if isinstance(modules[member.path], nn.BatchNorm2d) or not isinstance(weight, torch.Tensor):
            continue
        rows = weight.detach().double() if member.axis == "out" else weight.detach().double().transpose(0, 1)
        energy = rows.flatten(1).square().sum(1).numpy()
        norm = np.sqrt(energy[member.positions].sum(1))
        scores.append(norm / max(norm.mean(), np.finfo(np.float64).tiny))
    return np.asarray(np.mean(scores, axis=0))


class SparsitySpace:
    """How many channels each group keeps; which ones follows from their importance, most important first.

    Args:
        network: the dense network, whose weights rank the channels.
        groups: its dependency groups.
        step: channels come in multiples of it, as the target's kernels want.
        minimum: the smallest share of its channels that a group may keep, rounded up to a step.
        widest: the multiple that the most demanding of the target's precisions wants; `step` where not given.
    """

    def __init__(
        self,
        network: ExitNetwork,
        groups: Sequence[ChannelGroup],
        step: int,
        minimum: float,
        widest: int | None = None,
    ) -> None:
        self.groups = tuple(groups)
        self.finest = step
        self.widest = widest or step
        self.minimum = minimum
        self._order = {group.name: np.argsort(-l2_importance(network, group), kind="stable") for group in groups}

    def dimensions(self) -> dict[str, Dimension]:
        """Returns one dimension per group that has a choice: its kept channels."""
        sizes = {group.name: (self.smallest(group), group.channels, self.step(group)) for group in self.groups}
        return {
            PREFIX + name: Integer(low, low + (high - low) // step * step, step)
            for name, (low, high, step) in sizes.items()
            if high - low >= step
        }

    def step(self, group: ChannelGroup) -> int:
        """Returns the multiple in which the channels of `group` come.

        Precision is chosen per layer and channels per group, so the step cannot follow the precision: it is the widest,
        so that no layer is padded in any precision, and halved as long as it does not divide the group's channels or
        leaves it fewer than `CHOICES` widths. What is padded then is measured, padding included.
        Source: TensorRT documentation, Optimizing performance: channels are padded to 4 in TF32, 8 in FP16, 32 in INT8.
        """
        step = self.widest
        while step > self.finest and (group.channels % step or self._widths(group, step) < CHOICES):
            step = max(step // 2, self.finest)
        return step

    def _widths(self, group: ChannelGroup, step: int) -> int:
        return (group.channels - self._lowest(group, step)) // step + 1

    def smallest(self, group: ChannelGroup) -> int:
        """Returns the fewest channels that `group` may keep.

        What remains above it up to the full width divides by the step, so that the dense width is always on offer.
        """
        return self._lowest(group, self.step(group))

    def _lowest(self, group: ChannelGroup, step: int) -> int:
        steps = int(np.ceil(max(group.channels * self.minimum, 1) / step - 1e-9))
        return min(steps * step + group.channels % step, group.channels)

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
