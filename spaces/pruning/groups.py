"""Dependency groups of channels, as indices into the weights of modules."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Axis = Literal["out", "in"]


@dataclass(frozen=True)
class Member:
    """One axis of one module that is pruned with a group.

    `positions[c]` are the indices along that axis that belong to the group's channel `c`: one for a convolution,
    several for a linear layer after a flattened feature map. Shape `(channels, k)`.
    """

    path: str
    axis: Axis
    positions: NDArray[np.int64]


@dataclass(frozen=True)
class ChannelGroup:
    """Channels of several modules that must be pruned together, because additions or layers connect them.

    Args:
        name: the first layer that computes them.
        channels: the number of channels. Around a grouped convolution, a channel of the group is a whole convolution
            group with all of its channels.
        members: the modules and axes that hold the channels.
        width: the number of a layer's channels that one channel of the group stands for: 1 except for grouped
            convolutions.
    """

    name: str
    channels: int
    members: tuple[Member, ...]
    width: int = 1

    def is_inside(self, blocks: Iterable[str]) -> bool:
        """Returns whether all of its channels are inside one of some blocks, given by their paths in the trunk."""
        paths = [f"{member.path}." for member in self.members]
        return any(all(path.startswith(f"trunk.{block}.") for path in paths) for block in blocks)


@dataclass(frozen=True)
class WholeGroup:
    """A group of channels that cannot be pruned.

    Args:
        name: the first layer that computes them.
        channels: the number of channels.
        reason: why, in words that may apply to several groups.
        detail: the details for this group; may be empty.
    """

    name: str
    channels: int
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Groups:
    """All dependency groups of a network: those that can be pruned, and those that stay whole."""

    free: tuple[ChannelGroup, ...]
    whole: tuple[WholeGroup, ...]

    @property
    def reasons(self) -> dict[str, int]:
        """The number of groups that stay whole for each reason, the most frequent reason first."""
        return dict(Counter(group.reason for group in self.whole).most_common())

    def __str__(self) -> str:
        if not self.whole:
            return f"All {len(self.free)} groups of channels can be cut."
        counted = "; ".join(f"{count} because {reason}" for reason, count in self.reasons.items())
        return f"{len(self.free)} groups of channels can be cut, {len(self.whole)} stay whole: {counted}."


def dropped_positions(
    groups: Sequence[ChannelGroup], kept: Mapping[str, NDArray[np.int64]]
) -> dict[str, dict[Axis, NDArray[np.int64]]]:
    """Returns, for each module that loses channels, the dropped indices along each axis.

    Args:
        groups: the network's groups.
        kept: the kept channels of each group that loses some.
    """
    dropped: dict[str, dict[Axis, list[NDArray[np.int64]]]] = defaultdict(lambda: defaultdict(list))
    for group in groups:
        if group.name in kept:
            lost = np.setdiff1d(np.arange(group.channels), kept[group.name])
            for member in group.members:
                dropped[member.path][member.axis].append(member.positions[lost].ravel())
    return {
        path: {axis: np.concatenate(positions) for axis, positions in axes.items()} for path, axes in dropped.items()
    }
