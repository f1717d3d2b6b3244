"""The thresholds of one candidate's exits as a problem: what exits say, what exit paths cost, and the limits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluators.exits.correctness import correctness_probabilities
from evaluators.exits.threshold_solver import Cost, Solution, ThresholdSolver
from evaluators.measurement import Measurement
from spaces.candidate import NEVER_EXIT

_EQUIVALENT = 0.5
"""Expected accuracies that differ by fewer images than this are equal: counting could not tell them apart."""
_LEAST_MARGIN = 0.01
"""Of a limit: an interval of a few turns may be narrow by luck."""
_MOST_MARGIN = 0.1
"""Of a limit: what lies further below is too dear a price for a timing that was disturbed."""


@dataclass(frozen=True)
class ResolvedThresholds:
    """Thresholds of a candidate's exits, and what they come to on the images that they were chosen on.

    Args:
        thresholds: of each exit; `NEVER_EXIT` where it is never used.
        accuracy: the share of right answers, counted.
        expected_accuracy: the same as the likelihood of right answers tells it.
        costs: means by metric, the limited one first, in seconds or FLOPs.
        shares: of the images that leave at each exit and, last, go to the end.
        images: how many there were.
        correction: how many times as much the first cost was, where it was measured, as exit paths told it.
        margin: how far below the limit on latency the thresholds aimed, as a share of it.
        paths: what leaving at each exit and at the end costs, by metric.
        rounds: how often they were solved again because a limit was missed narrowly.
    """

    thresholds: tuple[float, ...]
    accuracy: float
    expected_accuracy: float
    costs: Mapping[str, float]
    shares: tuple[float, ...]
    images: int
    correction: float
    margin: float
    paths: Mapping[str, tuple[float, ...]]
    rounds: int = 0

    @property
    def first_cost(self) -> float:
        """The mean of the cost that is limited, or of the latency where none is."""
        return next(iter(self.costs.values()))

    @property
    def use_exits(self) -> bool:
        """Whether any exit may answer."""
        return min(self.thresholds) < NEVER_EXIT

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready copy, for the record."""
        return {
            "thresholds": self.thresholds,
            "accuracy": self.accuracy,
            "costs": tuple(self.costs.values()),
            "shares": self.shares,
            "expected_accuracy": self.expected_accuracy,
            "images": self.images,
            "correction": self.correction,
            "margin": self.margin,
            "ways": {metric: list(path) for metric, path in self.paths.items()},
            **({"rounds": self.rounds} if self.rounds else {}),
        }


