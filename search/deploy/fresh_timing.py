"""Timing versions of a front again before one is picked: which still keep the budget, and which is chosen.

The best latency of a search may be an outlier. So the front is computed anew after each timing: versions that were
dominated by a latency measured too low come back, rather than the next one of the old order.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from evaluators.measurement import Measurement
from search.config.budget import Budget, Constraint
from search.config.objectives import Objectives
from search.config.units import milliseconds, percent, points
from search.results.pareto import Measurements, Version, choose, front_within
from search.results.violations import broken_limits

_ROOM = 1.03
"""A wider limit is this multiple of the latency, as room for the next timing."""


@dataclass(frozen=True)
class FreshTiming:
    """A version, timed again in a new process.

    Args:
        version: as the search measured it.
        latency: as measured now.
        speed: time that the machine takes now, as a multiple of when the search began.
        timings: number of processes that timed it.
    """

    version: Version
    latency: Measurement
    speed: float
    timings: int = 1

    @property
    def updated(self) -> Version:
        """The version with the new latency."""
        measured = {**self.version.measured, "latency": self.latency}
        return replace(self.version, evaluation=replace(self.version.evaluation, measurements=measured))


@dataclass(frozen=True)
class FreshTimings:
    """The versions that were timed again, and the choice among them.

    Args:
        tried: the versions, in order.
        chosen: the one that is picked; None if none keeps the budget.
        untried: how many others kept the budget in the search and were not timed again.
    """

    tried: tuple[FreshTiming, ...]
    chosen: FreshTiming | None
    untried: int


@dataclass(frozen=True)
class WiderBudget:
    """A wider budget, and the version that it would lead to.

    Args:
        budget: with every limit on latency wide enough for a version that was rejected.
        best: the version that would be preferred.
        is_timed: whether that was timed again already, and so would be picked.
    """

    budget: Budget
    best: Version
    is_timed: bool


def best_version(
    versions: Sequence[Version],
    tried: Sequence[FreshTiming],
    prefer: str,
    budget: Budget,
    dense: Measurements,
    objectives: Objectives,
) -> Version | None:
    """Returns the best version of the front by a preference, by the newest timings; None if none keeps the budget.

    Simple versions (number below 0) among them also remove from the front what they beat; see `front_within`.
    """
    updated = {timing.version.number: timing.updated for timing in tried}
    current = [updated.get(version.number, version) for version in versions]
    simple = [version for version in current if version.number < 0]
    trials = [version for version in current if version.number >= 0]
    front = front_within(trials, simple, budget, dense, objectives).versions
    return choose(front, prefer, objectives)[0] if front else None


def count_untried(versions: Sequence[Version], tried: Sequence[FreshTiming]) -> int:
    """Returns how many of the versions were not timed again."""
    return len({version.number for version in versions} - {timing.version.number for timing in tried})


def wider_budget(
    timings: FreshTimings,
    versions: Sequence[Version],
    prefer: str,
    budget: Budget,
    dense: Measurements,
    objectives: Objectives,
) -> WiderBudget | None:
    """Returns the budget that the most accurate rejected version needs; None if it would change nothing."""
    least = timings.chosen.version.measured["accuracy"].value if timings.chosen else -1.0
    better = [
        timing for timing in _rejected(timings, budget, dense) if timing.version.measured["accuracy"].value > least
    ]
    if not better:
        return None
    preferred = max(better, key=lambda timing: (timing.version.measured["accuracy"].value, -timing.latency.value))
    wider = Budget(tuple(_widened(limit, preferred.latency, dense["latency"]) for limit in budget.constraints))
    best = best_version(versions, timings.tried, prefer, wider, dense, objectives)
    if best is None or (timings.chosen is not None and best.number == timings.chosen.version.number):
        return None
    return WiderBudget(wider, best, best.number in {timing.version.number for timing in timings.tried})


def _rejected(timings: FreshTimings, budget: Budget, dense: Measurements) -> list[FreshTiming]:
    return [timing for timing in timings.tried if not budget.is_met(timing.updated.measured, dense)]


def _widened(limit: Constraint, latency: Measurement, dense: Measurement) -> Constraint:
    """Returns a broken limit on latency, widened for `latency` to two digits; any other limit as it is."""
    if limit.measured_as != "latency" or limit.violation(latency, dense) <= 0:
        return limit
    value = latency.statistic_value(limit.statistic) * _ROOM
    value /= dense.statistic_value(limit.statistic) if limit.relative else 1.0
    step = 10.0 ** (math.floor(math.log10(value)) - 1)
    return replace(limit, limit=float(f"{math.ceil(value / step - 1e-9) * step:.2g}"))


def lines(
    timings: FreshTimings, wider: WiderBudget | None, prefer: str, budget: Budget, dense: Measurements
) -> list[str]:
    """Returns lines for people: versions that were timed again but not chosen, the choice, and the wider budget."""
    others = [timing for timing in timings.tried if timing is not timings.chosen]
    if not others:
        return []
    text = ["Measured again, and not taken:", *(f"  {_reason(timing, prefer, budget, dense)}" for timing in others)]
    if timings.chosen is None:
        verb = "was" if timings.untried == 1 else "were"
        more = f"; {timings.untried} more that kept it in the search {verb} not tried" if timings.untried else ""
        text.append(f"No version that was measured again keeps {budget}{more}.")
    elif others[0] is timings.tried[0]:
        text.append(_instead(timings.chosen, others[0]))
    if wider is not None:
        accuracy = percent(wider.best.measured["accuracy"].value)
        verb = "taken" if wider.is_timed else "tried first"
        text.append(f"With --budget '{wider.budget}' {wider.best.title} ({accuracy}) would be {verb}.")
    return text


def _reason(timing: FreshTiming, prefer: str, budget: Budget, dense: Measurements) -> str:
    before = timing.version.measured["latency"].value
    now = timing.latency.value
    twice = ", timed twice" if timing.timings > 1 else ""
    reason = broken_limits(timing.updated, budget, dense) or f"keeps {budget}, but by {prefer} another is better now"
    accuracy = percent(timing.version.measured["accuracy"].value)
    return (
        f"{timing.version.title}, {accuracy}: {milliseconds(before)} in the search, {milliseconds(now)} measured"
        f" again ({now / before - 1:+.1%}{twice}): {reason}"
    )


def _instead(chosen: FreshTiming, first: FreshTiming) -> str:
    accuracy, first_accuracy = (timing.version.measured["accuracy"].value for timing in (chosen, first))
    return (
        f"Instead {chosen.version.title} is taken: {percent(accuracy)} on the validation images,"
        f" {points(accuracy - first_accuracy)} points against {first.version.title}, and"
        f" {milliseconds(chosen.latency.value)} instead of {milliseconds(first.latency.value)}."
    )


def content(timings: FreshTimings, wider: WiderBudget | None, budget: Budget, dense: Measurements) -> dict[str, Any]:
    """Returns the same as `lines`, JSON-ready: seconds, shares and points of accuracy."""
    rejected = _rejected(timings, budget, dense)
    chosen = timings.chosen
    passed_over = [timing for timing in timings.tried if timing is not chosen and timing not in rejected]
    first = timings.tried[0] if timings.tried else None
    instead = first is not None and chosen is not None and first is not chosen
    return {
        "rejected": [_content(timing, budget, dense) for timing in rejected],
        "passed_over": [_content(timing, budget, dense) for timing in passed_over],
        "instead_of": _difference(chosen, first) if instead and chosen and first else None,
        "untried": timings.untried,
        "slack": None
        if wider is None
        else {
            "budget": str(wider.budget),
            "trial": wider.best.trial,
            "accuracy": wider.best.measured["accuracy"].value,
            "measured_again": wider.is_timed,
        },
    }


def _content(timing: FreshTiming, budget: Budget, dense: Measurements) -> dict[str, Any]:
    violations: Mapping[str, float] = budget.violations(timing.updated.measured, dense)
    return {
        "trial": timing.version.trial,
        "accuracy": timing.version.measured["accuracy"].value,
        "searched_latency_s": timing.version.measured["latency"].value,
        "latency": timing.latency.to_dict(),
        "timings": timing.timings,
        "broken": {name: value for name, value in violations.items() if value > 0},
    }


def _difference(chosen: FreshTiming, first: FreshTiming) -> dict[str, Any]:
    lost = chosen.version.measured["accuracy"].value - first.version.measured["accuracy"].value
    return {
        "trial": first.version.trial,
        "accuracy_points": lost * 100,
        "latency_s": chosen.latency.value - first.latency.value,
    }
