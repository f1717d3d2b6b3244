"""Thresholds of exits, solved again for another budget from the answers that trials kept; accuracy and costs follow."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from evaluators.exits.threshold_problem import ResolvedThresholds, ThresholdProblem
from evaluators.measurement import Measurement, scaled
from search.config.budget import Budget
from search.results.pareto import Measurements, Version
from search.results.store import StoredSearch

ANSWERS = "answers"
"""Attribute of a trial: what its exits said of the images that chose its thresholds, and what leaving there costs."""
PREDICTED = "predicted for thresholds that were solved again"
"""The statistic of a predicted measurement."""
_IMAGES = 0.5
"""Images more or less that are right, from which accuracies differ."""
_LATENCY = 0.01
"""Share from which latencies differ."""


def solved_again(search: StoredSearch, versions: Sequence[Version], budget: Budget) -> list[Version]:
    """Returns versions as they are predicted to be with thresholds solved for another budget; those that change.

    Args:
        search: whose trials kept answers.
        versions: of it, fully measured.
        budget: to solve for.
    """
    kept = {trial.number: trial.user_attrs[ANSWERS] for trial in search.trials if ANSWERS in trial.user_attrs}
    dense = search.baseline.evaluation.measurements
    known = [version for version in versions if version.number in kept and version.number not in search.recovered]
    solved = [_solved(version, kept[version.number], budget, dense) for version in known]
    return [new for new, version in zip(solved, known, strict=True) if _differs(new, version)]


def _differs(new: Version, version: Version) -> bool:
    """Returns whether other thresholds change a version's accuracy or latency by more than a trifle."""
    one, other = new.measured, version.measured
    gained = one["accuracy"].value - other["accuracy"].value
    slower = one["latency"].value / other["latency"].value - 1
    return abs(gained) >= _IMAGES / other["accuracy"].n or abs(slower) >= _LATENCY


def _solved(version: Version, content: Mapping[str, Any], budget: Budget, dense: Measurements) -> Version:
    """Returns a version with thresholds solved for a budget, from the answers in `content`."""
    evaluation, measured = version.evaluation, version.measured
    problem = ThresholdProblem.from_dict(content)
    before = problem.outcome_of(content["thresholds"])
    floor = budget.accuracy_floor(dense)
    # What the scored images said of these thresholds corrects what those that chose them say of others.
    gap = measured["accuracy"].value - before.expected_accuracy
    ceilings = {metric: budget.ceiling(metric, dense) for metric in before.costs}
    after = problem.within(ceilings, None if floor is None else floor - gap).solve()
    exits = dict(zip(content["exits"], after.thresholds, strict=True))
    candidate = replace(evaluation.candidate, thresholds=evaluation.candidate.thresholds.with_exits(exits))
    predicted = {**measured, **_predicted(measured, before, after)}
    return replace(version, evaluation=replace(evaluation, candidate=candidate, measurements=predicted))


def _predicted(
    measured: Mapping[str, Measurement], before: ResolvedThresholds, after: ResolvedThresholds
) -> dict[str, Measurement]:
    """Returns accuracy and costs under other thresholds, by how they differ on the images that choose thresholds."""
    gained = after.expected_accuracy - before.expected_accuracy
    accuracy = min(max(measured["accuracy"].value + gained, 0.0), 1.0)
    costs = {
        metric: scaled(measured[metric], after.costs[metric] / cost) for metric, cost in before.costs.items() if cost
    }
    return {
        "accuracy": replace(measured["accuracy"], value=accuracy, statistic=PREDICTED),
        **{metric: replace(cost, statistic=PREDICTED) for metric, cost in costs.items()},
    }
