"""Which layers are slower in a lower precision than in a higher one, found by timing the whole network both ways.

A layer's own time says little: what it costs depends on what it fuses with and on the conversions around it. So the
dense network runs in the lower precision, and a layer of it, with all that fuses with it, goes back to the higher one.
If the network is then faster, and by more than chance, the layer does not belong in the lower precision.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

GROUPS = 8
"""Layers are flipped in at least so many groups of neighbours; groups that do not clearly gain are halved further."""
TIMINGS = 30
"""At most so many pairs are timed for one precision."""
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


UNKNOWN = Interval(1.0, math.inf)
"""Neither faster nor slower."""
Time = Callable[[Group, Group], Interval]
"""Times a network with one group, and those before it, flipped back, beside the same with only the latter."""


@dataclass(frozen=True)
class Slower:
    """Layers that cost the network time in one precision.

    Args:
        layers: one, or neighbours that lose together and not one by one.
        precision: in which they are slower.
        instead: what they were compared with.
        ratio: of the network's time with them in `instead` to that with them in `precision`: below 1.
        half_width: of the ratio's 95% interval, as a share of it.
    """

    layers: Group
    precision: str
    instead: str
    ratio: float
    half_width: float


@dataclass(frozen=True)
class Examined:
    """What an examination found.

    Args:
        slower: what is to be left out.
        timings: pairs that were timed.
        seconds: that it took.
        refused: why networks that were to be timed could not be, each reason once; such layers stay as they are.
    """

    slower: tuple[Slower, ...] = ()
    timings: int = 0
    seconds: float = 0.0
    refused: tuple[str, ...] = ()

    def allowed(self, layers: Sequence[str], precisions: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Returns the precisions that are left to each layer, in the order of `precisions`."""
        out = {(layer, found.precision) for found in self.slower for layer in found.layers}
        return {layer: tuple(each for each in precisions if (layer, each) not in out) for layer in layers}

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready copy."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """Returns the examination that `to_dict` described."""
        found = (Slower(**{**each, "layers": tuple(each["layers"])}) for each in content["slower"])
        return cls(tuple(found), content["timings"], content["seconds"], tuple(content.get("refused", ())))


class Hunt:
    """Finds the groups of neighbours that lose, from timings alone.

    All layers are flipped, then halves of them, down to `GROUPS` groups, and further where a group does not clearly
    gain from the lower precision. A flip that is kept is part of all later timings. A group that still loses without
    what was found in it is found as a whole: one layer's flip costs conversions that its group's does not. So in the
    end the network as a whole does not lose either. Its halves are not tried once more after that: to bring one back is
    to flip the other alone, which was timed on the way and did not pay. What stays hidden is a loser in a group that
    gains more than it loses, and losers across the middle of a group.

    Args:
        times: a flip.
        timings: at most so many.
        is_late: whether there is no time left.
    """

    def __init__(self, times: Time, timings: int, is_late: Callable[[], bool]) -> None:
        self.found: list[tuple[Group, Interval]] = []
        self.spent = 0
        self._times, self._timings, self._is_late = times, timings, is_late

    def run(self, layers: Group) -> list[tuple[Group, Interval]]:
        """Returns the groups that lose, each with the most cautious of its timings."""
        if layers:
            self._look_into(layers, self._timed(layers), -(-len(layers) // GROUPS))
        return self.found

    def _look_into(self, group: Group, seen: Interval, fine: int) -> None:
        """Looks for what loses in a group; one that gains is divided only while it has more than `fine` layers."""
        if self._is_spent() or (seen.low > 1 and len(group) <= fine):
            return
        if len(group) > 1:
            middle = len(group) // 2
            halves = [(self._timed(half), half) for half in (group[:middle], group[middle:])]
            for interval, half in sorted(halves, key=lambda pair: pair[0].ratio):
                self._look_into(half, interval, fine)
        if seen.high < 1:
            kept = self._kept()
            rest = tuple(layer for layer in group if layer not in kept)
            self._keep_if_it_loses(rest, seen if rest == group else UNKNOWN)

    def _keep_if_it_loses(self, group: Group, seen: Interval) -> None:
        timings = [seen] if seen is not UNKNOWN else []
        while group and len(timings) <= CONFIRMATIONS:
            timings.append(self._timed(group))
            if timings[-1].high >= 1:
                return
        if group:
            self.found.append((group, max(timings, key=lambda interval: interval.high)))

    def _kept(self) -> Group:
        return tuple(layer for group, _ in self.found for layer in group)

    def _timed(self, group: Group) -> Interval:
        if self._is_spent():
            return UNKNOWN
        self.spent += 1
        return self._times(group, self._kept())

    def _is_spent(self) -> bool:
        return self.spent >= self._timings or self._is_late()
