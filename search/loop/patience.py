"""How long a search has won nothing: for `--patience`."""

from collections.abc import Mapping, Sequence

from evaluators.measurement import Measurement
from search.config.budget import Budget
from search.results.pareto import Version, feasible, hypervolume, nearest_miss, pareto

LEAST = 1e-3
"""A hypervolume that grows by less than this share of itself has not grown."""


class Patience:
    """Counts trials since the last that won hypervolume or, before any version is feasible, came nearer to the limits.

    Args:
        budget: of the search.
        dense: the dense network.
        simple: versions that are there before the first trial, and win nothing when one finds them again.
    """

    def __init__(self, budget: Budget, dense: Mapping[str, Measurement], simple: Sequence[Version] = ()) -> None:
        self._budget, self._dense = budget, dense
        self._front: list[Version] = []
        self._share, self._miss = 0.0, float("inf")
        self.trials = 0
        for version in simple:
            self._wins(version)

    def count(self, version: Version | None) -> None:
        """Takes note of a trial and of what it measured; None where that is nothing new."""
        self.trials += 1
        if version is not None and self._wins(version):
            self.trials = 0

    def _wins(self, version: Version) -> bool:
        if not feasible([version], self._budget, self._dense):
            found = nearest_miss([version], self._budget, self._dense)
            broken = sum(found[1].values()) if found else float("inf")
            if self._front or broken >= self._miss * (1 - LEAST):
                return False
            self._miss = broken
            return True
        front = pareto([*self._front, version])
        share = hypervolume(front, self._budget, self._dense)
        is_more = not self._front or share > self._share * (1 + LEAST)
        self._front, self._share = front, max(share, self._share)
        return is_more
