"""Channels kept per dependency group, in steps that the target likes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from spaces.groups import ChannelGroup
from spaces.network import ExitNetwork
from spaces.slicing import sliced
from spaces.space import Dimension, Integer, Value

PREFIX = "channels."


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
    """

    def __init__(self, network: ExitNetwork, groups: Sequence[ChannelGroup], step: int, minimum: float) -> None:
        self.groups = tuple(groups)
        self.step = step
        self.minimum = minimum
        self._order = {
            group.name: np.argsort(-l2_importance(network, _with_matrices(network, group)), kind="stable")
            for group in groups
        }

    def dimensions(self) -> dict[str, Dimension]:
        """Returns one dimension per group that has a choice: its kept channels."""
        sizes = [(group, self.smallest(group), group.channels, self._step_of(group)) for group in self.groups]
        return {
            PREFIX + group.name: Integer(low, low + (high - low) // step * step, step)
            for group, low, high, step in sizes
            if high - low >= step
        }

    def smallest(self, group: ChannelGroup) -> int:
        """Returns the fewest channels that `group` may keep.

        What remains above it up to the full width divides by the step, so that the dense width is always on offer.
        """
        step = self._step_of(group)
        steps = int(np.ceil(max(group.channels * self.minimum, 1) / step - 1e-9))
        lowest = steps * step + group.channels % step
        return min(lowest, group.channels)

    def _step_of(self, group: ChannelGroup) -> int:
        """Returns the step for a group, whose channels may stand for several of a layer's."""
        return self.step // math.gcd(self.step, group.width)

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
        return sliced(network, self.groups, self.kept(channels))


def _with_matrices(network: nn.Module, group: ChannelGroup) -> ChannelGroup:
    """Returns the group without the modules that have one value a channel, such as any batch norm."""
    modules = dict(network.named_modules())
    layers = tuple(member for member in group.members if isinstance(modules[member.path], nn.Conv2d | nn.Linear))
    return replace(group, members=layers)
