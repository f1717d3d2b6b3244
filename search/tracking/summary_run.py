"""The summary run of a search: its report, its pictures, and its front with links to the trials."""

import re
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric

from search.config.objectives import together
from search.report.html_page import page
from search.report.matplotlib_figures import save_pictures
from search.report.overview import Overview
from search.report.report import Table, front_of, markdown, report_of
from search.results.pareto import Version
from search.tracking.store import MODE, PAGE
from search.tracking.trial_run import NOTE, ROLE, SEARCH, chunks

TABLE = "front.json"
_AT_ONCE = 1000
_NOTE_LENGTH = 7500
"""Characters of a note; MLflow's limit is 8000."""


def write_summary(
    client: MlflowClient, experiment: str, overview: Overview, runs: Mapping[int, str], web: str | None
) -> str:
    """Writes a search's summary run; returns its id.

    Args:
        client: of MLflow.
        experiment: id of the search's experiment.
        overview: of the search.
        runs: run ids by trial.
        web: address of the UI for links, or None.
    """
    search = overview.search

    def address(version: Version) -> str:
        return f"#/experiments/{experiment}/runs/{runs[version.number]}{MODE}" if version.number in runs else ""

    tags = {SEARCH: search.folder.name, ROLE: "summary", "budget": str(overview.budget)}
    tags["objectives"] = ", ".join(overview.objectives)
    run_id = str(client.create_run(experiment, tags=tags, run_name=f"{search.folder.name}: summary").info.run_id)
    _log_figures(client, run_id, overview)
    with tempfile.TemporaryDirectory() as folder:
        link = (lambda version: f"{web}/{address(version)}" if address(version) else "") if web else None
        write_files(Path(folder), overview, link)
        client.log_artifacts(run_id, folder)
    table = front_of(overview)
    client.log_table(run_id, {name: [row[i] for row in table.rows] for i, name in enumerate(table.headings)}, TABLE)
    client.set_tag(run_id, NOTE, note(overview, address))
    client.set_terminated(run_id)
    return run_id


def _log_figures(client: MlflowClient, run_id: str, overview: Overview) -> None:
    """Logs the counts, and the hypervolume after each trial, which MLflow draws as a line."""
    now = int(time.time() * 1000)
    counts = {
        "trials": overview.search.finished,
        "feasible_trials": len(overview.feasible),
        "front_trials": len(overview.front),
        "early_trials": len(overview.ended_early),
    }
    report = {_metric_name(f"sampler_{name}"): value for name, value in _flat(overview.search.report).items()}
    metrics = [Metric(name, float(value), now, 0) for name, value in (counts | report).items()]
    metrics += [Metric("hypervolume_pct", share * 100, now, trial) for trial, share in overview.hypervolume_history]
    for chunk in chunks(metrics, _AT_ONCE):
        client.log_batch(run_id, metrics=chunk)


def _metric_name(name: str) -> str:
    """Returns a name that MLflow accepts; limits such as `size<80%` are parts of some names."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", name)


def _flat(report: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers of a sampler's nested report, by joined keys."""
    numbers: dict[str, float] = {}
    for name, content in report.items():
        if isinstance(content, dict):
            numbers |= {f"{name}_{inner}": value for inner, value in _flat(content).items()}
        elif isinstance(content, int | float):
            numbers[name] = float(content)
    return numbers


def write_files(folder: Path, overview: Overview, link: Callable[[Version], str] | None) -> None:
    """Writes the report as HTML and Markdown, the pictures, the study and the environment."""
    search = overview.search
    (folder / PAGE).write_text(page(overview, link), encoding="utf-8")
    (folder / "report.md").write_text(report_of(overview).to_markdown(), encoding="utf-8")
    save_pictures(overview, folder)
    (folder / "study.json").write_text(search.study.model_dump_json(indent=2), encoding="utf-8")
    lines = [f"{name}: {value}" for name, value in search.baseline.environment.items()]
    (folder / "environment.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def note(overview: Overview, address: Callable[[Version], str]) -> str:
    """Returns the front as Markdown for the run's description, with links, truncated to the length of a note."""
    target = overview.dense.measured["latency"].target
    head = (
        f"**{len(overview.front)} versions within `{overview.budget}` that no other beats** in"
        f" {together(overview.objectives)} together. Latency per batch on {target}. The report with its pictures is"
        f" under Artifacts: {PAGE}."
    )
    table = front_of(overview)
    rows = [list(row) for row in table.rows]
    for row, version in zip(rows, overview.front, strict=False):
        row[0] = f"[{row[0]}]({address(version)})" if address(version) else row[0]
    front, below = rows[: len(overview.front)], rows[len(overview.front) :]
    shown = len(front)
    while shown and len(markdown(Table(table.headings, [*front[:shown], *below]))) + len(head) > _NOTE_LENGTH:
        shown -= 1
    more = f"\n\nand {len(front) - shown} more, see {TABLE}" if shown < len(front) else ""
    return f"{head}\n\n{markdown(Table(table.headings, [*front[:shown], *below]))}{more}\n"
