"""How the libraries behind a command behave: each command sets it first, so that an import alone changes nothing."""

import warnings

import optuna

from search.tracking.store import set_up_mlflow


def set_up_libraries() -> None:
    """Keeps the notes of Optuna and torch off the screen, and sets up MLflow, which is to be imported afterwards."""
    set_up_mlflow()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    warnings.filterwarnings("ignore", "`torch.jit", category=FutureWarning)
