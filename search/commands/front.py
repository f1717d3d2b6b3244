"""`python -m search front`: the front in a terminal, as JSON or CSV."""

from pathlib import Path
from typing import Any

from rich.console import Console

from search.commands.front_rows import all_rows, front_rows, trials_table, write_csv
from search.commands.libraries import set_up_libraries
from search.config.budget import Budget
from search.config.objectives import together
from search.report.describe import ZEROS
from search.report.other_budget import other_budget_lines
from search.report.output import write_json, write_lines
from search.report.overview import Overview, beaten_lines
from search.report.tables import front_table
from search.report.text_plot import scatter
from search.report.unmet_budget import unmet_budget, unmet_json
from search.results.pareto import Version
from search.results.store import StoredSearch, find_search

NO_VERSION = 1
_PLOT = 60
"""Width of the terminal, in characters, from which on a plot is drawn."""


def show_front(budget: Budget | None, name: str | None, runs: Path, form: str) -> int:
    """Shows a search's front as a table, JSON or CSV; returns the exit code."""
    set_up_libraries()
    overview = Overview.of(StoredSearch.read(find_search(runs, name)), budget)
    if form == "json":
        write_json(front_json(overview))
    elif form == "csv":
        write_csv(front_rows(overview))
    else:
        print_front(overview, Console())
    return 0 if overview.front else NO_VERSION


def show_trials(budget: Budget | None, name: str | None, runs: Path, form: str) -> int:
    """Shows every trial of a search, whatever became of it, as a table, JSON or CSV; returns the exit code."""
    set_up_libraries()
    rows = all_rows(Overview.of(StoredSearch.read(find_search(runs, name)), budget))
    if form == "json":
        write_json(rows)
    elif form == "csv":
        write_csv(rows)
    else:
        Console().print(trials_table(rows))
    return 0


def front_json(overview: Overview) -> dict[str, Any]:
    """Returns the front and the dense network with all measurements, JSON-ready."""
    return {
        "search": overview.search.folder.name,
        "budget": str(overview.budget),
        "objectives": list(overview.objectives),
        "front": [_content(version) for version in overview.front],
        "simple": [{**_content(version), "on_front": version in overview.front} for version in overview.simple],
        "beaten": [_content(version) for version in overview.beaten],
        "ended_early": [_content(version) for version in overview.ended_early],
        "undecided": [version.trial for version in overview.undecided],
        "solved_for": str(overview.search.budget),
        "predicted": [_content(version) for version in overview.predicted],
        "not_scored": [_content(version) for version in overview.not_scored],
        "unmet": unmet_json(overview),
        "dense": overview.dense.evaluation.to_dict(),
    }


def _content(version: Version) -> dict[str, Any]:
    return {"trial": version.trial, **version.evaluation.to_dict()}


def print_front(overview: Overview, console: Console) -> None:
    """Prints the front, or the nearest miss if it is empty."""
    search = overview.search
    budget = overview.budget
    dense = overview.dense
    if overview.front:
        title = (
            f"{search.folder.name}: {_versions(len(overview.front))} within {budget}; none is beaten in"
            f" {together(overview.objectives)} together"
        )
        console.print(front_table(overview.front, dense, title, console.width, overview.other_simple))
        write_lines(console, beaten_lines(overview))
        if console.width >= _PLOT:
            console.print()
            console.print(scatter(overview, console.width, console.options.ascii_only), highlight=False, markup=False)
        if any(pattern.endswith("%") for pattern in search.study.space.patterns):
            console.print(ZEROS, highlight=False, soft_wrap=True)
        write_lines(console, other_budget_lines(overview))
        return
    write_lines(console, [*unmet_budget(overview), *other_budget_lines(overview)])


def _versions(number: int) -> str:
    return "1 version" if number == 1 else f"{number} versions"
