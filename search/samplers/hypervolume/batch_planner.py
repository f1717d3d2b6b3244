"""One batch of proposals: by expected hypervolume improvement, by Thompson sampling, and by exploration."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from search.samplers.hypervolume.acquisition import (
    Marginals,
    choose_by_hypervolume,
    non_dominated_points,
    probably_feasible,
)
from search.samplers.hypervolume.encoding import Array, Codec
from search.samplers.hypervolume.models import Functions, Posteriors
from search.samplers.hypervolume.nsga2 import evolve, mutate
from search.samplers.hypervolume.observations import Observations
from search.samplers.hypervolume.proposals import EXPLORATION, MODELS, Proposal, untried, untried_or_last
from search.samplers.hypervolume.reference_box import ReferenceBox

_FEASIBLE = 0.9
"""What is proposed keeps the constraints with this probability, where there is such a row: a version that breaks one is
a trial that is nearly lost."""
_BEST_PARENTS = 20
"""Rows for exploration are mutated from so many of the best."""


@dataclass(frozen=True)
class BatchPlanner:
    """Chooses rows by models, for one batch.

    Args:
        observations: what was measured.
        posteriors: what is expected.
        codec: of the space.
        parents: the best rows that were measured, `(k, d)`.
        box: where hypervolume counts.
        bias_and_std: errors of earlier predictions, `(2, m)`.
        rng: of all draws.
    """

    observations: Observations
    posteriors: Posteriors
    codec: Codec
    parents: Array
    box: ReferenceBox
    bias_and_std: Array
    rng: np.random.Generator

    def by_models(self, count: int) -> list[Proposal]:
        """Returns at most `count` rows; fewer where models see nothing to win."""
        if self.observations.is_feasible.any():
            return self.by_expected_hypervolume(count)
        return self.by_thompson_sampling(count)

    def explore(self, chosen: Sequence[Proposal], count: int) -> list[Proposal]:
        """Returns mutations of the best rows, those that are probably feasible.

        Args:
            chosen: what models propose in the same batch.
            count: how many.
        """
        best = self.parents[self.rng.integers(0, min(len(self.parents), _BEST_PARENTS), 32)]
        mutated = mutate(best, self.codec, self.rng, 2.0)
        rows = np.vstack([mutated, self.codec.random(8, self.rng)])
        rows = untried_or_last(rows, [*self.observations.tried, *(proposal.row for proposal in chosen)])
        feasible = probably_feasible(self._feasibility(Marginals.of(self.posteriors, rows)), _FEASIBLE, count)
        return [Proposal(row, EXPLORATION) for row in rows[feasible][:count]]

    def _feasibility(self, marginals: Marginals) -> Array:
        """Returns the probability that each row keeps the limits, by models as good as they were lately, `(n,)`."""
        return marginals.corrected(self.bias_and_std).feasibility(self.box.limits)

    def _evolved(self, functions: Functions) -> Array:
        """Returns the last population of NSGA-II on some functions, the best first, `(k, d)`."""
        mutated = mutate(self.parents, self.codec, self.rng, 3.0)
        start = np.vstack([self.parents, mutated, self.codec.random(20, self.rng)])
        return evolve(start, lambda rows: self.box.evaluate(functions, rows), self.codec, self.rng)[0]

    def by_thompson_sampling(self, count: int) -> list[Proposal]:
        """Returns rows that break the limits least, each by another function drawn from the posteriors.

        Source: Thompson, On the Likelihood that One Unknown Probability Exceeds Another, 1933.
        """
        chosen: list[Proposal] = []
        for number in range(count):
            functions = self.posteriors.draw(self.rng) if number else self.posteriors.means
            pool = self._evolved(functions)
            safest = np.argsort(self.box.worst_margin(functions, pool), kind="stable")
            tried = [*self.observations.tried, *(proposal.row for proposal in chosen)]
            rows = untried(pool[safest], tried)[:1]
            if len(rows):
                chosen.append(self._proposal(rows[0], Marginals.of(self.posteriors, rows).means[0]))
        return chosen

    def by_expected_hypervolume(self, count: int) -> list[Proposal]:
        """Returns the rows of most expected hypervolume improvement, each given those before."""
        evolved = [self._evolved(functions) for functions in (self.posteriors.means, self.posteriors.draw(self.rng))]
        pool = untried(np.vstack(evolved), self.observations.tried)
        if not len(pool):
            return []
        marginals = Marginals.of(self.posteriors, pool)
        feasible = probably_feasible(self._feasibility(marginals), _FEASIBLE, 2 * count)
        pool, marginals = pool[feasible], marginals.take(feasible)
        return [self._proposal(pool[index], marginals.means[index]) for index in self._best_batch(marginals, count)]

    def _best_batch(self, marginals: Marginals, count: int) -> list[int]:
        """Returns the indices of the rows of most expected hypervolume improvement."""
        points = self.posteriors.transformed(self._points_to_win(marginals))
        if not len(points):
            return []
        pending = np.zeros((0, len(points)))
        if len(self.observations.pending):
            pending = Marginals.of(self.posteriors, self.observations.pending).domination_probability(points)
        return choose_by_hypervolume(marginals.domination_probability(points), pending, count)

    def _points_to_win(self, marginals: Marginals) -> Array:
        """Returns points, in costs, that nothing dominates yet, `(points, m)`."""
        hoped_for = (marginals.means - marginals.stds).min(axis=0)
        best = np.minimum(hoped_for, self.box.transformed_front.min(axis=0))
        # Hopes for more than is possible would make all of that hypervolume look as if it were still to be won.
        ideal = np.maximum(self.posteriors.untransformed(best[None])[0], self.box.ideal)
        return non_dominated_points(ideal, self.box.reference, self.box.front, self.rng)

    def _proposal(self, row: Array, means: Array) -> Proposal:
        """Returns a proposal with the costs that are expected of it: another run's models may transform otherwise."""
        costs = self.posteriors.untransformed(means[None])[0]
        return Proposal(row, MODELS, tuple(float(cost) for cost in costs))
