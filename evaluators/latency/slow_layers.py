"""Which layers are slower in a lower precision than in a higher one, found by timing the whole network both ways.

A layer's own time says little: what it costs depends on what it fuses with and on the conversions around it. So the
whole network is timed in both precisions first. Where the lower one loses, no layer gets it until parts are proved
faster in it, big ones first. Where it wins, the layers with which the network would be faster without it are left out.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

GROUPS = 8
"""Layers are flipped in at least so many groups of neighbours; groups that do not clearly gain are halved further."""
TIMINGS = 60
"""At most so many pairs are timed for one precision."""
SHARE = 0.1
"""So much of what a search will take may go into this, for all precisions together."""
LEAST_S, MOST_S = 5.0, 600.0
"""But no less and no more than so many seconds; the network as a whole is timed whatever that takes."""
CONFIRMATIONS = 2
"""A flip counts when so many further timings, of networks loaded anew, agree: each load lies elsewhere in memory."""

Group = tuple[str, ...]


@dataclass(frozen=True)
class Interval:
    """A ratio of times, and half of its 95% interval as a share of it."""

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
        """Returns what is left of a ratio once another one, above 1, is taken out of it: no narrower than it is."""
        ratio = self.ratio / other.ratio
        return replace(self, ratio=ratio, half_width=self.high / other.low / ratio - 1)


UNKNOWN = Interval(1.0, math.inf)
"""Neither faster nor slower."""
Time = Callable[[Group, Group], Interval]
"""Times a network with one group, and those before it, flipped back, beside the same with only the latter."""


@dataclass(frozen=True)
class Timed:
    """One timing of the network with some layers in one precision beside the same with them in another.

    Args:
        layers: that differ.
        precision: in which they are on one side.
        instead: in which they are on the other.
        raised: so many other layers were in the higher precision on both sides.
        ratio: of the network's time with them in `instead` to that with them in `precision`.
        half_width: of the ratio's 95% interval, as a share of it.
    """

    layers: Group
    precision: str
    instead: str
    raised: int
    ratio: float
    half_width: float


@dataclass(frozen=True)
class Whole:
    """The network as a whole in one precision.

    Args:
        precision: of all its layers that can have it.
        instead: what it was compared with.
        layers: how many can have it.
        ratio: of the network's time in `instead` to that in `precision`.
        half_width: of the ratio's 95% interval, as a share of it.
        is_slower: whether it takes longer in `precision`, as timings of newly loaded files confirmed.
    """

    precision: str
    instead: str
    layers: int
    ratio: float
    half_width: float
    is_slower: bool


@dataclass(frozen=True)
class Slower:
    """Layers that cost the network time in one precision.

    Args:
        layers: one, or neighbours that lose together and not one by one.
        precision: in which they are slower.
        instead: what they were compared with.
        ratio: of the network's time with them in `instead` to that with them in `precision`: below 1.
        half_width: of the ratio's 95% interval, as a share of it.
        is_confirmed: whether further timings agreed; without, the time was up and they are left out to be safe.
    """

    layers: Group
    precision: str
    instead: str
    ratio: float
    half_width: float
    is_confirmed: bool = True


@dataclass(frozen=True)
class SlowLayers:
    """What an examination found.

    Args:
        slower: what is to be left out.
        timings: pairs that were timed.
        seconds: that it took.
        refused: why networks that were to be timed could not be, each reason once; such layers stay as they are.
        wholes: the network as a whole in each lower precision.
        record: every timing.
        unfinished: precisions of which not every part was looked at, because the time was up.
        limit_s: the seconds that it was given.
    """

    slower: tuple[Slower, ...] = ()
    timings: int = 0
    seconds: float = 0.0
    refused: tuple[str, ...] = ()
    wholes: tuple[Whole, ...] = ()
    record: tuple[Timed, ...] = ()
    unfinished: tuple[str, ...] = ()
    limit_s: float = 0.0

    def allowed(self, layers: Sequence[str], precisions: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Returns the precisions that are left to each layer, in the order of `precisions`."""
        out = {(layer, found.precision) for found in self.slower for layer in found.layers}
        return {layer: tuple(each for each in precisions if (layer, each) not in out) for layer in layers}

    def left_out(self, precision: str) -> int:
        """Returns how many layers do not get a precision."""
        return sum(len(found.layers) for found in self.slower if found.precision == precision)

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready copy."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """Returns the examination that `to_dict` described."""
        return cls(
            slower=tuple(Slower(**{**each, "layers": tuple(each["layers"])}) for each in content["slower"]),
            timings=content["timings"],
            seconds=content["seconds"],
            refused=tuple(content.get("refused", ())),
            wholes=tuple(Whole(**each) for each in content.get("wholes", ())),
            record=tuple(Timed(**{**each, "layers": tuple(each["layers"])}) for each in content.get("record", ())),
            unfinished=tuple(content.get("unfinished", ())),
            limit_s=content.get("limit_s", 0.0),
        )


def seconds_for(search_s: float) -> float:
    """Returns the seconds that an examination may take before a search of `search_s` seconds."""
    return min(max(SHARE * search_s, LEAST_S), MOST_S)


@dataclass(frozen=True)
class Lost:
    """A group that does not get the lower precision.

    Args:
        group: its layers.
        interval: of the network's time without the lower precision in them to that with it, the most cautious one.
        is_confirmed: whether further timings agreed.
    """

    group: Group
    interval: Interval
    is_confirmed: bool = True


class Hunt:
    """Finds the groups of neighbours that lose, from timings alone.

    All layers are flipped first, and where the network is then faster, again as often as a confirmation asks for,
    however late it is. A network that is confirmed to lose has lost all of its layers, and wins back, big parts first
    and then their halves, those that are confirmed to be faster in the lower precision. One that does not lose is
    halved, down to `GROUPS` groups, and further where a group does not clearly gain; a group that is seen to lose is
    confirmed before it is divided, and then wins back what it can. So whenever the time is up, what was seen to lose is
    left out, confirmed or not, and nothing comes back unproved.

    A flip that is kept is part of all later timings, so in the end the network is no slower than in either precision
    alone. What stays hidden is a loser in a group that gains more than it loses, and what crosses the middle of a
    group.

    Args:
        times: a flip.
        timings: at most so many, the whole network's aside.
        is_late: whether there is no time left.
    """

    def __init__(self, times: Time, timings: int, is_late: Callable[[], bool]) -> None:
        self.found: list[Lost] = []
        self.whole = UNKNOWN
        self.has_lost_whole = False
        self.spent = 0
        self.is_cut = False
        self._times = times
        self._timings = timings
        self._is_late = is_late

    def run(self, layers: Group) -> list[Lost]:
        """Returns the groups that lose, each with the most cautious of its timings."""
        if layers:
            self._judge(layers)
        return self.found

    def _judge(self, layers: Group) -> None:
        seen = [self._flip(layers)]
        while seen[-1].high < 1 and len(seen) <= CONFIRMATIONS:
            seen.append(self._flip(layers))
        self.has_lost_whole = all(each.high < 1 for each in seen)
        self.whole = max(seen, key=lambda each: each.high) if self.has_lost_whole else seen[-1]
        fine = -(-len(layers) // GROUPS)
        if self.has_lost_whole:
            self._lose(Lost(layers, self.whole), fine)
        else:
            self._look_into(layers, self.whole, fine)

    def _look_into(self, group: Group, seen: Interval, fine: int) -> None:
        """Looks for what loses in a group; one that gains is divided only while it has more than `fine` layers."""
        lost = self._confirmed_lost(group, seen) if seen.high < 1 else None
        if lost is not None:
            self._lose(lost, fine)
            return
        if len(group) == 1 or (seen.low > 1 and len(group) <= fine):
            return
        halves = [(self._timed(half), half) for half in _halves(group)]
        for interval, half in sorted(halves, key=lambda pair: pair[0].ratio):
            self._look_into(half, interval, fine)

    def _confirmed_lost(self, group: Group, seen: Interval) -> Lost | None:
        """Returns a group that was seen to lose; None where a further timing does not agree."""
        timings = [seen]
        while len(timings) <= CONFIRMATIONS:
            again = self._timed(group)
            if again is UNKNOWN:
                return Lost(group, seen, is_confirmed=False)
            timings.append(again)
            if again.high >= 1:
                return None
        return Lost(group, max(timings, key=lambda each: each.high))

    def _lose(self, lost: Lost, fine: int) -> None:
        """Leaves a group out, and looks for parts of it that are proved faster with the lower precision.

        Parts of one size are tried in turn, first those whose group lost the least.
        """
        self.found.append(lost)
        won: list[tuple[Group, Interval]] = []
        parts = list(_halves(lost.group))
        while parts:
            seen = [(part, self._gain(part)) for part in parts]
            won += [(part, gain) for part, gain in seen if gain.low > 1]
            unproved = sorted((pair for pair in seen if pair[1].low <= 1), key=lambda pair: -pair[1].ratio)
            parts = [half for part, _ in unproved for half in _halves(part)]
        for part, gain in won:
            self._look_into(part, gain, fine)

    def _gain(self, part: Group) -> Interval:
        """Returns the ratio of the network's time without the lower precision in a part to that with it.

        Where that is proved to be above 1, the part gets it back; else it is what the last timing says.
        """
        timings: list[Interval] = []
        while len(timings) <= CONFIRMATIONS:
            timings.append(self._timed(part))
            if timings[-1].low <= 1:
                return timings[-1]
        gain = min(timings, key=lambda each: each.low)
        self._give_back(part, gain)
        return gain

    def _give_back(self, part: Group, gain: Interval) -> None:
        place = next(index for index, lost in enumerate(self.found) if part[0] in lost.group)
        lost = self.found[place]
        rest = tuple(layer for layer in lost.group if layer not in part)
        left = [Lost(rest, lost.interval.over(gain), lost.is_confirmed)] if rest else []
        self.found[place : place + 1] = left

    def _timed(self, group: Group) -> Interval:
        if self.spent >= self._timings or self._is_late():
            self.is_cut = True
            return UNKNOWN
        return self._flip(group)

    def _flip(self, group: Group) -> Interval:
        self.spent += 1
        lost = (layer for each in self.found for layer in each.group)
        return self._times(group, tuple(layer for layer in lost if layer not in group))


def _halves(group: Group) -> tuple[Group, ...]:
    middle = len(group) // 2
    return (group[:middle], group[middle:]) if middle else ()
