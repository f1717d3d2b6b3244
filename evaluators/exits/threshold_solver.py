"""The best thresholds of early exits, from what every exit says to some images.

Heads change nothing in the trunk, so what a set of thresholds would answer and cost is known exactly from the cached
answers of all exits. A threshold decides between an answer now and an answer later; so accuracy and cost of every
combination of thresholds are sums over the images that stay, and those of a whole grid are a few cumulative sums.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from spaces.candidate import NEVER_EXIT

Floats = NDArray[np.float64]
Levels = list[Floats]
"""For each exit the thresholds on offer, ascending, from always to never."""

ALWAYS_EXIT = 0.0
"""The threshold that every confidence reaches."""
CELLS = 500_000
"""So many combinations of thresholds are looked at in all at once, at first."""
_FINE_CELLS = 60_000
_STEPS = 2.0**34
"""Costs are counted in whole such parts of the dearest, so that sums are exact and equal where they should be."""
_HIGHEST = float(np.nextafter(np.float32(1), np.float32(0)))
_MARGIN = 1e-6
"""A threshold lies so far below the confidence that it lets pass: another batch size may round it otherwise."""


@dataclass(frozen=True)
class Cost:
    """What inputs cost, in seconds or FLOPs, and how much they may on average.

    Args:
        leave: of an input that leaves at each exit and, last, of one that goes to the end, `(exits + 1,)`.
        heads: what each head adds for every input that reaches it, `(exits,)`: saved where an exit is never used.
        limit: of the mean; None where there is none.
        batch: how many inputs come together; the other costs are those of so many that leave as one.
        starts: of what lies behind each exit, the part that a batch costs of which a single input gets there,
            `(exits,)`; nothing where not given.
    """

    leave: Sequence[float]
    heads: Sequence[float]
    limit: float | None = None
    batch: int = 1
    starts: Sequence[float] = ()

    def times(self, factor: float) -> "Cost":
        """Returns so many times the cost, under the same limit."""
        leave, heads, starts = ([factor * each for each in some] for some in (self.leave, self.heads, self.starts))
        return Cost(leave, heads, self.limit, self.batch, starts)

    def unshared(self, index: int, share: Floats) -> Floats:
        """Returns what batches cost beyond their inputs' shares of it: those that stay pay for a start together.

        Args:
            index: of the exit.
            share: of the inputs that do not leave before or there; they come in random order.
        """
        if not len(self.starts):
            return np.zeros_like(share)
        return np.asarray(self.starts[index] * (1 - (1 - share) ** self.batch - share))


@dataclass(frozen=True)
class Solved:
    """The thresholds that were found.

    Args:
        thresholds: one for each exit; `NEVER_EXIT` where an exit is of no use.
        accuracy: share of right answers, or the likely one, among the images that they were chosen on.
        costs: the mean of each cost on the same images.
        shares: of the images that leave at each exit and, last, go to the end.
    """

    thresholds: tuple[float, ...]
    accuracy: float
    costs: tuple[float, ...]
    shares: tuple[float, ...]


class Thresholds:
    """Finds thresholds for what exits said to `n` images.

    With a limit on a cost the most accurate thresholds are looked for, and with a floor of accuracy alone, or by
    `is_frugal`, the cheapest. With neither, so much accuracy as `price` is worth the whole first cost. Where no
    thresholds keep all limits, those are taken that overstep them the least. Of equal ones the cheapest are, then the
    highest.

    Args:
        confidences: of each exit, 0 to 1, `(n, exits)`.
        correct: whether each exit and, last, the end is right, or how likely, `(n, exits + 1)`.
        costs: the one that counts most first.
        floor: the lowest accuracy, 0 to 1; None where there is none.
        price: see above.
        is_frugal: whether a floor asks for the cheapest beside a limit too.
    """

    def __init__(
        self,
        confidences: NDArray[np.floating],
        correct: NDArray[np.bool_] | NDArray[np.floating],
        costs: Sequence[Cost],
        floor: float | None = None,
        price: float = 0.1,
        is_frugal: bool = False,
    ) -> None:
        if correct.shape != (len(confidences), confidences.shape[1] + 1) or not len(confidences) or not costs:
            raise ValueError(f"answers are (n, exits + 1), got {correct.shape} for confidences {confidences.shape}")
        # A confidence that was rounded to 1 is less: the threshold 1 turns an exit off.
        self._confidences = np.minimum(confidences.astype(np.float32), _HIGHEST).astype(np.float64)
        self._correct = correct.astype(np.float64)
        self._costs = tuple(costs)
        self._floor = floor
        self._price = price
        self._is_frugal = is_frugal
        self._scales = [_STEPS / (max(cost.leave) or 1.0) for cost in costs]
        whole = zip(costs, self._scales, strict=True)
        self._units = [(np.rint(np.multiply(c.leave, s)), np.rint(np.multiply(c.heads, s))) for c, s in whole]
        self._sorted = np.sort(self._confidences, axis=0).T

    def solve(self) -> Solved:
        """Returns the best thresholds of a grid of quantiles, refined around the best, then by one and two exits."""
        exits = range(self._confidences.shape[1])
        most, fine = (_per_exit(cells, len(exits)) for cells in (CELLS, _FINE_CELLS))
        chosen = self._best_of([self._levels(index, most) for index in exits])
        share = 2 / most
        while share * len(self._confidences) > 1 and most < len(self._confidences):
            chosen = self._best_of([self._levels(index, fine, (chosen[index], share)) for index in exits])
            share *= 4 / fine
        return self._told(self._descend(chosen))

    def outcome(self, thresholds: Sequence[float]) -> Solved:
        """Returns what any thresholds come to."""
        return self._told([float(threshold) for threshold in thresholds])

    def _levels(self, index: int, most: int, near: tuple[float, float] | None = None) -> Floats:
        """Returns at most so many thresholds of one exit: every value, or quantiles of the images' values.

        Args:
            index: of the exit.
            most: how many, both ends included.
            near: a threshold, which is one of them, and a share of the images on either side, where the others lie.
        """
        places, own = self._sorted[index], list[float]()
        if near is not None:
            middle = np.searchsorted(places, near[0]) / len(places)
            low, high = (int((middle + side * near[1]) * len(places)) for side in (-1, 1))
            places, own = places[max(low, 0) : max(high, 1)], [near[0]]
        values = np.unique(places)
        if len(values) > most - 3:
            values = places[np.linspace(0, len(places) - 1, max(most - 3, 1)).round().astype(int)]
        return np.unique([ALWAYS_EXIT, *values, *own, NEVER_EXIT])

    def _best_of(self, levels: Levels) -> list[float]:
        """Returns the best combination of these levels."""
        right: Floats = np.array(self._correct[:, 0].sum())
        sums = [np.array(leave[0] * len(self._correct)) for leave, _ in self._units]
        stay: Floats = np.array(float(len(self._correct)))
        cell, shape = np.zeros(len(self._correct), np.int64), tuple[int, ...]()
        for index, level in enumerate(levels):
            cell = cell * (len(level) + 1) + np.searchsorted(level, self._confidences[:, index], "right")
            shape = (*shape, len(level))
            right = right[..., None] + _passed(cell, shape, self._correct[:, index + 1] - self._correct[:, index])
            reached, stay = stay[..., None], _passed(cell, shape)
            for position, (leave, heads) in enumerate(self._units):
                sums[position] = sums[position][..., None] + stay * (leave[index + 1] - leave[index])
                sums[position] += self._unshared(position, index, stay)
                if heads[index]:
                    sums[position] -= reached * heads[index] * (level >= NEVER_EXIT)
        best = np.unravel_index(_first(self._keys(right, sums)), shape)
        return [float(level[at]) for level, at in zip(levels, best, strict=True)]

    def _unshared(self, position: int, index: int, stay: Floats) -> Floats:
        """Returns what a cost's starts add to its sum where so many images stay, in whole parts."""
        n, cost = len(self._correct), self._costs[position]
        return np.asarray(np.rint(cost.unshared(index, stay / n) * n * self._scales[position]))

    def _descend(self, chosen: list[float]) -> list[float]:
        """Returns thresholds that no change of a single one betters, nor any of the tried changes of two at once."""
        exits = range(len(chosen))
        at = 0
        since = 0
        pairs = list(combinations(exits, 2))
        moves = [*combinations(exits, 1), *pairs]
        while since < len(moves):
            move = moves[at % len(moves)]
            most = len(self._confidences) + 3 if len(move) == 1 else _per_exit(_FINE_CELLS // len(pairs), 2)
            levels = [np.array([value]) for value in chosen]
            for index in move:
                levels[index] = self._levels(index, most, (chosen[index], 1.0))
            before, chosen = chosen, self._best_of(levels)
            since, at = since + 1 if chosen == before else 0, at + 1
        return chosen

    def _keys(self, right: Floats, sums: Sequence[Floats]) -> list[Floats]:
        n = len(self._correct)
        means = [total / (scale * n) for total, scale in zip(sums, self._scales, strict=True)]
        over: Floats = np.zeros_like(right)
        for cost, mean in zip(self._costs, means, strict=True):
            if cost.limit is not None:
                over += np.maximum(mean / cost.limit - 1, 0)
        if self._floor is not None:
            over += np.maximum(self._floor - right / n, 0)
        over = np.where(over < 1e-9, 0.0, over)
        if any(cost.limit is not None for cost in self._costs) and not self._is_frugal:
            return [over, -right, *sums]
        if self._floor is not None:
            return [over, *sums, -right]
        full = self._costs[0].leave[-1] - sum(self._costs[0].heads)
        return [over, self._price * means[0] / (full or 1.0) - right / n, *sums]

    def _exits(self, thresholds: Sequence[float]) -> NDArray[np.int64]:
        """Returns where each image leaves, `(n,)`."""
        leaves = self._confidences >= np.asarray(thresholds)
        first: NDArray[np.int64] = np.where(leaves.any(axis=1), leaves.argmax(axis=1), leaves.shape[1])
        return first

    def _told(self, thresholds: list[float]) -> Solved:
        exits = self._exits(thresholds)
        n, count = len(exits), len(thresholds)
        shares = np.bincount(exits, minlength=count + 1) / n
        used = [value if share else NEVER_EXIT for value, share in zip(thresholds, shares, strict=False)]
        off = np.array(used) >= NEVER_EXIT
        stay = n - np.cumsum(np.bincount(exits, minlength=count + 1))[:-1].astype(np.float64)
        means = []
        for position, ((leave, heads), scale) in enumerate(zip(self._units, self._scales, strict=True)):
            total = (leave - np.cumsum(np.append(heads * off, 0.0)))[exits].sum()
            total += sum(float(self._unshared(position, index, left)) for index, left in enumerate(stay))
            means.append(float(total / scale / n))
        told = tuple(self._safe(index, value) for index, value in enumerate(used))
        return Solved(told, float(self._correct[np.arange(n), exits].mean()), tuple(means), tuple(map(float, shares)))

    def _safe(self, index: int, threshold: float) -> float:
        """Returns a threshold a little below the confidences that reach it, and above those that do not."""
        values = self._sorted[index]
        at = int(np.searchsorted(values, threshold))
        if threshold >= NEVER_EXIT or threshold <= ALWAYS_EXIT or at == len(values):
            return threshold
        below = values[at - 1] if at else ALWAYS_EXIT
        lower = float(np.float32(max(values[at] - _MARGIN, (values[at] + below) / 2)))
        return lower if below < lower < values[at] else float(values[at])


def _per_exit(cells: int, exits: int) -> int:
    return max(int(cells ** (1 / exits) + 1e-9), 4)


def _passed(cells: NDArray[np.int64], shape: tuple[int, ...], weights: Floats | None = None) -> Floats:
    """Returns, for every combination of levels, the sum of the weights of the images that stay below all of them.

    Args:
        cells: of each image: how many levels of each exit its confidence reaches, one more than levels to an exit.
        shape: how many levels each exit has.
        weights: of each image; 1 where not given.
    """
    wide = tuple(length + 1 for length in shape)
    found = np.bincount(cells, weights, int(np.prod(wide))).reshape(wide).astype(np.float64)
    for axis in range(len(shape)):
        np.cumsum(found, axis=axis, out=found)
    return found[tuple(slice(length) for length in shape)]


def _first(keys: Sequence[Floats]) -> int:
    """Returns the place of the smallest first key, of equals the smallest next one, at last the highest thresholds."""
    best = np.arange(keys[0].size)
    for key in keys:
        found = key.ravel()[best]
        best = best[found == found.min()]
    return int(best[-1])
