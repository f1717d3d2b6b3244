"""Which rows to measure: those that add most to the hypervolume, as far as anyone can tell."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_ndtr, ndtr

from search.samplers.hypervolume.encoding import Array
from search.samplers.hypervolume.models import Beliefs

_POINTS = 3000
"""The hypervolume that is still to be won is a share of so many random points."""
_DRAWS = 40_000


@dataclass(frozen=True)
class Forecast:
    """What is expected of rows, on the scale of each cost.

    Args:
        means: of objectives, `(n, m)`.
        deviations: of them.
        possible: probability that the constraints that are no functions of objectives are kept, as a logarithm, `(n,)`.
    """

    means: Array
    deviations: Array
    possible: Array

    @classmethod
    def of(cls, beliefs: Beliefs, rows: Array) -> "Forecast":
        """Returns what is expected of rows."""
        found = [belief.means_and_deviations(rows) for belief in beliefs.objectives]
        possible = np.zeros(len(rows))
        for belief in beliefs.others.values():
            means, deviations = belief.means_and_deviations(rows)
            possible += log_ndtr(-means / np.maximum(deviations, 1e-9))
        return cls(np.stack([mean for mean, _ in found], axis=1), np.stack([sd for _, sd in found], axis=1), possible)

    def keeps(self, limits: Array) -> Array:
        """Returns the probability that each row is feasible, `(n,)`.

        Args:
            limits: the highest costs that are, on the scales; infinite where there is none, `(m,)`.
        """
        found = self.possible.copy()
        for mean, deviation, limit in zip(self.means.T, self.deviations.T, limits, strict=True):
            if np.isfinite(limit):
                found += log_ndtr((limit - mean) / np.maximum(deviation, 1e-9))
        return np.asarray(np.exp(found))

    def wary(self, missed: Array) -> "Forecast":
        """Returns the same as it has to be read where earlier forecasts were wrong.

        Args:
            missed: by how much measurements were worse than forecasts of them, on the scales: the mean, at least 0,
                and the standard deviation, `(2, m)`.
        """
        return Forecast(self.means + missed[0], np.hypot(self.deviations, missed[1]), self.possible)

    def some(self, places: NDArray[np.int64]) -> "Forecast":
        """Returns what is expected of some of the rows."""
        return Forecast(self.means[places], self.deviations[places], self.possible[places])

    def beats(self, points: Array) -> Array:
        """Returns the probability that each row is feasible and at least as good as each point, `(n, points)`."""
        found = np.exp(self.possible)[:, None] * np.ones(len(points))
        for mean, deviation, places in zip(self.means.T, self.deviations.T, points.T, strict=True):
            found *= ndtr((places[None, :] - mean[:, None]) / np.maximum(deviation, 1e-9)[:, None])
        return found


def likely(chances: Array, enough: float, fewest: int) -> NDArray[np.int64]:
    """Returns the places, in order, of what has chance enough, and if they are fewer than asked for, of the best."""
    found = np.flatnonzero(chances >= enough)
    return found if len(found) >= fewest else np.sort(np.argsort(-chances, kind="stable")[:fewest])


def open_points(low: Array, reference: Array, front: Array, rng: np.random.Generator) -> Array:
    """Returns random points between `low` and `reference` that nothing on the front dominates, `(points, m)`."""
    points = low + rng.random((_DRAWS, len(low))) * (reference - low)
    for cost in front:
        points = points[~(cost <= points).all(axis=1)]
    return points[:_POINTS]


def choose_by_hypervolume(beats: Array, pending: Array, count: int) -> list[int]:
    """Returns the places of the rows that add most, one after the other, each in sight of what was chosen before.

    Args:
        beats: the probability that each row dominates each open point, `(n, points)`.
        pending: the same of rows that are being measured, `(k, points)`.
        count: how many at most; fewer where nothing is to be won.
    """
    still_open = np.prod(1 - pending, axis=0)
    chosen: list[int] = []
    while len(chosen) < min(count, len(beats)):
        gains = beats @ still_open
        gains[chosen] = -1.0
        best = int(np.argmax(gains))
        if gains[best] <= 1e-9 * max(len(still_open), 1):
            break
        chosen.append(best)
        still_open = still_open * (1 - beats[best])
    return chosen
