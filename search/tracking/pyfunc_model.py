"""The picked version as MLflow serves it; MLflow copies this file into the model and runs it there.

The input is images, `(n, c, h, w)` float32, preprocessed as in training; the output is, for each image, a class, the
name of the exit and, where classes have names, that of the class. Predictions are made by the bundle's own `run.py`.
Images are independent here, so a bundle for frames of a stream computes every frame.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow.pyfunc.model import PythonModel, PythonModelContext


class BundleModel(PythonModel):
    """Serves a bundle."""

    def load_context(self, context: PythonModelContext) -> None:
        """Loads the bundle's own code and its files."""
        folder = Path(context.artifacts["bundle"])
        self._run = _program(folder)
        self._network = self._run.load(folder)
        self._manifest = self._run.Manifest.read(folder)

    # Without type hints, because MLflow would take them for the signature.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]  # noqa: ARG002
        """Returns a class, an exit's name and, if there are any, the class's name for each image."""
        images = np.asarray(model_input, dtype=np.float32)
        manifest = self._manifest
        logits, routes, _ = self._run.answer(self._network, images, manifest.target.batch)
        classes = logits.argmax(axis=1)
        columns = {"class": classes, "exit": [manifest.ends[index] for index in self._run.exits_of(routes)]}
        if manifest.class_names:
            columns["name"] = [manifest.class_name(label) for label in classes]
        return pd.DataFrame(columns)


def _program(folder: Path) -> Any:
    """Returns the bundle's `run.py` as a module; modules of other bundles are removed first."""
    for file in folder.glob("*.py"):
        sys.modules.pop(file.stem, None)
    spec = importlib.util.spec_from_file_location("bundle_run", folder / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


mlflow.models.set_model(BundleModel())
