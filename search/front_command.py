"""`python -m search front`: the front in a terminal, as JSON or CSV."""

import csv
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from search.budget import Budget
from search.front import nearest_miss
from search.output import write_json
from search.review.overview import Overview
from search.review.scatter import scatter
from search.store import StoredSearch, find_search
from search.text import ZEROS, broken_limits, front_row, front_table, headings

NO_VERSION = 1
_PLOT = 60
"""A plot is drawn where lines hold so many characters."""


def show_front(budget: Budget | None, name: str | None, runs: Path, form: str) -> int:
    """Shows a search's front as a table, JSON or CSV; returns the exit code."""
    overview = Overview.of(StoredSearch.read(find_search(runs, name)), budget)
    if form == "json":
        write_json(front_json(overview))
    elif form == "csv":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(headings(overview.dense))
        writer.writerows(front_row(version, overview.dense) for version in [*overview.front, overview.dense])
    else:
        print_front(overview, Console())
    return 0 if overview.front else NO_VERSION


def front_json(overview: Overview) -> dict[str, Any]:
    """Returns the front and the dense network with all that was measured, for a machine."""
    return {
        "search": overview.search.folder.name,
        "budget": str(overview.budget),
        "front": [{"trial": version.number, **version.evaluation.to_dict()} for version in overview.front],
        "ended_early": [{"trial": version.number, **version.evaluation.to_dict()} for version in overview.ended_early],
        "dense": overview.dense.evaluation.to_dict(),
    }


def print_front(overview: Overview, console: Console) -> None:
    """Writes the front, or the nearest miss."""
    search, budget, dense = overview.search, overview.budget, overview.dense
    if overview.front:
        count = len(overview.front)
        versions = "1 version" if count == 1 else f"{count} versions"
        title = (
            f"{search.folder.name}: {versions} within {budget}; none is beaten in accuracy, latency and FLOPs together"
        )
        console.print(front_table(overview.front, dense, title, console.width))
        if console.width >= _PLOT:
            console.print()
            console.print(scatter(overview, console.width, console.options.ascii_only), highlight=False, markup=False)
        if any(pattern.endswith("%") for pattern in search.study.space.patterns):
            console.print(ZEROS, highlight=False, soft_wrap=True)
        if str(budget) != str(search.budget):
            _say_unmeasured(overview, console)
        return
    console.print(f"No version keeps {budget}.", highlight=False, soft_wrap=True)
    miss = nearest_miss(overview.versions, budget, dense.measured)
    if miss:
        text = f"The nearest, trial {miss[0].number}: {broken_limits(miss[0], budget, dense.measured)}."
        console.print(text, highlight=False, soft_wrap=True)
    _say_unmeasured(overview, console)


def _say_unmeasured(overview: Overview, console: Console) -> None:
    unknown = len(overview.given_up)
    if unknown:
        text = f"{unknown} versions broke {overview.search.budget} and were not measured further."
        console.print(text, highlight=False)
    ended = len(overview.ended_early)
    if ended:
        were = "1 version was" if ended == 1 else f"{ended} versions were"
        text = f"{were} ended early under {overview.search.budget}, after some of the images."
        console.print(text, highlight=False)
