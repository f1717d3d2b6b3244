"""Caveats of a search's results, as sentences."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from optuna.trial import TrialState

from evaluators.accuracy import interval
from search.config.budget import Constraint
from search.config.objectives import no_worse
from search.config.units import milliseconds, percent
from search.report.other_budget import other_budget_lines
from search.report.overview import Overview
from search.report.significance import difference
from search.report.unmet_budget import nearest_line
from search.results.pareto import Version
from search.results.store import StoredSearch

NOISY_MACHINE = 0.05
"""Relative difference of two timings of the same network above which the machine is called noisy."""
WIDE = 0.1
"""Relative half-width of an interval above which a latency is called noisy."""
_REASONS = 3


def caveats(overview: Overview) -> list[str]:
    """Returns the caveats as sentences: what is infeasible, failed, noisy, too close to call, or unconfirmed."""
    return [
        *_infeasible(overview),
        *other_budget_lines(overview),
        *_ended_early(overview),
        *_failed(overview),
        *_noisy(overview),
        *_close_to_limits(overview),
        *_hard_to_tell_apart(overview),
        *_remarks(overview),
        *_efforts(overview),
        *_unconfirmed(overview),
    ]


def trials(versions: list[Version]) -> str:
    """Returns versions as words: `trial 3`, `trials 3, 7 and 9`, `plain int8 and trial 3`."""
    numbers = [
        str(version.number) for version in sorted(versions, key=lambda version: version.number) if version.number >= 0
    ]
    names = [version.title for version in versions if version.number < 0]
    text = f"trials {', '.join(numbers[:-1])} and {numbers[-1]}" if len(numbers) > 1 else f"trial {''.join(numbers)}"
    return " and ".join([*names, *([text] if numbers else [])])


def _infeasible(overview: Overview) -> Iterator[str]:
    if not overview.feasible and not overview.front:
        yield f"No version keeps {overview.budget}. {nearest_line(overview)}"
    elif broken := overview.broken:
        count, not_scored = len(broken), sum(not version.is_complete for version in broken)
        verb, pronoun = ("does", "it") if count == 1 else ("do", "they")
        some = f"{not_scored} of them were" if not_scored < count else f"{pronoun} {'was' if count == 1 else 'were'}"
        unknown = f"; {some} not measured further, so the accuracy is unknown" if not_scored else ""
        yield f"{count} of {len(overview.versions)} versions {verb} not keep {overview.budget}{unknown}."


def _ended_early(overview: Overview) -> Iterator[str]:
    ended = overview.ended_early
    if ended:
        fewest, most = (function(version.measured["accuracy"].n for version in ended) for function in (min, max))
        count = str(most) if fewest == most else f"{fewest} to {most}"
        yield (
            f"{len(ended)} of {len(overview.versions)} versions were ended early, after {count} of"
            f" {overview.dense.measured['accuracy'].n} images: even the upper bound of the accuracy (at 99%) broke"
            f" {overview.search.budget} or was reached by a version {no_worse(overview.objectives)}. Their"
            " accuracies are estimates, and none of them counts as within the budget."
        )


def _failed(overview: Overview) -> Iterator[str]:
    reasons = Counter(
        str(trial.user_attrs.get("reason", "no reason given"))
        for trial in overview.search.trials
        if trial.state == TrialState.FAIL and "interrupted" not in trial.user_attrs
    )
    if reasons:
        causes = "; ".join(f"{count} times: {reason}" for reason, count in reasons.most_common(_REASONS))
        yield f"{sum(reasons.values())} trials failed ({causes})."


def _noisy(overview: Overview) -> Iterator[str]:
    noise = abs(overview.search.baseline.reference_self_ratio - 1)
    if noise > NOISY_MACHINE:
        yield f"The machine was noisy: the same network timed against itself differed by {noise:.0%}."
    wide = [version for version in overview.front if version.measured["latency"].half_width > WIDE]
    if wide:
        yield f"The latency of {trials(wide)} is uncertain by more than {WIDE:.0%}."


def _close_to_limits(overview: Overview) -> Iterator[str]:
    for constraint in overview.budget.constraints:
        close = [version for version in overview.front if _may_break(version, constraint, overview.dense)]
        if close:
            verb = "keeps" if len(close) == 1 else "keep"
            yield f"{trials(close).capitalize()} {verb} {constraint} by less than the measurement's 95% interval."


def _may_break(version: Version, constraint: Constraint, dense: Version) -> bool:
    """Returns whether the worse end of the measurement's interval breaks the limit."""
    measured = version.measured[constraint.measured_as]
    worse = measured
    if constraint.measured_as == "accuracy":
        worse = replace(measured, value=interval(measured)[0])
    elif constraint.measured_as == "latency":
        factor = 1 + measured.half_width
        others = {name: value * factor for name, value in measured.others.items()}
        worse = replace(measured, value=measured.value * factor, others=others)
    return constraint.violation(worse, dense.measured[constraint.measured_as]) > 0


def _hard_to_tell_apart(overview: Overview) -> Iterator[str]:
    if len(overview.front) < 2:
        return
    best, *others = overview.front
    first = best.measured["accuracy"]
    equivalent = [version for version in others if difference(first, version.measured["accuracy"]).is_noise]
    if equivalent:
        yield (
            f"On {first.n} validation images the accuracy of {trials(equivalent)} does not differ significantly from"
            f" that of the most accurate, {best.title}: the 95% intervals of the differences contain 0."
        )


def _remarks(overview: Overview) -> Iterator[str]:
    by_remark: dict[str, list[Version]] = {}
    for version in (*(other for other in overview.front if other is not overview.dense), overview.dense):
        for measurement in version.measured.values():
            for remark in measurement.remarks:
                by_remark.setdefault(remark, []).append(version)
            if measurement.unproven:
                text = "the runtime does not report in which precision some layers ran"
                by_remark.setdefault(text, []).append(version)
    for remark, versions in by_remark.items():
        own = [version for version in versions if version is not overview.dense]
        where = trials(list({version.number: version for version in own}.values())) if own else "dense network"
        yield f"{where.capitalize()}: {remark}."


def _efforts(overview: Overview) -> Iterator[str]:
    efforts = Counter(version.evaluation.effort for version in overview.front)
    if len(efforts) > 1:
        counts = ", ".join(f"{count} with {effort!r}" for effort, count in efforts.items())
        yield f"Versions of the front had different recovery, so not all of them are comparable: {counts}."


def _unconfirmed(overview: Overview) -> Iterator[str]:
    confirmed = {pick["trial"]: pick for pick in picks(overview.search)}
    for number, pick in confirmed.items():
        latency = f", latency {milliseconds(pick['latency_s'])}" if "latency_s" in pick else ""
        name = f"Trial {number}" if isinstance(number, int) else str(number)
        yield f"{name} was picked and measured again: {percent(pick['test_accuracy'])} on test images{latency}."
    if any(version.trial not in confirmed for version in overview.front):
        none = "No other version" if confirmed else "No version"
        yield f"{none} has been confirmed: pick measures one again in a new process, and on test images."


def picks(search: StoredSearch) -> list[dict[str, Any]]:
    """Returns the records of `pick` on the versions that it confirmed, in order."""
    file = search.folder.path / "picks.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines]
