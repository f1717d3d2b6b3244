"""Versions and trials as rows of a table for machines: CSV and JSON, with one type in each column."""

import csv
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from rich import box
from rich.table import Table

from evaluators.streams import KEY_FRAMES
from search.config.units import milliseconds, size
from search.report.describe import kept_share
from search.report.layers import leaving_shares
from search.report.overview import Overview
from search.results.pareto import Version
from search.tracking.trial_run import figures, reason_of

Row = Mapping[str, Any]
_CELLS: Mapping[str, Callable[[float], str]] = {
    "accuracy_pct": lambda value: f"{value:.2f}%",
    "latency_ms": lambda value: milliseconds(value / 1e3),
    "speedup": lambda value: f"{value:.2f}x",
    "size_mb": lambda value: size(value * 1e6),
}
"""Columns of the table for a terminal, and how each is written."""


def front_rows(overview: Overview) -> list[Row]:
    """Returns a row for each version of the front, and for each simple version below it."""
    versions = [*overview.front, *overview.other_simple]
    return [_named(version) | _measured(version, overview.dense) for version in versions]


def all_rows(overview: Overview) -> list[Row]:
    """Returns a row for each simple version and each trial: its state, what was measured of it, and its choices.

    A version that was recovered after the search has what was measured then. All rows have the same columns; None
    stands for what a trial does not have.
    """
    versions = {version.number: version for version in overview.versions}
    rows = [
        _named(version) | _state(overview, version, "baseline") | _measured(version, overview.dense)
        for version in overview.simple
    ]
    begun = (trial for trial in overview.search.trials if trial.state != TrialState.WAITING)
    rows += [_trial_row(overview, trial, versions.get(trial.number)) for trial in begun]
    columns = dict.fromkeys(column for row in rows for column in row)
    return [{column: row.get(column) for column in columns} for row in rows]


def write_csv(rows: Sequence[Row]) -> None:
    """Writes rows as CSV; what a row does not have is left empty."""
    columns = dict.fromkeys(column for row in rows for column in row)
    writer = csv.DictWriter(sys.stdout, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def trials_table(rows: Sequence[Row]) -> Table:
    """Returns trials as a table for a terminal, with what matters most of each."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.caption, table.caption_justify = "--csv and --json have all figures, and the choices of each trial", "left"
    for heading in ("version", "state", "accuracy", "latency", "speed", "size"):
        table.add_column(heading, no_wrap=True)
    table.add_column("reason")
    for row in rows:
        cells = ["-" if row.get(name) is None else form(row[name]) for name, form in _CELLS.items()]
        table.add_row(str(row["version"]), _shown_state(row), *cells, str(row.get("reason") or ""))
    return table


def _shown_state(row: Row) -> str:
    return "front" if row["on_front"] else "within" if row["within_budget"] else str(row["state"])


def _trial_row(overview: Overview, trial: FrozenTrial, version: Version | None) -> dict[str, Any]:
    named = {"trial": trial.number, "version": f"trial {trial.number}"}
    row = named | _state(overview, version, trial.state.name.lower())
    copied = trial.user_attrs.get("duplicate_of")
    reason = reason_of(trial, overview.search) or ("" if copied is None else f"the same version as trial {copied}")
    row |= {"reason": reason, "sampler": overview.search.sampler_of(trial.number)}
    measured = _measured(version, overview.dense) if version else {}
    return row | measured | trial.params


def _named(version: Version) -> dict[str, Any]:
    return {"trial": version.number if version.number >= 0 else None, "version": version.title}


def _state(overview: Overview, version: Version | None, state: str) -> dict[str, Any]:
    within = {each.number for each in overview.feasible_with_simple}
    on_front = {each.number for each in overview.front}
    number = version.number if version else None
    effort = version.evaluation.effort if version else None
    return {"state": state, "within_budget": number in within, "on_front": number in on_front, "recovery": effort}


def _measured(version: Version, dense: Version) -> dict[str, Any]:
    """Returns one version's figures by their headings, which include units."""
    candidate, whole = version.evaluation.candidate, dense.evaluation.candidate
    measured = figures(version.evaluation, dense.measured)
    accuracy = measured.get("accuracy_pct")
    lost = {} if accuracy is None else {"points": round(accuracy - dense.measured["accuracy"].value * 100, 4)}
    return {
        **measured,
        **lost,
        "channels_pct": round(kept_share(candidate, whole) * 100, 2),
        "blocks_removed": len(candidate.removed_blocks),
        "input_size": candidate.input_size or 0,  # 0: the images' own
        "int8_layers": list(candidate.precision.values()).count("int8"),
        **(_routes(version, whole.thresholds.exits) if accuracy is not None else {}),
    }


def _routes(version: Version, exits: Iterable[str]) -> dict[str, float]:
    """Returns the shares of the inputs that leave at each exit, and of key frames where there are frames."""
    leave = zip(exits, leaving_shares(version), strict=True)
    keys = version.measured["accuracy"].notes.get(KEY_FRAMES)
    return {
        **{f"leave_at_{name}_pct": round(share * 100, 2) for name, share in leave},
        **({"key_frames_pct": round(keys * 100, 2)} if keys is not None else {}),
    }
