"""Which channels must go together, as plans of indices."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

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
    """Channels that are kept or dropped together, because additions and layers between them tie them.

    Args:
        name: the first layer that makes them.
        channels: how many there are to choose from. Around a grouped convolution it is convolution groups that are
            kept or dropped, each with all of its channels.
        members: the modules that hold them.
        width: how many channels of a layer each of them stands for: 1, but for grouped convolutions.
    """

    name: str
    channels: int
    members: tuple[Member, ...]
    width: int = 1


@dataclass(frozen=True)
class WholeGroup:
    """Channels that stay as they are.

    Args:
        name: the first layer that makes them.
        channels: how many there are.
        reason: why, in a few words that fit other groups too.
        detail: what exactly was in the way here; may be empty.
    """

    name: str
    channels: int
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Groups:
    """Every group of channels of a network: those that may be cut, and those that stay whole."""

    free: tuple[ChannelGroup, ...]
    whole: tuple[WholeGroup, ...]

    @property
    def reasons(self) -> dict[str, int]:
        """How many groups stay whole for each reason, the most frequent first."""
        return dict(Counter(group.reason for group in self.whole).most_common())

    def __str__(self) -> str:
        if not self.whole:
            return f"All {len(self.free)} groups of channels can be cut."
        counted = "; ".join(f"{count} because {reason}" for reason, count in self.reasons.items())
        return f"{len(self.free)} groups of channels can be cut, {len(self.whole)} stay whole: {counted}."


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
