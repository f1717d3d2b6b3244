"""The Pareto front of feasible versions, its hypervolume, and the choice of one version from it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from evaluators.measurement import METRICS, Measurement
from search.config.budget import Budget, Constraint
from search.config.objectives import Objectives
from search.results.evaluation import Evaluation
from search.samplers.non_domination import is_non_dominated

_ACCURACY_SPAN = 0.10
"""Without a limit on accuracy, the reference point lies this far below the accuracy of the dense network."""

Measurements = Mapping[str, Measurement]


@dataclass(frozen=True)
class Version:
    """A candidate with its evaluation: one of a trial, or a simple version measured before the first trial.

    Args:
        number: of the trial; below 0 for a simple version.
        evaluation: its measurements.
        name: of a simple version; empty for a trial.
    """

    number: int
    evaluation: Evaluation
    name: str = ""

    @property
    def trial(self) -> int | str:
        """The number of its trial, or the name of a simple version: `149`, `dense`, `int8`."""
        return self.number if self.number >= 0 else self.name or "dense"

    @property
    def title(self) -> str:
        """Its name in a sentence: `trial 149`, `dense`, `plain int8`, `given-int8`."""
        if self.number >= 0:
            return f"trial {self.number}"
        return str(self.trial) if self.number == -1 or "-" in self.name else f"plain {self.trial}"

    @property
    def measured(self) -> Mapping[str, Measurement]:
        """The measurements, by metric."""
        return self.evaluation.measurements

    @property
    def is_complete(self) -> bool:
        """Whether everything was measured: accuracy comes last, and on all images."""
        return not self.evaluation.ended and "accuracy" in self.measured

    def more_accurate(self, gain: float) -> "Version":
        """Returns a copy whose accuracy is higher by `gain`, as it may become."""
        accuracy = self.measured["accuracy"]
        measured = {**self.measured, "accuracy": replace(accuracy, value=min(accuracy.value + gain, 1.0))}
        return replace(self, evaluation=replace(self.evaluation, measurements=measured))

    def values(self, objectives: Sequence[str]) -> list[float]:
        """Returns the objectives of a fully measured version, in SI units."""
        return [self.measured[metric].value for metric in objectives]

    def costs(self, objectives: Sequence[str]) -> NDArray[np.float64]:
        """Returns `m` objectives of a fully measured version, signed so that lower is better, `(m,)`."""
        return np.array([METRICS[metric].sign * self.measured[metric].value for metric in objectives])


def feasible(versions: Sequence[Version], budget: Budget, dense: Measurements) -> list[Version]:
    """Returns the fully measured versions that keep every limit."""
    return [version for version in versions if version.is_complete and budget.is_met(version.measured, dense)]


def pareto(versions: Sequence[Version], objectives: Objectives) -> list[Version]:
    """Returns the versions that are non-dominated in the objectives, the most accurate first; of equal ones the first.

    All versions have to be fully measured.
    """
    if not versions:
        return []
    ordered = sorted(versions, key=lambda version: (*version.costs(objectives), version.number))
    mask = is_non_dominated(np.stack([version.costs(objectives) for version in ordered]), deduplicate=True)
    return [version for version, is_kept in zip(ordered, mask, strict=True) if is_kept]


def most_promising(versions: Sequence[Version], objectives: Objectives, count: int) -> list[Version]:
    """Returns the front, then the front of all others, and so on, until there are `count`; of the last one some.

    Within a front the most accurate come first; where not all of one are wanted they are evenly spread over it.
    """
    found: list[Version] = []
    left = list(versions)
    while left and len(found) < count:
        front = pareto(left, objectives)
        left = [version for version in left if version not in front]
        places = np.linspace(0, len(front) - 1, min(count - len(found), len(front)))
        found += [front[round(place)] for place in places]
    return found


@dataclass(frozen=True)
class Front:
    """The front within a budget, and the versions that simple versions keep off it.

    Args:
        versions: the front, the most accurate first, simple versions included.
        beaten: non-dominated versions that are left out: among the objectives they win in FLOPs alone, and a simple
            version within the budget is both faster and more accurate.
    """

    versions: tuple[Version, ...]
    beaten: tuple[Version, ...]


def front_within(
    versions: Sequence[Version],
    simple: Sequence[Version],
    budget: Budget,
    dense: Measurements,
    objectives: Objectives,
) -> Front:
    """Returns the front of the versions that keep every limit.

    Args:
        versions: those of trials.
        simple: the simple versions; trials of the same candidates are left out.
        budget: the limits.
        dense: the dense network's measurements.
        objectives: of the search.
    """
    keys = {version.evaluation.candidate.key for version in simple}
    baselines = feasible(simple, budget, dense)
    others = [version for version in versions if version.evaluation.candidate.key not in keys]
    front = pareto([*baselines, *feasible(others, budget, dense)], objectives)
    beaten = [version for version in front if any(_wins_flops_alone(version, each, objectives) for each in baselines)]
    return Front(tuple(version for version in front if version not in beaten), tuple(beaten))


def beats(one: Version, other: Version) -> bool:
    """Returns whether one version is both faster and more accurate than another."""
    first, second = one.measured, other.measured
    is_faster = first["latency"].value < second["latency"].value
    return is_faster and first["accuracy"].value > second["accuracy"].value


def _wins_flops_alone(version: Version, baseline: Version, objectives: Objectives) -> bool:
    """Returns whether a baseline is faster, more accurate and in all objectives but FLOPs at least as good."""
    others = [metric for metric in objectives if metric != "flops"]
    is_no_worse = bool((baseline.costs(others) <= version.costs(others)).all())
    return "latency" in objectives and is_no_worse and beats(baseline, version)


def hypervolume(versions: Sequence[Version], budget: Budget, dense: Measurements, objectives: Objectives) -> float:
    """Returns the hypervolume of feasible versions: the share of the budget's box that they dominate, 0 to 1.

    The box has a side for each objective. It spans from a perfect network at no cost to the reference point: the
    budget's limits, or where there is none the dense network's costs, and ten points below its accuracy.
    """
    worst = reference_point(budget, dense, objectives)
    scaled = [[_share_of_side(version, metric, worst[metric]) for metric in objectives] for version in versions]
    return box_share(np.array(scaled).reshape(-1, len(objectives)))


def _share_of_side(version: Version, metric: str, worst: float) -> float:
    value = version.measured[metric].value
    return (1 - value) / (1 - worst) if metric == "accuracy" else value / worst


def box_share(costs: NDArray[np.float64]) -> float:
    """Returns the share of the unit box that costs `(n, m)` dominate; the reference point is 1 in each."""
    from pymoo.indicators.hv import HV

    inside = costs[(costs < 1).all(axis=1)]
    return float(HV(ref_point=np.ones(costs.shape[1]))(inside)) if len(inside) else 0.0


def reference_point(budget: Budget, dense: Measurements, objectives: Sequence[str]) -> dict[str, float]:
    """Returns the reference point of the hypervolume, by objective."""
    floor = budget.accuracy_floor(dense)
    lowest = dense["accuracy"].value - _ACCURACY_SPAN if floor is None else floor
    point = {"accuracy": min(lowest, 1 - 1e-9)}
    for metric in objectives:
        if metric == "accuracy":
            continue
        ceiling = budget.ceiling(metric, dense)
        point[metric] = dense[metric].value if ceiling is None else ceiling
    return point


def choose(front: Sequence[Version], prefer: str, objectives: Objectives) -> list[Version]:
    """Returns the front's versions in order of preference, the best first.

    `knee` prefers the version closest to the front's ideal point, objectives scaled to the front's ranges.
    """
    if prefer == "knee":
        costs = np.stack([version.costs(objectives) for version in front])
        span = np.ptp(costs, axis=0)
        distance = np.linalg.norm((costs - costs.min(axis=0)) / np.where(span > 0, span, 1), axis=1)
        return [front[index] for index in np.argsort(distance, kind="stable")]
    sign = METRICS[prefer].sign
    return sorted(front, key=lambda version: (sign * version.measured[prefer].value, version.measured["latency"].value))


def nearest_miss(
    versions: Sequence[Version], budget: Budget, dense: Measurements
) -> tuple[Version, dict[Constraint, float]] | None:
    """Returns the version that exceeds its limits the least, and by how much; None if no version exceeds any.

    Only fully measured versions count: of any other it is not known how far it is from a limit on its accuracy.
    """
    misses = []
    for version in versions:
        broken = budget.broken(version.measured, dense)
        if broken and version.is_complete:
            misses.append((sum(broken.values()), version.number, version, broken))
    if not misses:
        return None
    *_, version, broken = min(misses, key=lambda miss: miss[:2])
    return version, broken
