"""Mirrors the journal into MLflow, which is never read back for results."""

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlparse

from mlflow.entities import Metric, Param, Run
from optuna.trial import FrozenTrial

from search.config.command_lines import command_line
from search.report.overview import Overview
from search.results.evaluation import Evaluation
from search.results.store import StoredSearch
from search.tracking.store import Tracking, quiet
from search.tracking.summary_run import write_summary
from search.tracking.trial_run import (
    EFFORT,
    FRONT,
    NAME,
    ROLE,
    SEARCH,
    TRIAL,
    chunks,
    figures_and_margins,
    run_name,
    trial_content,
)

PAUSE_S = 60.0
"""Seconds without further attempts after a failure."""
_METRICS, _PARAMS = 1000, 100
"""Limits of MLflow servers per call."""

Say = Callable[[str], None]


class Mirror:
    """Writes a search to MLflow: one summary run, and one flat run for each trial.

    A trial's run is complete when it has ended; one that a crash left running is completed, so that there are no
    duplicates.

    Args:
        tracking: MLflow's store.
        search: read from its journal.

    Raises:
        Exception: any error of MLflow if it cannot be reached.
    """

    def __init__(self, tracking: Tracking, search: StoredSearch) -> None:
        self._tracking, self._search = tracking, search
        with quiet():
            self._client = tracking.client()
            self.experiment_id = tracking.experiment(self._client, search.study.name)

    def write(self, trials: Sequence[FrozenTrial]) -> int:
        """Writes the finished trials that are missing; returns how many it wrote."""
        existing = self._trial_runs()
        missing = [
            trial for trial in trials if trial.state.is_finished() and not _is_complete(existing.get(trial.number))
        ]
        for trial in missing:
            begun = existing.get(trial.number)
            self.write_one(trial, begun.info.run_id if begun else None)
        return len(missing)

    def write_one(self, trial: FrozenTrial, run_id: str | None = None) -> None:
        """Writes one finished trial, into a run that exists for it or a new one."""
        content = trial_content(trial, self._search)
        with quiet():
            if run_id is None:
                run: Run = self._client.create_run(
                    self.experiment_id, start_time=content.begin, tags=dict(content.tags), run_name=content.name
                )
                run_id = run.info.run_id
            self._log(run_id, content.metrics, content.params, content.end)
            self._client.set_terminated(run_id, content.status, content.end)

    def _log(
        self, run_id: str, metrics: Mapping[str, float], params: Mapping[str, str], at: int, step: int = 0
    ) -> None:
        points = [Metric(name, value, at, step) for name, value in metrics.items()]
        first, *more = chunks([Param(*pair) for pair in params.items()], _PARAMS) or [[]]
        self._client.log_batch(run_id, metrics=points, params=first)
        for chunk in more:
            self._client.log_batch(run_id, params=chunk)

    def finish(self) -> str:
        """Writes the summary, and tags trials of the front and recovered ones; returns the summary's run id."""
        overview = Overview.of(self._search)
        with quiet():
            runs = self._trial_runs()
            self._mark(runs, {version.number for version in overview.front})
            earlier = list(self._runs("summary"))
            addresses = {number: run.info.run_id for number, run in runs.items()}
            run_id = write_summary(self._client, self.experiment_id, overview, addresses, self._tracking.web)
            for run in earlier:
                self._delete(run)
        return run_id

    def _delete(self, run: Run) -> None:
        """Deletes a run, and its local files, which MLflow would keep."""
        self._client.delete_run(run.info.run_id)
        files = urlparse(run.info.artifact_uri)
        if files.scheme == "file" and Path(files.path).parent.name == run.info.run_id:
            shutil.rmtree(Path(files.path).parent, ignore_errors=True)

    def _mark(self, runs: Mapping[int, Run], front: set[int]) -> None:
        recovered = self._search.recovered
        for number, run in runs.items():
            if number in recovered and run.data.tags.get(EFFORT) != recovered[number].effort:
                self._write_recovered(run.info.run_id, recovered[number])
            on_front = number in front
            if run.data.tags.get(FRONT) != str(on_front).lower():
                self._client.set_tag(run.info.run_id, FRONT, str(on_front).lower())
                self._client.set_tag(run.info.run_id, NAME, run_name(number, on_front))

    def _write_recovered(self, run_id: str, evaluation: Evaluation) -> None:
        """Writes a version's metrics after full recovery as a second step of its trial's run."""
        self._log(run_id, figures_and_margins(evaluation, self._search), {}, int(time.time() * 1000), 1)
        self._client.set_tag(run_id, EFFORT, evaluation.effort)

    def _trial_runs(self) -> dict[int, Run]:
        """Returns the run of each trial; a duplicate, as after a lost response, is deleted."""
        runs: dict[int, Run] = {}
        for run in self._runs("trial"):
            number = int(run.data.tags[TRIAL])
            kept = runs.setdefault(number, run)
            if kept is not run:
                runs[number], other = (run, kept) if _is_complete(run) and not _is_complete(kept) else (kept, run)
                self._delete(other)
        return runs

    def _runs(self, role: str) -> Iterator[Run]:
        query = f"tags.{SEARCH} = '{self._search.folder.name}' and tags.{ROLE} = '{role}'"
        token: str | None = None
        while True:
            page = self._client.search_runs([self.experiment_id], query, max_results=_METRICS, page_token=token)
            yield from page
            token = page.token
            if not token:
                return


