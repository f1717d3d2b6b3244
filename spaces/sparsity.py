"""Channels kept per dependency group, in steps that the target likes."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from spaces.criteria import Scores
from spaces.groups import ChannelGroup
from spaces.network import ExitNetwork
from spaces.slicing import sliced
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
