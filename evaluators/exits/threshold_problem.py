"""The optimization problem of one candidate's exit thresholds: confidences, costs of exit paths, and limits."""

import base64
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from evaluators.exits.correctness import correctness_probabilities
from evaluators.exits.threshold_solver import Cost, Solution, ThresholdSolver
from evaluators.measurement import Measurement

_EQUIVALENT = 0.5
"""Images by which expected accuracies have to differ to count as different."""
_LEAST_MARGIN = 0.01
"""Share of a limit, at least: the interval of a short timing may be narrow by chance."""
_MOST_MARGIN = 0.1
"""Share of a limit, at most: a disturbed timing must not cost more accuracy than that."""


@dataclass(frozen=True)
class ResolvedThresholds:
    """Thresholds of a candidate's exits, and their accuracy and costs on the images that chose them.

    Args:
        thresholds: of each active exit of the choices, by depth; None for one that is not used after all.
        accuracy: share of correct answers.
        expected_accuracy: mean probability of a correct answer, from `correctness_probabilities`.
        costs: means by metric, the limited one first, in seconds or FLOPs.
        shares: of the images that leave at each exit and, last, at the end.
        images: how many there were.
        correction: ratio of the first cost as measured to that predicted from exit paths.
        margin: distance below the limit on latency that was aimed for, as a share of it.
        paths: cost of leaving at each exit and at the end, by metric.
        rounds: how often they were solved again after a narrow miss.
    """

    thresholds: tuple[float | None, ...]
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
        """The mean of the cost that is limited, or the mean latency without a limit."""
        return next(iter(self.costs.values()))

    @property
    def use_exits(self) -> bool:
        """Whether any exit may answer."""
        return any(threshold is not None for threshold in self.thresholds)

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready copy."""
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
    """Outputs of a version with all of its exits on `n` images, the costs of leaving at each exit, and the limits.

    Args:
        confidences: of each exit and, last, of the end, `(n, exits + 1)`.
        correct: whether each prediction is correct, `(n, exits + 1)`.
        costs: of leaving at each exit, by metric, the limited one first; their limits include the margin.
        floor: the lowest accuracy; None without a limit.
        margin: distance of the aim below the budget's limit on latency, as a share of it.
        corrections: ratios of costs as measured to those predicted from exit paths, by metric.
    """

    confidences: NDArray[np.floating]
    correct: NDArray[np.bool_]
    costs: Mapping[str, Cost]
    floor: float | None
    margin: float
    corrections: Mapping[str, float] = field(default_factory=dict)

    def solve(self) -> ResolvedThresholds:
        """Returns the best thresholds by expected accuracy; of equally accurate ones the cheapest."""
        probabilities = self._correctness_probabilities()
        best = self._thresholds(probabilities, self.floor).solve()
        best = self._cheapest_of_equal_accuracy(best, probabilities)
        return self._resolved(best.thresholds, best.accuracy)

    def corrected(self, earlier: ResolvedThresholds, measured: Mapping[str, Measurement]) -> "ThresholdProblem":
        """Returns the problem with costs corrected by measurements of a version with earlier thresholds."""
        values = {metric: measured[metric].value for metric in earlier.costs if metric in measured}
        factors = {metric: self._correction(metric) * value / earlier.costs[metric] for metric, value in values.items()}
        new_margin = margin(measured["latency"].half_width) if "latency" in measured else self.margin
        seconds = self.costs["latency"]
        if seconds.limit is not None:
            seconds = replace(seconds, limit=seconds.limit * (1 - new_margin) / (1 - self.margin))
        costs = {**self.costs, "latency": seconds}
        return replace(self, costs=costs, margin=new_margin, corrections={**self.corrections, **factors})

    def outcome(self, resolved: ResolvedThresholds) -> ResolvedThresholds:
        """Returns earlier thresholds with their costs by these corrections."""
        return self._resolved(resolved.thresholds, resolved.expected_accuracy)

    def outcome_of(self, thresholds: Sequence[float | None]) -> ResolvedThresholds:
        """Returns given thresholds, one for each exit, with their accuracy and costs; None for exits not used."""
        expected = self._thresholds(self._correctness_probabilities(), self.floor).outcome(thresholds).accuracy
        return self._resolved(thresholds, expected)

    def within(self, ceilings: Mapping[str, float | None], floor: float | None) -> "ThresholdProblem":
        """Returns the problem under other limits.

        Args:
            ceilings: the highest value of each cost within a budget, or None; the margin is kept below that of latency.
            floor: the lowest accuracy on these images, or None.
        """
        shares = {"latency": 1 - self.margin}
        limits = {metric: limit * shares.get(metric, 1.0) for metric, limit in ceilings.items() if limit is not None}
        costs = {metric: replace(cost, limit=limits.get(metric)) for metric, cost in self.costs.items()}
        ordered = sorted(costs, key=lambda metric: costs[metric].limit is None)  # one with a limit counts first
        return replace(self, costs={metric: costs[metric] for metric in ordered}, floor=floor)

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready copy without the limits."""
        costs = {
            metric: {
                "leave": list(map(float, cost.leave)),
                "heads": list(map(float, cost.heads)),
                "batch": cost.batch,
                "starts": list(map(float, cost.starts)),
            }
            for metric, cost in self.costs.items()
        }
        return {
            "shape": list(self.correct.shape),
            "confidences": _packed(self.confidences.astype(np.float32)),
            "correct": _packed(np.packbits(self.correct)),
            "costs": costs,
            "margin": self.margin,
            "corrections": dict(self.corrections),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """Returns the problem that `to_dict` described; `within` gives it limits."""
        shape = tuple(content["shape"])
        confidences = np.frombuffer(_unpacked(content["confidences"]), np.float32).reshape(shape)
        bits = np.unpackbits(np.frombuffer(_unpacked(content["correct"]), np.uint8), count=int(np.prod(shape)))
        costs = {metric: Cost(**values) for metric, values in content["costs"].items()}
        correct = bits.astype(bool).reshape(shape)
        return cls(confidences, correct, costs, None, content["margin"], content["corrections"])

    def without_useless_exits(self, resolved: ResolvedThresholds) -> ResolvedThresholds:
        """Returns these thresholds, or None for all exits if using them is neither cheaper nor more accurate.

        More accurate means an expected accuracy that differs by more than `_EQUIVALENT` images.
        """
        without_exits = float(self._correctness_probabilities()[:, -1].mean())
        exits = self.confidences.shape[1] - 1
        never = replace(self, corrections={})._resolved((None,) * exits, without_exits)
        is_better = resolved.expected_accuracy > without_exits + _EQUIVALENT / len(self.correct)
        pays = resolved.use_exits and (is_better or resolved.first_cost < never.first_cost)
        return resolved if pays else never

    def may_keep(self, resolved: ResolvedThresholds) -> bool:
        """Returns whether thresholds keep the budget's limits by their predicted costs."""
        limits = {metric: cost.limit for metric, cost in self.costs.items() if cost.limit is not None}
        return all(resolved.costs[metric] * (1 - self.margin) <= limit for metric, limit in limits.items())

    def _correctness_probabilities(self) -> NDArray[np.float64]:
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

    def _resolved(self, thresholds: Sequence[float | None], expected: float) -> ResolvedThresholds:
        """Returns thresholds with their accuracy, costs and shares on these images."""
        outcome = self._thresholds(self.correct, self.floor).outcome(thresholds)
        return ResolvedThresholds(
            thresholds=outcome.thresholds,
            accuracy=outcome.accuracy,
            expected_accuracy=expected,
            costs=dict(zip(self.costs, outcome.costs, strict=True)),
            shares=outcome.shares,
            images=len(self.correct),
            correction=self._correction(next(iter(self.costs))),
            margin=self.margin,
            paths={metric: tuple(float(path) for path in cost.leave) for metric, cost in self.costs.items()},
        )

    def _cheapest_of_equal_accuracy(self, best: Solution, probabilities: NDArray[np.floating]) -> Solution:
        """Returns the cheapest thresholds whose accuracy equals that of the best ones, by `_EQUIVALENT`.

        Without this step, what exits save under a loose budget would be left to chance. If no cost is limited, the best
        ones are the cheapest already.
        """
        if all(cost.limit is None for cost in self.costs.values()):
            return best
        equal = best.accuracy - _EQUIVALENT / len(probabilities)
        floor = equal if self.floor is None else max(equal, min(self.floor, best.accuracy))
        cheapest = self._thresholds(probabilities, floor, is_frugal=True).solve()
        is_better = cheapest.accuracy >= floor and cheapest.costs[0] < best.costs[0]
        return cheapest if is_better else best


def _packed(values: NDArray[np.generic]) -> str:
    return base64.b64encode(zlib.compress(values.tobytes())).decode("ascii")


def _unpacked(text: str) -> bytes:
    return zlib.decompress(base64.b64decode(text))


def margin(half_width: float) -> float:
    """Returns the share of a limit to stay below it, for the errors of this timing and of the one that decides.

    Args:
        half_width: of the 95% interval of this timing, as a share of it; the other one's is taken to be the same.
    """
    return float(np.clip(np.sqrt(2) * half_width, _LEAST_MARGIN, _MOST_MARGIN))
