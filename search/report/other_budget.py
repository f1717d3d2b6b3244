"""What a search that was run within one budget does not say of another."""

from search.config.units import milliseconds, percent
from search.report.overview import Overview
from search.results.pareto import Version


def other_budget_lines(overview: Overview) -> list[str]:
    """Returns sentences on what a search does not say of a budget that is not its own; none for its own."""
    own, budget = str(overview.search.budget), str(overview.budget)
    if own == budget:
        return []
    lines = []
    if undecided := len(overview.undecided):
        verb = "was" if undecided == 1 else "were"
        lines.append(
            f"{_versions(undecided)} {verb} never scored: {own} ended {'it' if undecided == 1 else 'them'} before the"
            f" accuracy was known, and what was measured keeps {budget}."
        )
    if solved := len(overview.solved):
        verb = "has" if solved == 1 else "have"
        lines.append(
            f"{_versions(solved)} {verb} thresholds of exits that were solved for {own}, and as they were solved there:"
            f" for {budget} others may be better."
        )
    if overview.predicted:
        lines.append(
            f"Solved again for {budget}, from the answers that were kept, these would be on the front, by prediction:"
            f" {'; '.join(_figures(version) for version in overview.predicted)}."
        )
    if lines:
        lines.append(f"A search with --budget '{budget}' starts from what this one measured, and settles both.")
    return lines


def _figures(version: Version) -> str:
    measured = version.measured
    return f"{version.title}, {percent(measured['accuracy'].value)} at {milliseconds(measured['latency'].value)}"


def _versions(number: int) -> str:
    return "1 version" if number == 1 else f"{number} versions"
