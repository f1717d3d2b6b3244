"""Which layers are slower in a lower precision than in a higher one, found by timing the whole network.

A layer's own time says little, because its cost depends on fusions and on the conversions around it. So the whole
network is first timed in both precisions. If it is slower in the lower precision, no layer gets that precision until a
part of the network proves faster in it, large parts first. If it is faster, layers are excluded whose conversion back
to the higher precision makes the network faster still.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

GROUPS = 8
"""Layers are tested in at least this many groups of neighbours; groups without a clear gain are halved further."""
TIMINGS = 60
"""The largest number of pairs of networks that are timed for one precision."""
SHARE = 0.1
"""The share of the search's time that this may take, for all precisions together."""
LEAST_S, MOST_S = 5.0, 600.0
"""The least and the most seconds that this may take; timing the network as a whole is not limited."""
CONFIRMATIONS = 2
"""A difference counts if this many further timings agree, each of newly loaded networks, at new memory addresses."""

Group = tuple[str, ...]


@dataclass(frozen=True)
class Interval:
    """A ratio of times, and the half-width of its 95% confidence interval relative to the ratio."""

    ratio: float
    half_width: float

    @property
    def low(self) -> float:
        """The interval's lower end."""
        return self.ratio * (1 - self.half_width)

    @property
    def high(self) -> float:
        """The interval's upper end."""
        return self.ratio * (1 + self.half_width)

    def over(self, other: Self) -> Self:
        """Returns the quotient of this ratio and another one above 1, with an interval that is no narrower."""
        ratio = self.ratio / other.ratio
        return replace(self, ratio=ratio, half_width=self.high / other.low / ratio - 1)


UNKNOWN = Interval(1.0, math.inf)
"""Neither faster nor slower."""
TimeGroup = Callable[[Group, Group], Interval]
"""Returns the ratio of the network's time with both groups in the higher precision to that with only the second."""


@dataclass(frozen=True)
class GroupTiming:
    """The network with some layers in one precision, timed against the same network with them in another one.

    Args:
        layers: the layers that differ.
        precision: the lower precision.
        instead: the higher precision.
        raised: the number of other layers that were in the higher precision in both networks.
        ratio: the network's time with the layers in `instead` divided by that with them in `precision`.
        half_width: of the ratio's 95% confidence interval, relative to the ratio.
    """

    layers: Group
    precision: str
    instead: str
    raised: int
    ratio: float
    half_width: float


@dataclass(frozen=True)
class WholeNetwork:
    """The network as a whole in one precision.

    Args:
        precision: the precision of all layers that can have it.
        instead: the precision that it was compared with.
        layers: the number of layers that can have `precision`.
        ratio: the network's time in `instead` divided by that in `precision`.
        half_width: of the ratio's 95% confidence interval, relative to the ratio.
        is_slower: whether the network is slower in `precision`, confirmed by timings of newly loaded files.
    """

    precision: str
    instead: str
    layers: int
    ratio: float
    half_width: float
    is_slower: bool


@dataclass(frozen=True)
class SlowerLayers:
    """Layers that make the network slower in one precision.

    Args:
        layers: one layer, or neighbours that are slower together but not one by one.
        precision: the precision in which they are slower.
        instead: the precision that it was compared with.
        ratio: the network's time with the layers in `instead` divided by that with them in `precision`; below 1.
        half_width: of the ratio's 95% confidence interval, relative to the ratio.
        is_confirmed: whether further timings agreed; False if the time was up, and they are excluded to be safe.
    """

    layers: Group
    precision: str
    instead: str
    ratio: float
    half_width: float
    is_confirmed: bool = True


