"""Registers the picked version in MLflow's model registry, for `mlflow models serve`."""

import io
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import mlflow
import numpy as np
from mlflow import MlflowClient
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, Schema, TensorSpec
from numpy.typing import NDArray

from evaluators.bundle.manifest import Manifest
from search.results.store import StoredSearch
from search.tracking.store import VARIABLE, Tracking, quiet
from search.tracking.trial_run import ROLE, SEARCH, TRIAL, figures_and_margins

if TYPE_CHECKING:
    from search.deploy.bundle import Confirmed

ALIAS = "deploy"
"""Alias of the version that was picked last."""
_SERVED = Path(__file__).with_name("pyfunc_model.py")
"""Copied into the model, and imported only there."""


@dataclass(frozen=True)
class Registered:
    """A model version.

    Args:
        name: of the model, that of the study.
        version: its number.
        tracking: its store.
    """

    name: str
    version: str
    tracking: Tracking

    @property
    def serve(self) -> str:
        """The command that serves it."""
        store = shlex.quote(self.tracking.shown)
        return f"{VARIABLE}={store} mlflow models serve -m models:/{self.name}@{ALIAS} --env-manager local"


def register(tracking: Tracking, search: StoredSearch, confirmed: "Confirmed", bundle: Path) -> Registered:
    """Registers a bundle as the next version of the study's model and moves the alias to it; returns it.

    Versions of earlier picks stay. Its run has the search's metrics and the confirmed ones.

    Raises:
        Exception: any error of MLflow if it cannot be reached.
    """
    with quiet(), _active(tracking):
        client = tracking.client()
        experiment = tracking.experiment(client, search.study.name)
        version, folder = confirmed.version, search.folder.name
        tags = {SEARCH: folder, ROLE: "pick", TRIAL: str(version.trial)}
        name = f"pick: {version.title} of {folder}"
        run_id = client.create_run(experiment, tags=tags, run_name=name).info.run_id
        with mlflow.start_run(run_id=run_id):
            info = mlflow.pyfunc.log_model(
                name="model",
                python_model=str(_SERVED),
                artifacts={"bundle": str(bundle)},
                signature=_signature(bundle),
                input_example=_example(bundle),
                pip_requirements=_requirements(bundle),
                registered_model_name=search.study.name,
            )
            mlflow.log_metrics(_metrics(search, confirmed), model_id=info.model_id)
        number = info.registered_model_version
        _describe(client, search, confirmed, str(number))
    return Registered(search.study.name, str(number), tracking)


@contextmanager
def _active(tracking: Tracking) -> Iterator[None]:
    """Sets the store for MLflow's fluent API, which is needed to log models, and hides its output on stderr."""
    before = os.environ.get(VARIABLE)
    mlflow.set_tracking_uri(tracking.uri)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        mlflow.set_tracking_uri(None)  # type: ignore[arg-type]  # resets it
        if before is not None:
            os.environ[VARIABLE] = before


def _describe(client: MlflowClient, search: StoredSearch, confirmed: "Confirmed", number: str) -> None:
    name, evaluation = search.study.name, confirmed.version.evaluation
    tags = {SEARCH: search.folder.name, TRIAL: str(confirmed.version.trial), "effort": evaluation.effort}
    for key, value in (tags | {"target": confirmed.latency.target, "budget": str(search.budget)}).items():
        client.set_model_version_tag(name, number, key, value)
    client.update_registered_model(name, search.study.question)
    client.update_model_version(name, number, f"{confirmed.version.title.capitalize()} of search {search.folder.name}.")
    client.set_registered_model_alias(name, ALIAS, number)


def _metrics(search: StoredSearch, confirmed: "Confirmed") -> dict[str, float]:
    """Returns the search's metrics, and those that were measured again."""
    return figures_and_margins(confirmed.version.evaluation, search) | {
        "confirmed_latency_ms": confirmed.latency.value * 1e3,
        "test_accuracy_pct": confirmed.test.value * 100,
        "dense_test_accuracy_pct": confirmed.dense_test.value * 100,
    }


def _example(bundle: Path) -> NDArray[np.float32]:
    images: NDArray[np.float32] = np.load(bundle / "check.npz")["images"]
    return images[:1]


def _signature(bundle: Path) -> ModelSignature:
    manifest = Manifest.read(bundle)
    images = TensorSpec(np.dtype(np.float32), (-1, *manifest.image_shape))
    names = [ColSpec("string", "name")] if manifest.class_names else []
    return ModelSignature(Schema([images]), Schema([ColSpec("long", "class"), ColSpec("string", "exit"), *names]))


def _requirements(bundle: Path) -> list[str]:
    """Returns the pinned packages that serving the bundle needs."""
    library = Manifest.read(bundle).library_name
    packages = ["mlflow", "numpy", "pandas", "onnxruntime", *([library] if library in ("openvino", "tensorrt") else [])]
    return [requirement for package in packages if (requirement := _pinned(package))]


def _pinned(package: str) -> str | None:
    try:
        return f"{package}=={version(package)}"
    except PackageNotFoundError:  # measured on a board, perhaps
        return None
