"""Why no version keeps a budget: where the versions stand at each limit, the nearest one, and what would help."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from evaluators.measurement import Measurement
from search.config.budget import Budget, Constraint
from search.config.units import percent, quantity
from search.report.overview import Overview
from search.results.pareto import Version, nearest_miss
from search.results.violations import kept_and_broken, limited

_LONGER = {
    "none": '[recovery] level = "elastic" in place of "none"',
    "bn": '[recovery] level = "elastic" in place of "bn"',
    "finetune": "more epochs in [recovery.finetune]",
    "elastic": "more epochs in [recovery.elastic], or at_most_minutes",
}
"""What trains the versions of a search longer, by its level of recovery."""


@dataclass(frozen=True)
class LimitState:
    """Where the versions of a search stand at one limit.

    Args:
        limit: one of the budget.
        kept: how many versions keep it.
        measured: how many were measured on it; estimates from some of the images do not count.
        best: the version that is furthest within it, or exceeds it the least.
        dense: the dense network's measurement of the same metric.
    """

    limit: Constraint
    kept: int
    measured: int
    best: Version
    dense: Measurement

    def __str__(self) -> str:
        limit, name = self.limit, self.limit.measured_as
        share = f" ({quantity(limit.ceiling(self.dense), limit.metric.unit)})" if limit.relative else ""
        return (
            f"{limit}{share}: {self.kept} of {self.measured} versions measured on it keep it; the best,"
            f" {self.best.title}, has {limited(limit, self.best.measured[name], self.dense)}."
        )


def unmet_budget(overview: Overview) -> list[str]:
    """Returns sentences on a budget that no version keeps, which say where the versions stand and what would help."""
    states = (str(state) for state in limit_states(overview))
    lines = [f"No version keeps {overview.budget}.", *states, _unscored(overview), nearest_line(overview)]
    return [line for line in [*lines, *_remedies(overview)] if line]


def nearest_line(overview: Overview) -> str:
    """Returns where the nearest version stands at every limit; empty if none was measured on all of them."""
    nearest = _nearest(overview)
    if nearest is None:
        return ""
    stand = kept_and_broken(nearest, overview.budget, overview.dense.measured)
    return f"The nearest, {nearest.title}: {stand}."


def unmet_json(overview: Overview) -> dict[str, Any] | None:
    """Returns the nearest version and the limits that it exceeds, each by a share of it; None if a version keeps all.

    The result is JSON-ready.
    """
    nearest = None if overview.front else _nearest(overview)
    if nearest is None:
        return None
    violations = overview.budget.violations(nearest.measured, overview.dense.measured)
    return {
        "nearest": nearest.trial,
        "exceeded": {limit: excess for limit, excess in violations.items() if excess > 0},
        "limits": [
            {"limit": str(state.limit), "kept": state.kept, "measured": state.measured, "best": state.best.trial}
            for state in limit_states(overview)
        ],
    }


def limit_states(overview: Overview) -> list[LimitState]:
    """Returns where the versions stand at each limit; the network as it is counts as one in each precision."""
    return [_state(overview, limit) for limit in overview.budget.constraints]


def _state(overview: Overview, limit: Constraint) -> LimitState:
    dense = overview.dense.measured[limit.measured_as]
    measured = [version for version in _all(overview) if _is_measured(version, limit)]
    excess = {version.number: limit.violation(version.measured[limit.measured_as], dense) for version in measured}
    best = min(measured, key=lambda version: excess[version.number])
    kept = sum(share <= 0 for share in excess.values())
    return LimitState(limit, kept, len(measured), best, dense)


def _all(overview: Overview) -> list[Version]:
    return [*overview.simple, *overview.versions]


def _is_measured(version: Version, limit: Constraint) -> bool:
    is_estimate = bool(version.evaluation.ended) and limit.measured_as == "accuracy"
    return limit.measured_as in version.measured and not is_estimate


def _nearest(overview: Overview) -> Version | None:
    miss = nearest_miss(_all(overview), overview.budget, overview.dense.measured)
    return miss[0] if miss else None


def _unscored(overview: Overview) -> str:
    """Returns a sentence on the versions whose accuracy was not measured."""
    before, during = overview.not_scored, overview.ended_early
    if not before and not during:
        return ""
    own, dense = overview.search.budget, overview.dense.measured
    broken = Counter(str(limit) for version in before for limit in list(own.broken(version.measured, dense))[:1])
    reasons = [f"{count} when they broke {limit}" for limit, count in broken.items()]
    reasons += [f"{len(during)} after some of the images"] if during else []
    return (
        f"{len(before) + len(during)} of {len(overview.versions)} versions were ended before their accuracy was known:"
        f" {', '.join(reasons)}. None of them counts as the nearest."
    )


def _remedies(overview: Overview) -> Iterator[str]:
    """Yields what would help, by the limits that stand in the way."""
    costs = overview.budget.without("accuracy")
    unkept = [state for state in limit_states(overview) if state.limit in costs.constraints and not state.kept]
    for state in unkept:
        yield (
            f"What would help: a looser limit than {state.limit}, which nothing keeps, or more that a search may cut:"
            " in [space] a smaller keep_at_least or keep_blocks_at_least, smaller sizes, more dimensions in only."
        )
    floor = overview.budget.accuracy_floor(overview.dense.measured)
    if floor is not None and not unkept:
        yield f"What would help: {_more_accuracy(overview, costs, floor)}"


def _more_accuracy(overview: Overview, costs: Budget, floor: float) -> str:
    """Returns what would help where the versions that keep every other limit are not accurate enough."""
    dense = overview.dense.measured
    if dense["accuracy"].value < floor:
        return (
            f"a better network. The dense one itself has an accuracy of {percent(dense['accuracy'].value)}, where"
            f" {percent(floor)} is asked for; train it further, or ask for less."
        )
    scored = [version for version in _all(overview) if version.is_complete]
    within = [version for version in scored if costs.is_met(version.measured, dense)]
    if not within:
        return f"looser limits. Each of {costs} is kept by some version that was scored, but not all by one."
    best = max(within, key=lambda version: version.measured["accuracy"].value)
    accuracy = best.measured["accuracy"].value
    study = overview.search.study
    longer = _LONGER.get(study.recovery.level, "a longer training in [recovery]")
    final = "" if study.recovery.final.versions else ", and versions above 0 in [recovery.final]"
    return (
        f"more recovery. Of {len(within)} scored versions within {costs or 'all other limits'} the most accurate,"
        f" {best.title}, has {percent(accuracy)}, {(floor - accuracy) * 100:.2f} points below the limit, after"
        f" {best.evaluation.effort!r}: {longer}{final}."
    )
