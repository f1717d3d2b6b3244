"""What measuring versions of a front again found: which keep the budget, which is taken, and what that costs.

A search's best figure may be a lucky one. So after each timing the front is drawn anew with what it found: a version
that hid others behind too low a latency gives way to them, not to whatever came next in the old order.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from evaluators.measurement import Measurement
from search.config.budget import Budget, Constraint
from search.config.units import milliseconds, percent, points
from search.results.pareto import Dense, Version, choose, front_within
from search.results.violations import broken_limits

_ROOM = 1.03
"""A wider limit leaves so much for the next timing."""


@dataclass(frozen=True)
class Again:
    """A version, timed again in a new process.

    Args:
        version: as the search measured it.
        latency: as it was found now.
        speed: how long the machine takes now, as a multiple of what it took when the search began.
        timings: processes that timed it.
    """

    version: Version
    latency: Measurement
    speed: float
    timings: int = 1

    @property
    def renewed(self) -> Version:
        """The version with the latency that was found now."""
        measured = {**self.version.measured, "latency": self.latency}
        return replace(self.version, evaluation=replace(self.version.evaluation, measurements=measured))


@dataclass(frozen=True)
class Afresh:
    """What was measured again, in order, and what came of it.

    Args:
        tried: the versions.
        taken: the one of them that is taken; None where none keeps the budget.
        untried: how many others kept the budget in the search and were not measured again.
    """

    tried: tuple[Again, ...]
    taken: Again | None
    untried: int


@dataclass(frozen=True)
class Slack:
    """A wider budget, and what it would lead to.

    Args:
        budget: with every limit on latency wide enough for a version that was rejected.
        first: the version that would come first.
        is_known: whether that was measured again already, and so would be taken.
    """

    budget: Budget
    first: Version
    is_known: bool


def foremost(
    versions: Sequence[Version], tried: Sequence[Again], prefer: str, budget: Budget, dense: Dense
) -> Version | None:
    """Returns the best version of the front by a preference, as is known now; None where none keeps the budget.

    Simple versions among them are lines to beat, too.
    """
    renewed = {again.version.number: again.renewed for again in tried}
    known = [renewed.get(version.number, version) for version in versions]
    simple = [version for version in known if version.number < 0]
    front = front_within([version for version in known if version.number >= 0], simple, budget, dense).versions
    return choose(front, prefer)[0] if front else None


def untried(versions: Sequence[Version], tried: Sequence[Again]) -> int:
    """Returns how many of the versions were not measured again."""
    return len({version.number for version in versions} - {again.version.number for again in tried})


def slack(afresh: Afresh, versions: Sequence[Version], prefer: str, budget: Budget, dense: Dense) -> Slack | None:
    """Returns the budget that the most accurate version that was rejected needs; None where it would win nothing."""
    least = afresh.taken.version.measured["accuracy"].value if afresh.taken else -1.0
    better = [each for each in _rejected(afresh, budget, dense) if each.version.measured["accuracy"].value > least]
    if not better:
        return None
    wanted = max(better, key=lambda each: (each.version.measured["accuracy"].value, -each.latency.value))
    wider = Budget(tuple(_widened(limit, wanted.latency, dense["latency"]) for limit in budget.constraints))
    first = foremost(versions, afresh.tried, prefer, wider, dense)
    if first is None or (afresh.taken is not None and first.number == afresh.taken.version.number):
        return None
    return Slack(wider, first, first.number in {each.version.number for each in afresh.tried})


def _rejected(afresh: Afresh, budget: Budget, dense: Dense) -> list[Again]:
    return [each for each in afresh.tried if not budget.is_met(each.renewed.measured, dense)]


def _widened(limit: Constraint, latency: Measurement, dense: Measurement) -> Constraint:
    """Returns a limit, wide enough for a latency, in two digits, where it is one on latency that this breaks."""
    if limit.measured_as != "latency" or limit.violation(latency, dense) <= 0:
        return limit
    value = latency.statistic_value(limit.statistic) * _ROOM
    value /= dense.statistic_value(limit.statistic) if limit.relative else 1.0
    step = 10.0 ** (math.floor(math.log10(value)) - 1)
    return replace(limit, limit=float(f"{math.ceil(value / step - 1e-9) * step:.2g}"))


def lines(afresh: Afresh, wider: Slack | None, prefer: str, budget: Budget, dense: Dense) -> list[str]:
    """Returns, for people, what was measured again and not taken, what is instead, and what more slack would win."""
    others = [each for each in afresh.tried if each is not afresh.taken]
    if not others:
        return []
    told = ["Measured again, and not taken:", *(f"  {_told(each, prefer, budget, dense)}" for each in others)]
    if afresh.taken is None:
        verb = "was" if afresh.untried == 1 else "were"
        more = f"; {afresh.untried} more that kept it in the search {verb} not tried" if afresh.untried else ""
        told.append(f"No version that was measured again keeps {budget}{more}.")
    elif others[0] is afresh.tried[0]:
        told.append(_instead(afresh.taken, others[0]))
    if wider is not None:
        accuracy = percent(wider.first.measured["accuracy"].value)
        then = "taken" if wider.is_known else "tried first"
        told.append(f"With --budget '{wider.budget}' {wider.first.title} ({accuracy}) would be {then}.")
    return told


def _told(again: Again, prefer: str, budget: Budget, dense: Dense) -> str:
    before, now = again.version.measured["latency"].value, again.latency.value
    twice = ", timed twice" if again.timings > 1 else ""
    why = broken_limits(again.renewed, budget, dense) or f"keeps {budget}, but by {prefer} another is better now"
    accuracy = percent(again.version.measured["accuracy"].value)
    return (
        f"{again.version.title}, {accuracy}: {milliseconds(before)} in the search, {milliseconds(now)} measured"
        f" again ({now / before - 1:+.1%}{twice}): {why}"
    )


def _instead(taken: Again, first: Again) -> str:
    accuracy, wanted = (each.version.measured["accuracy"].value for each in (taken, first))
    return (
        f"Instead {taken.version.title} is taken: {percent(accuracy)} on the validation images,"
        f" {points(accuracy - wanted)} points against {first.version.title}, and"
        f" {milliseconds(taken.latency.value)} instead of {milliseconds(first.latency.value)}."
    )


def content(afresh: Afresh, wider: Slack | None, budget: Budget, dense: Dense) -> dict[str, Any]:
    """Returns the same for a machine: seconds, shares and points of accuracy."""
    rejected = _rejected(afresh, budget, dense)
    passed = [each for each in afresh.tried if each is not afresh.taken and each not in rejected]
    first, taken = afresh.tried[0] if afresh.tried else None, afresh.taken
    instead = first is not None and taken is not None and first is not taken
    return {
        "rejected": [_content(each, budget, dense) for each in rejected],
        "passed_over": [_content(each, budget, dense) for each in passed],
        "instead_of": _difference(taken, first) if instead and taken and first else None,
        "untried": afresh.untried,
        "slack": None
        if wider is None
        else {
            "budget": str(wider.budget),
            "trial": wider.first.trial,
            "accuracy": wider.first.measured["accuracy"].value,
            "measured_again": wider.is_known,
        },
    }


def _content(again: Again, budget: Budget, dense: Dense) -> dict[str, Any]:
    violations: Mapping[str, float] = budget.violations(again.renewed.measured, dense)
    return {
        "trial": again.version.trial,
        "accuracy": again.version.measured["accuracy"].value,
        "searched_latency_s": again.version.measured["latency"].value,
        "latency": again.latency.to_dict(),
        "timings": again.timings,
        "broken": {name: value for name, value in violations.items() if value > 0},
    }


def _difference(taken: Again, first: Again) -> dict[str, Any]:
    lost = taken.version.measured["accuracy"].value - first.version.measured["accuracy"].value
    return {
        "trial": first.version.trial,
        "accuracy_points": lost * 100,
        "latency_s": taken.latency.value - first.latency.value,
    }
