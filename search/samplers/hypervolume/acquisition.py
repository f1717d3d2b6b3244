"""The acquisition function: expected hypervolume improvement, by Monte Carlo over points that nothing dominates yet.

With independent posteriors, the probability that a row `x` comes to dominate a point `z` of the box between the ideal
point and the reference point, and keeps its constraints, is `p(x, z) = P(feasible) Πⱼ Φ((zⱼ - μⱼ(x)) / σⱼ(x))`. Its
integral over the points that the front does not dominate is the expected hypervolume improvement of `x`. A batch is
chosen greedily: after rows `x₁ … xₖ`, which may be under way, a point is still to be won with `Πᵢ (1 - p(xᵢ, z))`.

Sources: Emmerich, Giannakoglou and Naujoks, Single- and Multiobjective Evolutionary Optimization Assisted by Gaussian
Random Field Metamodels, 2006; Gardner et al., Bayesian Optimization with Inequality Constraints, 2014; Daulton,
Balandat and Bakshy, Differentiable Expected Hypervolume Improvement for Parallel Multi-Objective Bayesian
Optimization, 2020, for batches one after the other.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_ndtr, ndtr

from search.samplers.hypervolume.encoding import Array
from search.samplers.hypervolume.models import Posteriors

_POINTS = 3000
"""The hypervolume that is still to be won is a share of so many random points."""
_DRAWS = 40_000
_LEAST_STD = 1e-9


@dataclass(frozen=True)
class Marginals:
    """What is expected of `n` rows, each on its own: normal distributions of transformed costs.

    Args:
        means: of objectives, `(n, m)`.
        stds: their standard deviations, `(n, m)`.
        log_feasibility: log probability that the constraints that are no functions of objectives are kept, `(n,)`.
    """

    means: Array
    stds: Array
    log_feasibility: Array

    @classmethod
    def of(cls, posteriors: Posteriors, rows: Array) -> "Marginals":
        """Returns what is expected of rows `(n, d)`."""
        objectives = [posterior.means_and_stds(rows) for posterior in posteriors.objectives]
        log_feasibility = np.zeros(len(rows))
        for posterior in posteriors.constraints.values():
            means, stds = posterior.means_and_stds(rows)
            log_feasibility += log_ndtr(-means / np.maximum(stds, _LEAST_STD))
        return cls(
            np.stack([means for means, _ in objectives], axis=1),
            np.stack([stds for _, stds in objectives], axis=1),
            log_feasibility,
        )

    def feasibility(self, limits: Array) -> Array:
        """Returns the probability that each row keeps all constraints, `(n,)`.

        Args:
            limits: the highest feasible costs, transformed; infinite where there is none, `(m,)`.
        """
        total = self.log_feasibility.copy()
        for means, stds, limit in zip(self.means.T, self.stds.T, limits, strict=True):
            if np.isfinite(limit):
                total += log_ndtr((limit - means) / np.maximum(stds, _LEAST_STD))
        return np.asarray(np.exp(total))

    def corrected(self, bias_and_std: Array) -> "Marginals":
        """Returns the same, corrected for the errors of earlier predictions.

        Args:
            bias_and_std: by how much measurements were worse than predicted, transformed: the mean, at least 0, and the
                standard deviation, `(2, m)`.
        """
        return Marginals(self.means + bias_and_std[0], np.hypot(self.stds, bias_and_std[1]), self.log_feasibility)

    def take(self, indices: NDArray[np.int64]) -> "Marginals":
        """Returns what is expected of some of the rows."""
        return Marginals(self.means[indices], self.stds[indices], self.log_feasibility[indices])

    def domination_probability(self, points: Array) -> Array:
        """Returns the probability that each row is feasible and at least as good as each point, `(n, points)`.

        Args:
            points: transformed costs, `(points, m)`.
        """
        probability = np.exp(self.log_feasibility)[:, None] * np.ones(len(points))
        for means, stds, costs in zip(self.means.T, self.stds.T, points.T, strict=True):
            probability *= ndtr((costs[None, :] - means[:, None]) / np.maximum(stds, _LEAST_STD)[:, None])
        return probability


def probably_feasible(feasibility: Array, enough: float, fewest: int) -> NDArray[np.int64]:
    """Returns the indices, in order, of the rows that are feasible with a probability.

    Args:
        feasibility: the probability of each row, `(n,)`.
        enough: the probability that is asked for.
        fewest: if so many rows do not have it, the most probable ones are taken.
    """
    indices = np.flatnonzero(feasibility >= enough)
    if len(indices) >= fewest:
        return indices
    return np.sort(np.argsort(-feasibility, kind="stable")[:fewest])


def non_dominated_points(ideal: Array, reference: Array, front: Array, rng: np.random.Generator) -> Array:
    """Returns random points of a box that nothing on the front dominates, `(points, m)`; none where all are dominated.

    Args:
        ideal: the box's best corner, `(m,)`.
        reference: its worst, `(m,)`.
        front: costs, `(k, m)`.
        rng: of the draws.
    """
    points = ideal + rng.random((_DRAWS, len(ideal))) * (reference - ideal)
    for cost in front:
        points = points[~(cost <= points).all(axis=1)]
    return points[:_POINTS]


def choose_by_hypervolume(probabilities: Array, pending: Array, count: int) -> list[int]:
    """Returns the indices of the rows of most expected hypervolume improvement, each given those chosen before.

    Args:
        probabilities: that each row dominates each non-dominated point, `(n, points)`.
        pending: the same of rows that are being measured, `(k, points)`.
        count: how many at most; fewer where nothing is to be won.
    """
    still_to_win = np.prod(1 - pending, axis=0)
    chosen: list[int] = []
    while len(chosen) < min(count, len(probabilities)):
        improvements = probabilities @ still_to_win
        improvements[chosen] = -1.0
        best = int(np.argmax(improvements))
        if improvements[best] <= 1e-9 * max(len(still_to_win), 1):
            break
        chosen.append(best)
        still_to_win = still_to_win * (1 - probabilities[best])
    return chosen
