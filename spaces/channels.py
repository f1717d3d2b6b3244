"""Channels kept per dependency group, in multiples that suit the target, as dimensions."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from spaces.dimensions import Dimension, Integer, Value
from spaces.dynamic.exit_network import ExitNetwork
from spaces.pruning.criteria.base import Scores
from spaces.pruning.groups import ChannelGroup
from spaces.pruning.slicing import sliced

PREFIX = "channels."
CHOICES = 4
"""A group's step is halved until it has at least this many widths."""


def _in_units(step: int, group: ChannelGroup) -> int:
    """Returns a step in channels of layers as a step in channels of the group, each of which may stand for several."""
    return step // math.gcd(step, group.width)


class SparsitySpace:
    """The number of channels that each group keeps; the channels with the highest scores are kept.

    Args:
        groups: the dense network's dependency groups.
        scores: the scores of each group's channels, by a criterion.
        step: the smallest multiple of channels that suits the target's kernels.
        minimum: the smallest share of its channels that a group may keep, rounded up to a step.
        widest: the multiple of channels that the most demanding precision of the target needs; `step` by default.
        least: the fewest channels of a layer that suit the target's kernels; groups of fewer are not narrowed.
    """

    def __init__(
        self,
        groups: Sequence[ChannelGroup],
        scores: Scores,
        step: int,
        minimum: float,
        widest: int | None = None,
        least: int = 1,
    ) -> None:
        self.groups = tuple(groups)
        self.finest = step
        self.widest = widest or step
        self.minimum = minimum
        self.least = least
        self._scores = dict(scores)
        self._order = {group.name: np.argsort(-scores[group.name], kind="stable") for group in groups}

    @property
    def description(self) -> dict[str, list[int]]:
        """Everything that determines the slices: the order of each group's channels, its step and its minimum."""
        orders = {name: [int(channel) for channel in order] for name, order in self._order.items()}
        return orders | {"": [n for group in self.groups for n in (self.step(group), self.smallest(group))]}

    def dimensions(self) -> dict[str, Dimension]:
        """Returns one dimension per group that can be pruned: the number of kept channels."""
        sizes = [(group, self.smallest(group), group.channels, self.step(group)) for group in self.groups]
        return {
            PREFIX + group.name: Integer(low, low + (high - low) // step * step, step)
            for group, low, high, step in sizes
            if high - low >= step
        }

    def step(self, group: ChannelGroup) -> int:
        """Returns the step of a group's channels.

        Precision is chosen per layer and channels per group, so the step cannot depend on the precision. It is the
        widest, which needs no padding in any precision, halved while it does not divide the group's channels or leaves
        fewer than `CHOICES` widths. Latency of a padded layer is measured with its padding.
        Source: TensorRT documentation, Optimizing performance: channels are padded to 4 in TF32, 8 in FP16, 32 in INT8.
        """
        step = self.widest
        while step > self.finest and not self._is_fitting(group, _in_units(step, group)):
            step = max(step // 2, self.finest)
        return _in_units(step, group)

    def _is_fitting(self, group: ChannelGroup, step: int) -> bool:
        widths = (group.channels - self._lowest(group, step)) // step + 1
        return group.channels % step == 0 and widths >= CHOICES

    def smallest(self, group: ChannelGroup) -> int:
        """Returns the fewest channels that `group` may keep.

        It differs from the full width by a multiple of the step, so that the dense width is always a choice.
        """
        return self._lowest(group, self.step(group))

    def _lowest(self, group: ChannelGroup, step: int) -> int:
        fewest = max(group.channels * self.minimum, self.least / group.width, 1)
        steps = int(np.ceil(fewest / step - 1e-9))
        return min(steps * step + group.channels % step, group.channels)

    def read(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """Returns the number of kept channels of every group."""
        free = self.dimensions()
        return {
            group.name: values[PREFIX + group.name] if PREFIX + group.name in free else group.channels
            for group in self.groups
        }

    def kept(self, channels: Mapping[str, int]) -> dict[str, NDArray[np.int64]]:
        """Returns the indices of the kept channels, ascending, for each group that loses some.

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

    def lost(self, name: str, count: int) -> float:
        """Returns the share of a group's total score that is lost if it keeps `count` channels."""
        falling = self._scores[name][self._order[name]]
        total = float(falling.sum())
        return float(falling[count:].sum()) / total if total > 0 else 1 - count / len(falling)

    def apply(self, network: ExitNetwork, channels: Mapping[str, int]) -> ExitNetwork:
        """Returns a smaller copy of `network`, with slices of its weights.

        Raises:
            ValueError: a group keeps none of its channels, or more than it has.
        """
        return sliced(network, self.groups, self.kept(channels))
