"""The best thresholds of early exits, from the predictions of all exits for some images.

Exit heads do not change the trunk, so the accuracy and cost of any set of thresholds follow exactly from the cached
predictions of all exits. Both are sums over the images that stay at each exit, so those of a whole grid of threshold
combinations are a few cumulative sums.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Levels = list[Floats]
"""For each exit the thresholds to try, ascending, from `_ALWAYS_EXIT` to `_NEVER_EXIT`."""

_ALWAYS_EXIT = 0.0
"""The threshold that every confidence reaches."""
_NEVER_EXIT = 1.0
"""The threshold that no confidence reaches: while solving, confidences are below 1."""
CELLS = 500_000
"""The size of the first grid: the number of threshold combinations that are evaluated at once."""
_FINE_CELLS = 60_000
"""The size of the grids that refine the best combination."""
_COST_UNITS = 2.0**34
"""Costs are rounded to this fraction of the highest cost, so that sums are exact and equal costs compare equal."""
_HIGHEST = float(np.nextafter(np.float32(1), np.float32(0)))
_MARGIN = 1e-6
"""Thresholds lie this far below the lowest confidence that exits: another batch size may round it differently."""


@dataclass(frozen=True)
class Cost:
    """What an input costs by the exit that it takes, in seconds or FLOPs, and the limit on the mean.

    Args:
        leave: the cost of an input that leaves at each exit and, last, of one that runs to the end, `(exits + 1,)`.
        heads: the cost of each exit's head, `(exits,)`: saved where an exit is never used.
        limit: the highest allowed mean cost; None for no limit.
        batch: the batch size; `leave` and `heads` are costs of a batch whose inputs all take the same exit.
        starts: the fixed part of the cost of the stages after each exit, which a batch pays as soon as one of its
            inputs gets there, `(exits,)`; empty for none.
    """

    leave: Sequence[float]
    heads: Sequence[float]
    limit: float | None = None
    batch: int = 1
    starts: Sequence[float] = ()

    def times(self, factor: float) -> "Cost":
        """Returns these costs times a factor, under the same limit."""
        leave, heads, starts = ([factor * cost for cost in costs] for costs in (self.leave, self.heads, self.starts))
        return Cost(leave, heads, self.limit, self.batch, starts)

    def unshared(self, index: int, share: Floats) -> Floats:
        """Returns the fixed cost per input that partly filled batches pay beyond the proportional share.

        Args:
            index: of the exit.
            share: the share of inputs that go on after this exit; inputs come in random order.
        """
        if not len(self.starts):
            return np.zeros_like(share)
        return np.asarray(self.starts[index] * (1 - (1 - share) ** self.batch - share))


@dataclass(frozen=True)
class Solution:
    """Thresholds with their accuracy and costs.

    Args:
        thresholds: one for each exit; None for an exit that is not used.
        accuracy: the share of right answers, or its expected value, on the images that were given.
        costs: the mean of each cost on the same images.
        shares: the share of images that leave at each exit and, last, run to the end.
    """

    thresholds: tuple[float | None, ...]
    accuracy: float
    costs: tuple[float, ...]
    shares: tuple[float, ...]


class ThresholdSolver:
    """Finds the best exit thresholds for the predictions on `n` images.

    With a limit on any cost it maximizes accuracy. With an accuracy floor only, or with `is_frugal`, it minimizes the
    costs. With neither it minimizes `price * first cost / its full cost - accuracy`. If no thresholds keep all limits,
    those that exceed them least are returned. Ties go to the cheapest thresholds, then to the highest.

    Args:
        confidences: of each exit, 0 to 1, `(n, exits)`.
        correct: whether each exit and, last, the end is right, or the probability of it, `(n, exits + 1)`.
        costs: the most important one first.
        floor: the lowest allowed accuracy, 0 to 1; None for no floor.
        price: the accuracy, 0 to 1, that is worth the whole first cost.
        is_frugal: whether to minimize costs above the floor although a cost has a limit too.
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
        # Confidences that were rounded up to 1 are lowered: no confidence reaches `_NEVER_EXIT`.
        self._confidences = np.minimum(confidences.astype(np.float32), _HIGHEST).astype(np.float64)
        self._correct = correct.astype(np.float64)
        self._costs = tuple(costs)
        self._floor = floor
        self._price = price
        self._is_frugal = is_frugal
        self._scales = [_COST_UNITS / (max(cost.leave) or 1.0) for cost in costs]
        whole = zip(costs, self._scales, strict=True)
        self._units = [(np.rint(np.multiply(c.leave, s)), np.rint(np.multiply(c.heads, s))) for c, s in whole]
        self._sorted = np.sort(self._confidences, axis=0).T

    def solve(self) -> Solution:
        """Returns the best thresholds: from a grid of quantiles, refined by finer grids, then by coordinate descent."""
        exits = range(self._confidences.shape[1])
        coarse, fine = (_per_exit(cells, len(exits)) for cells in (CELLS, _FINE_CELLS))
        chosen = self._best_of([self._levels(index, coarse) for index in exits])
        share = 2 / coarse
        while share * len(self._confidences) > 1 and coarse < len(self._confidences):
            chosen = self._best_of([self._levels(index, fine, (chosen[index], share)) for index in exits])
            share *= 4 / fine
        return self._solution(self._descend(chosen))

    def outcome(self, thresholds: Sequence[float | None]) -> Solution:
        """Returns the accuracy and costs of given thresholds; None for exits that are not used."""
        return self._solution([_NEVER_EXIT if threshold is None else threshold for threshold in thresholds])

    def _levels(self, index: int, limit: int, near: tuple[float, float] | None = None) -> Floats:
        """Returns thresholds to try for one exit: all confidences of the images, or quantiles of them.

        Args:
            index: of the exit.
            limit: the largest number of thresholds, both ends included.
            near: a threshold to include, and the share of images on either side of it to which the others are
                restricted; None for all images.
        """
        confidences, included = self._sorted[index], list[float]()
        if near is not None:
            middle = np.searchsorted(confidences, near[0]) / len(confidences)
            low, high = (int((middle + side * near[1]) * len(confidences)) for side in (-1, 1))
            confidences, included = confidences[max(low, 0) : max(high, 1)], [near[0]]
        values = np.unique(confidences)
        if len(values) > limit - 3:
            values = confidences[np.linspace(0, len(confidences) - 1, max(limit - 3, 1)).round().astype(int)]
        return np.unique([_ALWAYS_EXIT, *values, *included, _NEVER_EXIT])

    def _best_of(self, levels: Levels) -> list[float]:
        """Returns the best combination of the thresholds to try, one level of each exit."""
        correct: Floats = np.array(self._correct[:, 0].sum())
        sums = [np.array(leave[0] * len(self._correct)) for leave, _ in self._units]
        stay: Floats = np.array(float(len(self._correct)))
        cell, shape = np.zeros(len(self._correct), np.int64), tuple[int, ...]()
        for index, level in enumerate(levels):
            cell = cell * (len(level) + 1) + np.searchsorted(level, self._confidences[:, index], "right")
            shape = (*shape, len(level))
            later = self._correct[:, index + 1] - self._correct[:, index]
            correct = correct[..., None] + _staying_sums(cell, shape, later)
            reached, stay = stay[..., None], _staying_sums(cell, shape)
            for position, (leave, heads) in enumerate(self._units):
                sums[position] = sums[position][..., None] + stay * (leave[index + 1] - leave[index])
                sums[position] += self._unshared(position, index, stay)
                if heads[index]:
                    sums[position] -= reached * heads[index] * (level >= _NEVER_EXIT)
        best = np.unravel_index(_lexicographic_minimum(self._keys(correct, sums)), shape)
        return [float(level[position]) for level, position in zip(levels, best, strict=True)]

    def _unshared(self, position: int, index: int, stay: Floats) -> Floats:
        """Returns the fixed cost that partly filled batches add to a cost's sum, in whole cost units.

        Args:
            position: of the cost.
            index: of the exit.
            stay: the number of images that go on after this exit.
        """
        n, cost = len(self._correct), self._costs[position]
        return np.asarray(np.rint(cost.unshared(index, stay / n) * n * self._scales[position]))

    def _descend(self, chosen: list[float]) -> list[float]:
        """Returns thresholds that no change of one exit improves, nor any change of two exits that is tried."""
        exits = range(len(chosen))
        turn = 0
        unchanged = 0
        pairs = list(combinations(exits, 2))
        moves = [*combinations(exits, 1), *pairs]
        while unchanged < len(moves):
            move = moves[turn % len(moves)]
            limit = len(self._confidences) + 3 if len(move) == 1 else _per_exit(_FINE_CELLS // len(pairs), 2)
            levels = [np.array([value]) for value in chosen]
            for index in move:
                levels[index] = self._levels(index, limit, (chosen[index], 1.0))
            before, chosen = chosen, self._best_of(levels)
            unchanged = unchanged + 1 if chosen == before else 0
            turn += 1
        return chosen

    def _keys(self, correct: Floats, sums: Sequence[Floats]) -> list[Floats]:
        """Returns what to minimize, the most important first: by how much limits are exceeded, then the objectives.

        Args:
            correct: the number of right answers of each combination of thresholds.
            sums: of each combination, the sum of each cost over the images.
        """
        n = len(self._correct)
        means = [total / (scale * n) for total, scale in zip(sums, self._scales, strict=True)]
        excess: Floats = np.zeros_like(correct)
        for cost, mean in zip(self._costs, means, strict=True):
            if cost.limit is not None:
                excess += np.maximum(mean / cost.limit - 1, 0)
        if self._floor is not None:
            excess += np.maximum(self._floor - correct / n, 0)
        excess = np.where(excess < 1e-9, 0.0, excess)
        if any(cost.limit is not None for cost in self._costs) and not self._is_frugal:
            return [excess, -correct, *sums]
        if self._floor is not None:
            return [excess, *sums, -correct]
        full = self._costs[0].leave[-1] - sum(self._costs[0].heads)
        return [excess, self._price * means[0] / (full or 1.0) - correct / n, *sums]

    def _exits(self, thresholds: Sequence[float]) -> NDArray[np.int64]:
        """Returns the index of the exit that each image takes, `(n,)`."""
        leaves = self._confidences >= np.asarray(thresholds)
        first: NDArray[np.int64] = np.where(leaves.any(axis=1), leaves.argmax(axis=1), leaves.shape[1])
        return first

    def _solution(self, thresholds: list[float]) -> Solution:
        exits = self._exits(thresholds)
        n, count = len(exits), len(thresholds)
        shares = np.bincount(exits, minlength=count + 1) / n
        used = [value if share else _NEVER_EXIT for value, share in zip(thresholds, shares, strict=False)]
        off = np.array(used) >= _NEVER_EXIT
        stay = n - np.cumsum(np.bincount(exits, minlength=count + 1))[:-1].astype(np.float64)
        means = []
        for position, ((leave, heads), scale) in enumerate(zip(self._units, self._scales, strict=True)):
            total = (leave - np.cumsum(np.append(heads * off, 0.0)))[exits].sum()
            total += sum(float(self._unshared(position, index, left)) for index, left in enumerate(stay))
            means.append(float(total / scale / n))
        safe = tuple(None if value >= _NEVER_EXIT else self._safe(index, value) for index, value in enumerate(used))
        accuracy = float(self._correct[np.arange(n), exits].mean())
        return Solution(safe, accuracy, tuple(means), tuple(map(float, shares)))

    def _safe(self, index: int, threshold: float) -> float:
        """Returns the threshold moved a little below the lowest confidence that reaches it, against rounding."""
        values = self._sorted[index]
        position = int(np.searchsorted(values, threshold))
        if threshold <= _ALWAYS_EXIT or position == len(values):
            return threshold
        reaching = values[position]
        below = values[position - 1] if position else _ALWAYS_EXIT
        lower = float(np.float32(max(reaching - _MARGIN, (reaching + below) / 2)))
        return lower if below < lower < reaching else float(reaching)


def _per_exit(cells: int, exits: int) -> int:
    """Returns how many thresholds each exit gets in a grid of so many cells, at least 4."""
    return max(int(cells ** (1 / exits) + 1e-9), 4)


def _staying_sums(cells: NDArray[np.int64], shape: tuple[int, ...], weights: Floats | None = None) -> Floats:
    """Returns, for each combination of thresholds, the sum of the weights of the images that stay at all exits.

    Args:
        cells: of each image, a flat index made of the number of thresholds of each exit that its confidence reaches.
        shape: the number of thresholds of each exit.
        weights: of each image; 1 where not given.
    """
    wide = tuple(length + 1 for length in shape)
    sums = np.bincount(cells, weights, int(np.prod(wide))).reshape(wide).astype(np.float64)
    for axis in range(len(shape)):
        np.cumsum(sums, axis=axis, out=sums)
    return sums[tuple(slice(length) for length in shape)]


def _lexicographic_minimum(keys: Sequence[Floats]) -> int:
    """Returns the flat index of the lexicographically smallest keys; of ties the last one: the highest thresholds."""
    best = np.arange(keys[0].size)
    for key in keys:
        values = key.ravel()[best]
        best = best[values == values.min()]
    return int(best[-1])
