"""`python -m search front`: the front in a terminal, as JSON or CSV."""

import csv
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from evaluators.streams import KEY_FRAMES
from search.commands.libraries import set_up_libraries
from search.config.budget import Budget
from search.config.objectives import together
from search.report.describe import ZEROS, kept_share
from search.report.layers import leaving_shares
from search.report.other_budget import other_budget_lines
from search.report.output import write_json, write_lines
from search.report.overview import Overview, beaten_lines
from search.report.tables import front_table
from search.report.text_plot import scatter
from search.report.unmet_budget import unmet_budget, unmet_json
from search.results.pareto import Version
from search.results.store import StoredSearch, find_search
from search.tracking.trial_run import figures

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
        rows = [csv_row(version, overview.dense) for version in [*overview.front, *overview.other_simple]]
        writer = csv.DictWriter(sys.stdout, list(rows[-1]), extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    else:
        print_front(overview, Console())
    return 0 if overview.front else NO_VERSION


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


def csv_row(version: Version, dense: Version) -> dict[str, str | float]:
    """Returns one version's figures by their headings, which include units."""
    candidate, whole = version.evaluation.candidate, dense.evaluation.candidate
    measured = figures(version.evaluation, dense.measured)
    lost = measured["accuracy_pct"] - figures(dense.evaluation, dense.measured)["accuracy_pct"]
    leave = zip(whole.thresholds.exits, leaving_shares(version), strict=True)
    keys = version.measured["accuracy"].notes.get(KEY_FRAMES)
    return {
        "trial": version.trial,
        **measured,
        "points": round(lost, 4),
        "channels_pct": round(kept_share(candidate, whole) * 100, 2),
        "blocks_removed": len(candidate.removed_blocks),
        "input_size": candidate.input_size or 0,  # 0: the images' own
        "int8_layers": list(candidate.precision.values()).count("int8"),
        **{f"leave_at_{name}_pct": round(share * 100, 2) for name, share in leave},
        **({"key_frames_pct": round(keys * 100, 2)} if keys is not None else {}),
    }


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
