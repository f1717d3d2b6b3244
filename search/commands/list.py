"""`python -m search list`: the searches of a folder, with their budgets, their states and their best versions."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from evaluators.measurement import METRICS
from search.commands.libraries import set_up_libraries
from search.config.objectives import Objectives
from search.config.units import quantity
from search.report.output import Output, write_json, write_lines
from search.report.overview import Overview
from search.results.folders import search_names
from search.results.pareto import Version, choose
from search.results.store import SearchFolder, StoredSearch
from spaces.errors import UserError

RUNNING, STOPPED = "running", "stopped"
ENDED = "ended"
NO_TRIAL, UNREADABLE = "no trial yet", "unreadable"
"""The states of a search; one that was stopped goes on where it was by the command that began it."""


@dataclass(frozen=True)
class ListedSearch:
    """One search of a folder.

    Args:
        name: of its folder.
        state: one of the states.
        budget: as text; empty if it is unknown.
        target: runtime and device; empty if it is unknown.
        trials: number of those that have ended.
        planned: number of trials of its study.
        objectives: of the search.
        best: its most accurate version within the budget; None if there is none.
        reason: why it cannot be read.
    """

    name: str
    state: str
    budget: str = ""
    target: str = ""
    trials: int = 0
    planned: int = 0
    objectives: Objectives = ()
    best: Version | None = None
    reason: str = ""

    @classmethod
    def read(cls, folder: SearchFolder) -> "ListedSearch":
        """Returns what is in a search's folder."""
        is_running = folder.is_locked
        try:
            if "baseline" not in folder.open().user_attrs:
                return cls(folder.name, RUNNING if is_running else NO_TRIAL)
            search = StoredSearch.read(folder)
        except UserError as error:
            return cls(folder.name, UNREADABLE, reason=str(error))
        planned = search.study.search.trials
        state = RUNNING if is_running else ENDED if search.finished >= planned else STOPPED
        overview = Overview.of(search)
        best = choose(overview.front, "accuracy", search.objectives)[0] if overview.front else None
        target = overview.dense.measured["latency"].target
        return cls(folder.name, state, str(search.budget), target, search.finished, planned, search.objectives, best)

    def best_text(self) -> str:
        """Returns the objectives of its best version: `95.80%, 4.85 ms`."""
        if self.best is None:
            return "-"
        values = (quantity(self.best.measured[name].value, METRICS[name].unit) for name in self.objectives)
        return ", ".join(values)

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready copy, values in SI units."""
        measured = {name: self.best.measured[name].value for name in self.objectives} if self.best else {}
        return {
            "search": self.name,
            "state": self.state,
            "budget": self.budget,
            "target": self.target,
            "trials": self.trials,
            "planned": self.planned,
            "best": {"version": self.best.title, **measured} if self.best else None,
            "reason": self.reason,
        }


def list_searches(runs: Path, output: Output) -> int:
    """Shows the searches of a folder, the one that was written last first; returns the exit code."""
    set_up_libraries()
    searches = [ListedSearch.read(SearchFolder(runs / name)) for name in search_names(runs)]
    if output.as_json:
        write_json([search.to_dict() for search in searches])
        return 0
    console = output.console()
    if not searches:
        write_lines(console, [f"No search in {runs} yet; start one with: python -m search --budget 'latency<5ms'"])
        return 0
    console.print(_table(searches))
    write_lines(console, [f"{search.name}: {search.reason}" for search in searches if search.reason])
    return 0


def _table(searches: list[ListedSearch]) -> Table:
    """Returns a row for each search."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.caption, table.caption_justify = "best: the most accurate version within the budget", "left"
    for heading in ("search", "budget"):
        table.add_column(heading, overflow="fold")
    for heading in ("state", "trials", "best"):
        table.add_column(heading)
    for search in searches:
        trials = f"{search.trials}/{search.planned}" if search.planned else "-"
        table.add_row(search.name, search.budget or "-", search.state, trials, search.best_text())
    return table
