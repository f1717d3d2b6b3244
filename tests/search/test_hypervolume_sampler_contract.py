"""Our sampler keeps what Optuna asks of every sampler: its own published tests."""

import warnings
from collections.abc import Callable

import optuna
import pytest
from optuna.samplers import BaseSampler
from optuna.testing.pytest_samplers import (
    BasicSamplerTestCase,
    MultiObjectiveSamplerTestCase,
    RelativeSamplerTestCase,
)

from search.samplers.hypervolume.sampler import HypervolumeSampler


class TestHypervolumeSampler(BasicSamplerTestCase, MultiObjectiveSamplerTestCase, RelativeSamplerTestCase):
    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return lambda: HypervolumeSampler(seed=0, startup=2)


def test_partial_fixed_sampling_is_possible_with_surrogates() -> None:
    study = optuna.create_study(sampler=HypervolumeSampler(seed=0, startup=3))
    study.optimize(_bowl, n_trials=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        study.sampler = optuna.samplers.PartialFixedSampler({"y": 2}, study.sampler)
        study.optimize(_bowl, n_trials=2)
    assert [trial.params["y"] for trial in study.trials[-2:]] == [2, 2]


def _bowl(trial: optuna.Trial) -> float:
    return trial.suggest_float("x", -3, 3) ** 2 + trial.suggest_int("y", 0, 9)
