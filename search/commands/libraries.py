"""Settings of libraries; each command applies them first, so that an import alone has no side effect."""

import warnings

import optuna

from search.tracking.store import set_up_mlflow


def set_up_libraries() -> None:
    """Silences Optuna and torch, and configures MLflow, which has to be imported afterwards."""
    set_up_mlflow()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    warnings.filterwarnings("ignore", "`torch.jit", category=FutureWarning)
