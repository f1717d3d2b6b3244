"""Counts trials without improvement, for `--patience`."""

from collections.abc import Mapping, Sequence

from evaluators.measurement import Measurement
from search.config.budget import Budget
from search.config.objectives import Objectives
from search.results.pareto import Version, feasible, hypervolume, nearest_miss, pareto

LEAST = 1e-3
"""Relative growth of the hypervolume, or decrease of the violation, below which there is no improvement."""


class Patience:
    """Counts trials since the last improvement: of the hypervolume, or before any version is feasible of the violation.

    Args:
        budget: of the search.
        dense: the dense network's measurements.
        objectives: of the search.
        simple: versions measured before the first trial; finding them again is no improvement.
    """

    def __init__(
        self,
        budget: Budget,
        dense: Mapping[str, Measurement],
        objectives: Objectives,
        simple: Sequence[Version] = (),
    ) -> None:
        self._budget, self._dense = budget, dense
        self._objectives = objectives
        self._front: list[Version] = []
        self._hypervolume = 0.0
        self._least_violation = float("inf")
        self.trials = 0
        for version in simple:
            self._improves(version)

    def count(self, version: Version | None) -> None:
        """Counts a trial and the version that it measured; None for a failure or a duplicate."""
        self.trials += 1
        if version is not None and self._improves(version):
            self.trials = 0

    def _improves(self, version: Version) -> bool:
        if not feasible([version], self._budget, self._dense):
            miss = nearest_miss([version], self._budget, self._dense)
            violation = sum(miss[1].values()) if miss else float("inf")
            if self._front or violation >= self._least_violation * (1 - LEAST):
                return False
            self._least_violation = violation
            return True
        front = pareto([*self._front, version], self._objectives)
        share = hypervolume(front, self._budget, self._dense, self._objectives)
        is_improved = not self._front or share > self._hypervolume * (1 + LEAST)
        self._front = front
        self._hypervolume = max(share, self._hypervolume)
        return is_improved