@dataclass(frozen=True)
class ThresholdProblem:
    """What `n` images were told by a version with all of its exits, and what they cost where they leave.

    Args:
        confidences: of each exit and, last, of the end, `(n, exits + 1)`.
        correct: whether each is right, in the same shape.
        costs: what leaving costs, by metric, first what is limited; a limit is what is aimed at.
        floor: the lowest accuracy; None where there is none.
        margin: how far below the budget's limit on latency the aim is, as a share of it.
        corrections: how many times as much costs were as exit paths told them, where they were measured, by metric.
    """

    confidences: NDArray[np.floating]
    correct: NDArray[np.bool_]
    costs: Mapping[str, Cost]
    floor: float | None
    margin: float
    corrections: Mapping[str, float] = field(default_factory=dict)

    def solve(self) -> ResolvedThresholds:
        """Returns the best thresholds by how likely answers are right: the cheapest of equal accuracy."""
        likely = self._likelihoods()
        best = self._thresholds(likely, self.floor).solve()
        best = self._cheapest_of_equal_accuracy(best, likely)
        return self._resolved(best.thresholds, best.accuracy)

    def corrected(self, earlier: ResolvedThresholds, measured: Mapping[str, Measurement]) -> "ThresholdProblem":
        """Returns the same problem in the light of what was measured of a version with earlier thresholds."""
        known = {metric: measured[metric].value for metric in earlier.costs if metric in measured}
        factors = {metric: self._correction(metric) * value / earlier.costs[metric] for metric, value in known.items()}
        left = margin(half_width(measured["latency"])) if "latency" in measured else self.margin
        seconds = self.costs["latency"]
        if seconds.limit is not None:
            seconds = replace(seconds, limit=seconds.limit * (1 - left) / (1 - self.margin))
        costs = {**self.costs, "latency": seconds}
        return replace(self, costs=costs, margin=left, corrections={**self.corrections, **factors})

    def outcome(self, resolved: ResolvedThresholds) -> ResolvedThresholds:
        """Returns what thresholds that were found earlier come to with these corrections."""
        return self._resolved(resolved.thresholds, resolved.expected_accuracy)

    def without_useless_exits(self, resolved: ResolvedThresholds) -> ResolvedThresholds:
        """Returns these thresholds, or those that nothing reaches where exits are no faster and no more accurate.

        They are more accurate where their answers are likely to be, by more than what is equivalent.
        """
        whole = float(self._likelihoods()[:, -1].mean())
        exits = self.confidences.shape[1] - 1
        never = replace(self, corrections={})._resolved((NEVER_EXIT,) * exits, whole)
        is_better = resolved.expected_accuracy > whole + _EQUIVALENT / len(self.correct)
        pays = resolved.use_exits and (is_better or resolved.first_cost < never.first_cost)
        return resolved if pays else never

    def may_keep(self, resolved: ResolvedThresholds) -> bool:
        """Returns whether thresholds keep the budget's limits, as far as they tell."""
        limits = {metric: cost.limit for metric, cost in self.costs.items() if cost.limit is not None}
        return all(resolved.costs[metric] * (1 - self.margin) <= limit for metric, limit in limits.items())

    def _likelihoods(self) -> NDArray[np.float64]:
        return correctness_probabilities(self.confidences, self.correct)

    def _correction(self, metric: str) -> float:
        return self.corrections.get(metric, 1.0)

    def _corrected_costs(self) -> tuple[Cost, ...]:
        return tuple(cost.times(self._correction(metric)) for metric, cost in self.costs.items())

    def _thresholds(
        self,
        correct: NDArray[np.bool_] | NDArray[np.floating],
        floor: float | None,
        is_frugal: bool = False,
    ) -> ThresholdSolver:
        exits = self.confidences[:, :-1]
        return ThresholdSolver(exits, correct, self._corrected_costs(), floor, is_frugal=is_frugal)

    def _resolved(self, thresholds: Sequence[float], expected: float) -> ResolvedThresholds:
        """Returns what thresholds come to by counting."""
        counted = self._thresholds(self.correct, self.floor).outcome(thresholds)
        return ResolvedThresholds(
            thresholds=counted.thresholds,
            accuracy=counted.accuracy,
            expected_accuracy=expected,
            costs=dict(zip(self.costs, counted.costs, strict=True)),
            shares=counted.shares,
            images=len(self.correct),
            correction=self._correction(next(iter(self.costs))),
            margin=self.margin,
            paths={metric: tuple(float(each) for each in cost.leave) for metric, cost in self.costs.items()},
        )

    def _cheapest_of_equal_accuracy(self, best: Solution, likely: NDArray[np.floating]) -> Solution:
        """Returns the cheapest thresholds that are as accurate as the best ones, as far as so many images can tell.

        Without, a budget that is easily kept would leave it to chance what exits save. Where no cost is limited the
        best ones are cheap already.
        """
        if all(cost.limit is None for cost in self.costs.values()):
            return best
        enough = best.accuracy - _EQUIVALENT / len(likely)
        floor = enough if self.floor is None else max(enough, min(self.floor, best.accuracy))
        cheapest = self._thresholds(likely, floor, is_frugal=True).solve()
        is_better = cheapest.accuracy >= floor and cheapest.costs[0] < best.costs[0]
        return cheapest if is_better else best


def margin(half_width: float) -> float:
    """Returns the share of a limit that is left open for a timing, and for the one that decides, being off.

    Args:
        half_width: of the 95% interval of what costs are told by, as a share of it; the other one's is taken to be
            alike.
    """
    return float(np.clip(np.sqrt(2) * half_width, _LEAST_MARGIN, _MOST_MARGIN))


def half_width(measured: Measurement) -> float:
    """Returns the half-width of a measurement's 95% interval, as a share of its value; 0 where none was noted."""
    return measured.notes.get("half_width", 0.0)
