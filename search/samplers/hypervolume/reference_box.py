"""The box in which hypervolume counts: between the costs that nothing is below and the worst that count."""

from dataclasses import dataclass

import numpy as np

from search.samplers.hypervolume.encoding import Array
from search.samplers.hypervolume.models import Functions, Posteriors
from search.samplers.hypervolume.observations import Observations
from search.samplers.hypervolume.prior import ProblemPrior
from search.samplers.non_domination import is_non_dominated

_MARGIN = 0.1
"""Where nobody knows a reference point, it lies beyond the front by this share of what was measured."""


@dataclass(frozen=True)
class ReferenceBox:
    """Where hypervolume counts, and what was measured in it.

    Args:
        front: the feasible, non-dominated costs that were measured, `(k, m)`.
        transformed_front: the same, transformed.
        reference: the reference point: the worst costs that count, `(m,)`; infinite where nobody knows.
        ideal: costs that nothing is below, `(m,)`; minus infinity where nobody knows.
        worst: the highest costs that rows may have to be of use, transformed, `(m,)`; infinite where there is none.
        limits: the highest feasible costs, transformed, `(m,)`; infinite where there is none.
        spans: standard deviations of what was measured, transformed, `(m,)`.
    """

    front: Array
    transformed_front: Array
    reference: Array
    ideal: Array
    worst: Array
    limits: Array
    spans: Array

    @classmethod
    def of(cls, observations: Observations, posteriors: Posteriors, prior: ProblemPrior | None) -> "ReferenceBox":
        """Returns the box that the prior knows, or else one around what was measured."""
        feasible = observations.costs[observations.is_feasible]
        front = feasible[is_non_dominated(feasible)]
        reference = _reference(observations, front, prior)
        transformed = posteriors.transformed(observations.costs)
        worst = reference if prior is not None else observations.limits
        return cls(
            front=front,
            transformed_front=posteriors.transformed(front),
            reference=reference,
            ideal=_ideal(len(reference), prior),
            worst=posteriors.transformed(worst[None])[0],
            limits=posteriors.transformed(observations.limits[None])[0],
            spans=np.maximum([_std(column) for column in transformed.T], 1e-9),
        )

    def evaluate(self, functions: Functions, rows: Array) -> tuple[Array, Array]:
        """Returns transformed costs `(n, m)`, and how far rows `(n, d)` lie outside of the box in sum, `(n,)`.

        Args:
            functions: give costs and constraints.
            rows: `(n, d)`.
        """
        costs = np.stack([function(rows) for function in functions.objectives], axis=1)
        outside = np.maximum((costs - self.worst) / self.spans, 0.0).sum(axis=1)
        for function in functions.constraints:
            outside += np.maximum(function(rows), 0.0)
        return costs, np.asarray(outside)

    def worst_margin(self, functions: Functions, rows: Array) -> Array:
        """Returns by how much rows miss the limit that they miss most; negative where they keep them all, `(n,)`.

        Args:
            functions: give costs and constraints.
            rows: `(n, d)`.
        """
        costs = np.stack([function(rows) for function in functions.objectives], axis=1)
        margins = (costs - self.worst) / self.spans
        constraints = [function(rows) for function in functions.constraints]
        return np.asarray(np.column_stack([margins, *constraints]).max(axis=1))


def _reference(observations: Observations, front: Array, prior: ProblemPrior | None) -> Array:
    """Returns the worst costs that count, `(m,)`: limits, what the prior knows, or else a little beyond the front."""
    reference = observations.limits.copy()
    if prior is not None:
        worst = [-target.worst if target.kind == "accuracy" else target.worst for target in prior.objectives]
        reference = np.minimum(reference, worst)
    if not len(front):
        return reference
    complete = observations.costs[observations.is_complete]
    beyond = front.max(axis=0) + _MARGIN * np.maximum(np.ptp(complete, axis=0), 1e-12)
    return np.where(np.isfinite(reference), reference, beyond)


def _ideal(objectives: int, prior: ProblemPrior | None) -> Array:
    if prior is None:
        return np.full(objectives, -np.inf)
    return np.array([target.ideal_cost for target in prior.objectives])


def _std(values: Array) -> float:
    """Returns the standard deviation of what is no NaN; 1 where everything is."""
    return float(np.nanstd(values)) if (~np.isnan(values)).any() else 1.0