def _is_complete(run: Run | None) -> bool:
    return run is not None and run.info.status != "RUNNING"


class Follower:
    """Updates the mirror with the trials of a search; errors of MLflow never stop the search.

    If MLflow cannot be reached, it warns once, retries later, and then writes what is missing.

    Args:
        tracking: MLflow's store.
        search: read from its journal.
        say: called with the warning.
    """

    def __init__(self, tracking: Tracking, search: StoredSearch, say: Say) -> None:
        self._tracking = tracking
        self._search = search
        self._say = say
        self._mirror: Mirror | None = None
        self._unwritten = list(search.trials)
        self._retry_at = 0.0
        self._warned = False
        self.seconds = 0.0

    def begin(self) -> None:
        """Writes trials that an earlier process did not write."""
        self._try(self._catch_up)

    def trial_done(self, trial: FrozenTrial, seconds: float) -> None:  # noqa: ARG002  the observers' signature
        """Writes a trial, and earlier ones that could not be written."""
        begin = time.monotonic()
        self._unwritten.append(trial)
        if begin >= self._retry_at:
            self._try(self._catch_up)
        self.seconds += time.monotonic() - begin

    def finish(self, search: StoredSearch) -> bool:
        """Writes everything that is missing, and the summary; returns whether it succeeded.

        Args:
            search: read from its journal again, at its end.
        """
        self._search, self._unwritten = search, list(search.trials)
        return self._try(self._write_all)

    def _catch_up(self) -> None:
        if self._mirror is None:
            self._mirror = Mirror(self._tracking, self._search)
        # A single trial is new; of several, some may have been written before the connection was lost.
        if len(self._unwritten) == 1 and not self._warned:
            self._mirror.write_one(self._unwritten[0])
        else:
            self._mirror.write(self._unwritten)
        self._unwritten, self._warned = [], False

    def _write_all(self) -> None:
        self._mirror = Mirror(self._tracking, self._search)
        self._mirror.write(self._unwritten)
        self._mirror.finish()

    def _try(self, write: Callable[[], None]) -> bool:
        try:
            write()
        except Exception as error:  # MLflow is a mirror: whatever is wrong with it, the search goes on
            self._retry_at = time.monotonic() + PAUSE_S
            if not self._warned:
                self._say(
                    f"Careful: MLflow at {self._tracking.shown} cannot be written ({reason(error)}); the search goes"
                    f" on. Later: {command_line('sync', search=self._search.folder.path)}"
                )
            self._warned = True
            return False
        return True


def reason(error: Exception) -> str:
    """Returns the innermost cause of an error in a few words; it says more than MLflow's retry errors."""
    cause: BaseException = error
    while cause.__cause__ or cause.__context__:
        cause = cause.__cause__ or cause.__context__ or cause
    return f"{type(cause).__name__}: {' '.join(str(cause).split())}"[:160]


def mirror_all(tracking: Tracking, search: StoredSearch) -> int:
    """Completes the mirror of a search from its journal; returns how many trials were missing."""
    mirror = Mirror(tracking, search)
    written = mirror.write(search.trials)
    mirror.finish()
    return written
