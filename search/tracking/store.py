"""MLflow's tracking store: a database beside the searches, or an existing server."""

import logging
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import optuna

if TYPE_CHECKING:
    from mlflow import MlflowClient

_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # A missing server must not block a search for minutes, as with MLflow's own defaults.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
DATABASE = "mlflow.db"
MODE = "?workflowType=machine_learning"
"""At the end of an address of MLflow's UI: its view of runs and models, not that of traces."""
PAGE = "report.html"
"""File name of the report among the artifacts of a search's summary."""
VARIABLE = "MLFLOW_TRACKING_URI"
_REMEMBERED = "tracking_uri"
_CREDENTIALS = re.compile(r"(?<=//)[^/@]*@")


def set_up_mlflow() -> None:
    """Sets short timeouts and less output for MLflow; the user's own environment variables take precedence.

    MLflow reads some of them when it is imported, which has to come afterwards.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)


@dataclass(frozen=True)
class Tracking:
    """A tracking store of MLflow.

    Args:
        uri: may contain a user name and a password.
        artifacts: URI of the folder for files; None for a server, which has its own.
    """

    uri: str
    artifacts: str | None

    @classmethod
    def of(cls, runs: Path, given: str | None = None, remembered: str | None = None) -> Self:
        """Returns the store to use: `given`, else MLflow's environment variable, else the one `remembered` by a search.

        Without any of them it is a database in `runs`, because MLflow's default depends on the working directory.
        """
        uri = given or os.environ.get(VARIABLE) or remembered or tracking_uri(runs)
        is_server = uri.partition(":")[0] in ("http", "https", "databricks", "databricks-uc")
        return cls(uri, None if is_server else (runs / "artifacts").resolve().as_uri())

    @property
    def shown(self) -> str:
        """The URI without user name and password."""
        return _CREDENTIALS.sub("", self.uri)

    @property
    def web(self) -> str | None:
        """Address of the UI for a browser; None for a database, which `search ui` serves."""
        return self.shown.rstrip("/") if self.uri.startswith(("http://", "https://")) else None

    def client(self) -> "MlflowClient":
        """Returns a client of the store."""
        set_up_mlflow()
        from mlflow import MlflowClient  # takes seconds

        if self.uri.startswith("sqlite:"):
            _use_write_ahead_log()
        return MlflowClient(self.uri)

    def experiment(self, client: "MlflowClient", name: str) -> str:
        """Returns the id of an experiment, created if needed."""
        experiment = client.get_experiment_by_name(name)
        if experiment:
            return str(experiment.experiment_id)
        return str(client.create_experiment(name, artifact_location=self.artifacts))


@cache
def _use_write_ahead_log() -> None:
    """Uses SQLite's write-ahead log, which avoids most waits for the disk, half of a trial's time, safely.

    A power loss may cost the last runs, but these are in the journal.
    """
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    @event.listens_for(Engine, "connect")
    def write_ahead(connection: Any, _record: Any) -> None:
        if isinstance(connection, sqlite3.Connection):
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")


def tracking_uri(runs: Path) -> str:
    """Returns the URI of the database in `runs`."""
    return f"sqlite:///{(runs / DATABASE).resolve()}"


def remember(journal: optuna.Study, tracking: Tracking, runs: Path) -> None:
    """Stores the tracking URI in a search's journal, for later commands."""
    if tracking.shown != (remembered(journal) or tracking_uri(runs)):
        journal.set_user_attr(_REMEMBERED, tracking.shown)


def remembered(journal: optuna.Study) -> str | None:
    """Returns the tracking URI of a search; None for the database beside it."""
    uri: str | None = journal.user_attrs.get(_REMEMBERED)
    return uri


@contextmanager
def quiet() -> Iterator[None]:
    """Silences logs of MLflow and Alembic, and of urllib3 on retries."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)
