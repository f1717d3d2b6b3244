"""MLflow, as a mirror of the journal: written after it, never read back for a result."""

import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

from mlflow import MlflowClient
from mlflow.entities import Experiment, Metric, Param, Run

from search.evaluation import Evaluation
from search.front import Version, feasible, hypervolume, pareto
from search.plots import caption, front_html, group, save_front_png
from search.store import StoredSearch
from search.text import HEADINGS, broken_limits, front_row

DATABASE = "mlflow.db"
_SEARCH, _ROLE, _TRIAL = "search", "role", "trial"


def tracking_uri(runs: Path) -> str:
    """Returns the address of the store under `runs`, said always: MLflow's own default depends on the folder."""
    return f"sqlite:///{(runs / DATABASE).resolve()}"


class Mirror:
    """Writes a search to MLflow: one summary run, and one flat run for each trial.

    Args:
        runs: the folder of all searches, which holds the store.
        search: as its journal has it.
    """

    def __init__(self, runs: Path, search: StoredSearch) -> None:
        with _quiet():
            self._client = MlflowClient(tracking_uri(runs))
            self.experiment_id = self._experiment(runs, search.study.name)
        self._search = search
        self._dense = Version(-1, search.baseline.evaluation)
        self.seconds = 0.0

    def _experiment(self, runs: Path, name: str) -> str:
        found: Experiment | None = self._client.get_experiment_by_name(name)
        if found:
            return str(found.experiment_id)
        return str(self._client.create_experiment(name, artifact_location=(runs / "artifacts").resolve().as_uri()))

    def trial_done(self, trial: FrozenTrial, seconds: float) -> None:  # noqa: ARG002  the observers' signature
        """Writes one trial."""
        begin = time.monotonic()
        self._write(trial)
        self.seconds += time.monotonic() - begin

    def catch_up(self, trials: Sequence[FrozenTrial]) -> None:
        """Writes the finished trials that a stopped process did not get to."""
        there = set(self._trial_runs())
        for trial in trials:
            if trial.state.is_finished() and trial.number not in there:
                self._write(trial)

    def _write(self, trial: FrozenTrial) -> None:
        now = int(time.time() * 1000)
        start = int(trial.datetime_start.timestamp() * 1000) if trial.datetime_start else now
        tags = {
            "mlflow.runName": f"trial {trial.number}",
            _SEARCH: self._search.folder.name,
            _ROLE: "trial",
            _TRIAL: str(trial.number),
            "state": trial.state.name.lower(),
            "front": "false",
        }
        tags |= {name: str(trial.user_attrs[name]) for name in ("reason", "duplicate_of") if name in trial.user_attrs}
        metrics: dict[str, float] = {}
        if "evaluation" in trial.user_attrs:
            evaluation = Evaluation.from_dict(trial.user_attrs["evaluation"])
            metrics = self._metrics(evaluation)
            met = self._search.budget.is_met(evaluation.measurements, self._dense.measured)
            tags |= {"feasible": str(met).lower(), "effort": evaluation.effort}
            metrics |= self._margins(evaluation)
            broken = broken_limits(Version(trial.number, evaluation), self._search.budget, self._dense.measured)
            tags |= {"reason": f"not measured further: {broken}"} if trial.state == TrialState.PRUNED else {}
        run: Run = self._client.create_run(
            self.experiment_id, start_time=start, tags=tags, run_name=f"trial {trial.number}"
        )
        self._client.log_batch(
            run.info.run_id,
            metrics=[Metric(name, value, now, 0) for name, value in metrics.items()],
            params=[Param(name, str(value)) for name, value in trial.params.items()],
        )
        status = "FAILED" if trial.state == TrialState.FAIL else "FINISHED"
        self._client.set_terminated(run.info.run_id, status)

    def _margins(self, evaluation: Evaluation) -> dict[str, float]:
        """Returns how far each limit is kept, in percent of it; negative where it is broken."""
        return {
            f"margin_{constraint.name.replace('.', '_')}_pct": round(
                -100 * constraint.violation(found, self._dense.measured[constraint.measured_as]), 3
            )
            for constraint in self._search.budget.constraints
            if (found := evaluation.measurements.get(constraint.measured_as))
        }

    def _metrics(self, evaluation: Evaluation) -> dict[str, float]:
        """Returns the figures in the units that people read."""
        measured, dense = evaluation.measurements, self._dense.measured
        metrics = {
            "latency_ms": ("latency", 1e3),
            "accuracy_pct": ("accuracy", 100.0),
            "size_mb": ("size", 1e-6),
            "params_k": ("params", 1e-3),
        }
        shown = {name: measured[m].value * scale for name, (m, scale) in metrics.items() if m in measured}
        if "flops" in measured:
            shown["flops_pct_of_dense"] = measured["flops"].value / dense["flops"].value * 100
        if "latency" in measured:
            others = dict(measured["latency"].others)
            shown["latency_longest_path_ms"] = others.pop("worst") * 1e3
            shown |= {f"latency_wall_{name}_ms": value * 1e3 for name, value in others.items()}
            shown["speedup"] = dense["latency"].value / measured["latency"].value
        return {name: round(value, 4) for name, value in shown.items()}

    def finish(self, search: StoredSearch) -> str:
        """Writes the summary, marks the front and what was recovered in full; returns the summary's run id.

        Args:
            search: read again at its end.
        """
        trials, versions = search.trials, search.versions
        good = feasible(versions, self._search.budget, self._dense.measured)
        front = pareto(good)
        self._mark({version.number for version in front}, search.recovered)
        run_id = self._summary_run()
        for name, value in {
            "trials": float(sum(trial.state.is_finished() for trial in trials)),
            "feasible_trials": float(len(good)),
            "front_trials": float(len(front)),
            "hypervolume": hypervolume(front, self._search.budget, self._dense.measured),
        }.items():
            self._client.log_metric(run_id, name, value)
        for name, value in _flat(search.report).items():
            self._client.log_metric(run_id, f"sampler_{name}", value)
        with tempfile.TemporaryDirectory() as folder:
            self._write_summary(Path(folder), versions, good, front)
            self._client.log_artifacts(run_id, folder)
        with _quiet():
            self._client.log_table(run_id, self._table(front), "front.json")
        self._client.set_tag(run_id, "mlflow.note.content", self._note(front))
        self._client.set_terminated(run_id)
        return run_id

    def _write_summary(self, folder: Path, versions: list[Version], good: list[Version], front: list[Version]) -> None:
        budget = self._search.budget
        groups, title = group(versions, front, good, self._dense), caption(versions, budget, self._dense)
        (folder / "front.html").write_text(front_html(groups, title, budget), encoding="utf-8")
        save_front_png(groups, title, budget, folder / "front.png")
        (folder / "study.json").write_text(self._search.study.model_dump_json(indent=2), encoding="utf-8")
        lines = [f"{name}: {value}" for name, value in self._search.baseline.environment.items()]
        (folder / "environment.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def _table(self, front: list[Version]) -> dict[str, list[str]]:
        rows = [front_row(version, self._dense) for version in [*front, self._dense]]
        return {heading: [row[index] for row in rows] for index, heading in enumerate(HEADINGS)}

    def _note(self, front: list[Version]) -> str:
        """Returns the front as Markdown: the first thing that the summary's page shows."""
        budget, baseline = self._search.budget, self._search.baseline
        rows = [
            HEADINGS,
            ["---"] * len(HEADINGS),
            *(front_row(version, self._dense) for version in [*front, self._dense]),
        ]
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        return (
            f"**{len(front)} versions within `{budget}` that no other beats** in accuracy, latency and FLOPs together."
            f" Latency per batch on {baseline.evaluation.measurements['latency'].target}."
            f" Pictures are under Artifacts.\n\n{table}\n"
        )

    def _mark(self, front: set[int], recovered: Mapping[int, Evaluation]) -> None:
        for number, run in self._trial_runs().items():
            if number in recovered and run.data.tags.get("effort") != recovered[number].effort:
                self._write_recovered(run.info.run_id, recovered[number])
            on_front = str(number in front).lower()
            if run.data.tags.get("front") != on_front:
                self._client.set_tag(run.info.run_id, "front", on_front)
                name = f"trial {number} (front)" if number in front else f"trial {number}"
                self._client.set_tag(run.info.run_id, "mlflow.runName", name)

    def _write_recovered(self, run_id: str, evaluation: Evaluation) -> None:
        """Writes what a version came to after the search as a second step of its trial's metrics."""
        now = int(time.time() * 1000)
        found = self._metrics(evaluation) | self._margins(evaluation)
        self._client.log_batch(run_id, metrics=[Metric(name, value, now, 1) for name, value in found.items()])
        self._client.set_tag(run_id, "effort", evaluation.effort)

    def _trial_runs(self) -> dict[int, Run]:
        return {int(run.data.tags[_TRIAL]): run for run in self._runs("trial")}

    def _summary_run(self) -> str:
        """Returns the id of the summary, whose table a resumed search writes anew."""
        for run in self._runs("summary"):
            self._client.delete_run(run.info.run_id)
        name = self._search.folder.name
        tags = {_SEARCH: name, _ROLE: "summary", "budget": str(self._search.budget)}
        run = self._client.create_run(self.experiment_id, tags=tags, run_name=f"{name}: summary")
        return str(run.info.run_id)

    def _runs(self, role: str) -> Iterator[Run]:
        query = f"tags.{_SEARCH} = '{self._search.folder.name}' and tags.{_ROLE} = '{role}'"
        token: str | None = None
        while True:
            page = self._client.search_runs([self.experiment_id], query, max_results=1000, page_token=token)
            yield from page
            token = page.token
            if not token:
                return


def _flat(report: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers of a sampler's report, each under all of its headings."""
    found: dict[str, float] = {}
    for name, content in report.items():
        if isinstance(content, dict):
            found |= {f"{name}_{inner}": value for inner, value in _flat(content).items()}
        elif isinstance(content, int | float):
            found[name] = float(content)
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps MLflow's and Alembic's notes about a new database off the screen."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)
