"""Where MLflow keeps its runs: a database beside the searches, or a server that is there already."""

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
    # A server that is gone must not hold a search up for minutes, as MLflow's own defaults would.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
DATABASE = "mlflow.db"
PAGE = "report.html"
"""The report among the files of a search's summary."""
VARIABLE = "MLFLOW_TRACKING_URI"
_REMEMBERED = "tracking_uri"
_CREDENTIALS = re.compile(r"(?<=//)[^/@]*@")


def set_up_mlflow() -> None:
    """Keeps MLflow from waiting for minutes and from talking; what the user has set in the environment holds.

    Some of it MLflow reads when it is imported, which is to come afterwards.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)


@dataclass(frozen=True)
class Tracking:
    """A place for MLflow's runs.

    Args:
        uri: its address, perhaps with a name and a password in it.
        artifacts: the folder for files, as an address; None where the server knows its own.
    """

    uri: str
    artifacts: str | None

    @classmethod
    def of(cls, runs: Path, given: str | None = None, remembered: str | None = None) -> Self:
        """Returns the place to use: what is `given`, else MLflow's own variable, else what a search was begun with.

        Without any of them it is a database under `runs`: MLflow's own default depends on the folder one is in.
        """
        uri = given or os.environ.get(VARIABLE) or remembered or tracking_uri(runs)
        is_server = uri.partition(":")[0] in ("http", "https", "databricks", "databricks-uc")
        return cls(uri, None if is_server else (runs / "artifacts").resolve().as_uri())

    @property
    def shown(self) -> str:
        """The address without a name and a password."""
        return _CREDENTIALS.sub("", self.uri)

    @property
    def web(self) -> str | None:
        """Where a browser finds the UI; None for a database, which `search ui` serves."""
        return self.shown.rstrip("/") if self.uri.startswith(("http://", "https://")) else None

    def client(self) -> "MlflowClient":
        """Returns a client of it."""
        set_up_mlflow()
        from mlflow import MlflowClient  # takes seconds

        if self.uri.startswith("sqlite:"):
            _wait_less_for_the_disk()
        return MlflowClient(self.uri)

    def experiment(self, client: "MlflowClient", name: str) -> str:
        """Returns the id of an experiment, made if need be."""
        found = client.get_experiment_by_name(name)
        if found:
            return str(found.experiment_id)
        return str(client.create_experiment(name, artifact_location=self.artifacts))


@cache
def _wait_less_for_the_disk() -> None:
    """Lets SQLite write ahead, which spares most waits: half of a trial's time, and no crash can damage the file.

    What a loss of power may cost, the last runs, is in the journal.
    """
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    @event.listens_for(Engine, "connect")
    def write_ahead(connection: Any, _record: Any) -> None:
        if isinstance(connection, sqlite3.Connection):
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")


def tracking_uri(runs: Path) -> str:
    """Returns the address of the database under `runs`."""
    return f"sqlite:///{(runs / DATABASE).resolve()}"


def remember(journal: optuna.Study, tracking: Tracking, runs: Path) -> None:
    """Notes in a search's journal where its runs go, for the commands that come later."""
    if tracking.shown != (remembered(journal) or tracking_uri(runs)):
        journal.set_user_attr(_REMEMBERED, tracking.shown)


def remembered(journal: optuna.Study) -> str | None:
    """Returns where a search's runs go; None where it is the database beside it."""
    uri: str | None = journal.user_attrs.get(_REMEMBERED)
    return uri


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps MLflow's and Alembic's notes, and urllib3's about retries, off the screen."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)
