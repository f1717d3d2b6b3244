"""Counts trials without improvement, for `--patience`."""

from collections.abc import Mapping, Sequence

from evaluators.measurement import Measurement
from search.config.budget import Budget
from search.config.objectives import Objectives
from search.results.pareto import Version, feasible, hypervolume, pareto

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
        self._least_violations: dict[bool, float] = {}
        """Of versions that were measured in full, and of others, which broke a limit before their accuracy was."""
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
            return not self._front and self._is_nearer(version)
        front = pareto([*self._front, version], self._objectives)
        share = hypervolume(front, self._budget, self._dense, self._objectives)
        is_improved = not self._front or share > self._hypervolume * (1 + LEAST)
        self._front = front
        self._hypervolume = max(share, self._hypervolume)
        return is_improved

    def _is_nearer(self, version: Version) -> bool:
        """Notes by how much a version exceeds the limits; returns whether that is less than before."""
        violation = sum(self._budget.broken(version.measured, self._dense).values(), start=0.0)
        least = self._least_violations.get(version.is_complete, float("inf"))
        if not violation or violation >= least * (1 - LEAST):
            return False
        self._least_violations[version.is_complete] = violation
        return True