@dataclass(frozen=True)
class SlowLayers:
    """The layers that are slower in a lower precision on one target.

    The names of the fields are part of a cache's key.

    Args:
        slower: the layers to exclude from a precision.
        timings: the number of pairs that were timed.
        seconds: how long that took.
        refused: why networks could not be built or timed, each reason once; their layers are not excluded.
        wholes: the network as a whole in each lower precision.
        record: every timing.
        unfinished: the precisions of which not all parts were tested, because the time was up.
        limit_s: the time limit in seconds.
    """

    slower: tuple[SlowerLayers, ...] = ()
    timings: int = 0
    seconds: float = 0.0
    refused: tuple[str, ...] = ()
    wholes: tuple[WholeNetwork, ...] = ()
    record: tuple[GroupTiming, ...] = ()
    unfinished: tuple[str, ...] = ()
    limit_s: float = 0.0

    def allowed(self, layers: Sequence[str], precisions: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Returns the precisions that are not excluded for each layer, in the order of `precisions`."""
        excluded = {(layer, group.precision) for group in self.slower for layer in group.layers}
        return {
            layer: tuple(precision for precision in precisions if (layer, precision) not in excluded)
            for layer in layers
        }

    def left_out(self, precision: str) -> int:
        """Returns the number of layers that are excluded from a precision."""
        return sum(len(group.layers) for group in self.slower if group.precision == precision)

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready copy."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """Returns the result that `to_dict` described."""
        return cls(
            slower=tuple(SlowerLayers(**_with_tuple(group)) for group in content["slower"]),
            timings=content["timings"],
            seconds=content["seconds"],
            refused=tuple(content.get("refused", ())),
            wholes=tuple(WholeNetwork(**whole) for whole in content.get("wholes", ())),
            record=tuple(GroupTiming(**_with_tuple(timing)) for timing in content.get("record", ())),
            unfinished=tuple(content.get("unfinished", ())),
            limit_s=content.get("limit_s", 0.0),
        )


def _with_tuple(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the JSON of a dataclass with its layers as a tuple."""
    return {**content, "layers": tuple(content["layers"])}


def seconds_for(search_s: float) -> float:
    """Returns the seconds that finding slow layers may take before a search of `search_s` seconds."""
    return min(max(SHARE * search_s, LEAST_S), MOST_S)


@dataclass(frozen=True)
class SlowGroup:
    """A group of layers that does not get the lower precision.

    Args:
        group: its layers.
        interval: the network's time with the group in the higher precision divided by that in the lower one; of several
            timings, the one with the highest upper end.
        is_confirmed: whether further timings agreed.
    """

    group: Group
    interval: Interval
    is_confirmed: bool = True


class SlowGroupSearch:
    """Finds the groups of neighbouring layers that are slower in the lower precision, from timings of the network.

    Each timing raises a group to the higher precision and compares. First all layers are raised; if the network is then
    faster, that is confirmed by further timings, whatever the time limit. If the network is confirmed to be slower in
    the lower precision, all of its layers are excluded, and parts that are confirmed to be faster in the lower
    precision, halves first and then their halves, are restored. Otherwise the layers are halved, down to `GROUPS`
    groups, and further if a group has no clear gain; a group that seems slower is confirmed and excluded, and its parts
    are tested for restoring. So when the time is up, everything that seemed slower is excluded, confirmed or not, and
    nothing is restored without proof.

    Exclusions are part of all later timings, so in the end the network is no slower than in either precision alone. Not
    found are slow layers in a group that gains more than they lose, and groups that cross the middle of a group.

    Args:
        times: times the network with a group raised.
        timings: the largest number of timings, those of the whole network aside.
        is_late: returns whether the time is up.
    """

    def __init__(self, times: TimeGroup, timings: int, is_late: Callable[[], bool]) -> None:
        self.excluded: list[SlowGroup] = []
        self.whole = UNKNOWN
        self.is_whole_slower = False
        self.timing_count = 0
        self.is_unfinished = False
        self._times = times
        self._timings = timings
        self._is_late = is_late

    def run(self, layers: Group) -> list[SlowGroup]:
        """Returns the groups that are slower in the lower precision."""
        if layers:
            self._test_whole(layers)
        return self.excluded

    def _test_whole(self, layers: Group) -> None:
        intervals = [self._time(layers)]
        while intervals[-1].high < 1 and len(intervals) <= CONFIRMATIONS:
            intervals.append(self._time(layers))
        self.is_whole_slower = all(interval.high < 1 for interval in intervals)
        self.whole = max(intervals, key=lambda interval: interval.high) if self.is_whole_slower else intervals[-1]
        fine = -(-len(layers) // GROUPS)
        if self.is_whole_slower:
            self._exclude(SlowGroup(layers, self.whole), fine)
        else:
            self._test_parts(layers, self.whole, fine)

    def _test_parts(self, group: Group, interval: Interval, fine: int) -> None:
        """Excludes a group, or parts of it, if they are slower; a group that gains is halved down to `fine` layers.

        Args:
            group: its layers.
            interval: the group's timing.
            fine: the number of layers up to which a group with a clear gain is not divided.
        """
        slow = self._confirmed_slow(group, interval) if interval.high < 1 else None
        if slow is not None:
            self._exclude(slow, fine)
            return
        if len(group) == 1 or (interval.low > 1 and len(group) <= fine):
            return
        halves = [(self._time_within_limit(half), half) for half in _halves(group)]
        for half_interval, half in sorted(halves, key=lambda pair: pair[0].ratio):
            self._test_parts(half, half_interval, fine)

    def _confirmed_slow(self, group: Group, interval: Interval) -> SlowGroup | None:
        """Returns a group that was slower in one timing; None if a further timing does not agree."""
        timings = [interval]
        while len(timings) <= CONFIRMATIONS:
            again = self._time_within_limit(group)
            if again is UNKNOWN:
                return SlowGroup(group, interval, is_confirmed=False)
            timings.append(again)
            if again.high >= 1:
                return None
        return SlowGroup(group, max(timings, key=lambda timing: timing.high))

    def _exclude(self, slow: SlowGroup, fine: int) -> None:
        """Excludes a group, and restores parts of it that are proved faster in the lower precision.

        Parts of one size are tried in turn, first those of the group with the smallest loss.
        """
        self.excluded.append(slow)
        restored: list[tuple[Group, Interval]] = []
        parts = list(_halves(slow.group))
        while parts:
            tried = [(part, self._try_to_restore(part)) for part in parts]
            restored += [(part, gain) for part, gain in tried if gain.low > 1]
            unproved = sorted((pair for pair in tried if pair[1].low <= 1), key=lambda pair: -pair[1].ratio)
            parts = [half for part, _ in unproved for half in _halves(part)]
        for part, gain in restored:
            self._test_parts(part, gain, fine)

    def _try_to_restore(self, part: Group) -> Interval:
        """Returns the network's time with a part in the higher precision divided by that in the lower one.

        If that is proved to be above 1, the part is restored; otherwise it is the last timing.
        """
        timings: list[Interval] = []
        while len(timings) <= CONFIRMATIONS:
            timings.append(self._time_within_limit(part))
            if timings[-1].low <= 1:
                return timings[-1]
        gain = min(timings, key=lambda timing: timing.low)
        self._restore(part, gain)
        return gain

    def _restore(self, part: Group, gain: Interval) -> None:
        index = next(index for index, slow in enumerate(self.excluded) if part[0] in slow.group)
        slow = self.excluded[index]
        rest = tuple(layer for layer in slow.group if layer not in part)
        remaining = [SlowGroup(rest, slow.interval.over(gain), slow.is_confirmed)] if rest else []
        self.excluded[index : index + 1] = remaining

    def _time_within_limit(self, group: Group) -> Interval:
        if self.timing_count >= self._timings or self._is_late():
            self.is_unfinished = True
            return UNKNOWN
        return self._time(group)

    def _time(self, group: Group) -> Interval:
        self.timing_count += 1
        excluded = (layer for slow in self.excluded for layer in slow.group)
        return self._times(group, tuple(layer for layer in excluded if layer not in group))


def _halves(group: Group) -> tuple[Group, ...]:
    middle = len(group) // 2
    return (group[:middle], group[middle:]) if middle else ()
