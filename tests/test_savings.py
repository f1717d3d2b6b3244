"""What is told of versions whose thresholds are solved: the longest path by layers, the rest by how far it is off."""

from dataclasses import replace

import numpy as np
import optuna
import pytest
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from evaluators.measurement import Measurement
from search.budget import Budget
from search.gating import AIM, aimed
from search.samplers.beliefs import Beliefs, believe
from search.samplers.objectives import Observed, observe
from search.samplers.structure import Meaning
from studies.benchmarks.synthetic import Problem, Setting

PROBLEM = Problem(0, Setting(layers=9, exits=0, limit_s=0.003, noise=0.0))
AIMED = 0.003 * AIM
DIRECTIONS = [StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE, StudyDirection.MINIMIZE]
METRICS = ("accuracy", "latency", "flops")


def meaning(is_solved: bool) -> Meaning:
    known = PROBLEM.meaning()
    accuracy, latency, flops = known.aims
    return replace(known, aims=(accuracy, replace(latency, aimed=AIMED), flops), is_solved=is_solved)


def trials(count: int) -> list[FrozenTrial]:
    """Returns trials of random versions whose exits save just what is needed; a third of them break another limit."""
    rng = np.random.default_rng(0)
    rows = PROBLEM.codec.random(count, rng)
    made = []
    for number, (row, (accuracy, seconds, flops)) in enumerate(zip(rows, PROBLEM.true(rows), strict=True)):
        noise, share = 1 + 0.01 * rng.standard_normal(), min(1.0, AIMED / seconds)
        costs = {"latency": (seconds * share * noise, seconds), "flops": (flops * share, flops)}
        kept = {name: {"value": value, "others": {"worst": worst}} for name, (value, worst) in costs.items()}
        is_whole = number % 3 > 0
        made.append(
            optuna.trial.create_trial(
                params=PROBLEM.codec.decode(row),
                distributions=dict(PROBLEM.codec.space),
                values=[accuracy, costs["latency"][0], costs["flops"][0]] if is_whole else None,
                state=TrialState.COMPLETE if is_whole else TrialState.PRUNED,
                user_attrs={"evaluation": {"measurements": kept}},
            )
        )
    return made


@pytest.fixture(scope="module")
def observed() -> Observed:
    return observe(trials(90), PROBLEM.codec, DIRECTIONS, PROBLEM.meaning().links, METRICS)


@pytest.fixture(scope="module")
def beliefs(observed: Observed) -> Beliefs:
    return believe(observed, PROBLEM.codec, meaning(is_solved=True))


def test_what_was_measured_before_a_limit_was_broken_is_known(observed: Observed) -> None:
    unknown = np.isnan(observed.costs)
    assert unknown[::3, 0].all()
    assert not unknown[:, 1:].any()
    assert np.isnan(observed.longest[:, 0]).all()
    assert (observed.longest[:, 1:] >= observed.costs[:, 1:] * 0.9).all()


def test_the_longest_path_and_the_flops_that_exits_leave_are_told(observed: Observed, beliefs: Beliefs) -> None:
    assert beliefs.errors["longest path"].r2 > 0.9
    usual = believe(observed, PROBLEM.codec, meaning(is_solved=False)).errors["objective 2"]
    assert beliefs.errors["objective 2"].mape < 0.5 * usual.mape


def test_a_version_that_breaks_the_limit_without_exits_is_expected_near_what_is_aimed_at(beliefs: Beliefs) -> None:
    rows = PROBLEM.codec.random(200, np.random.default_rng(1))
    seconds = PROBLEM.true(rows)[:, 1]
    latency = beliefs.objectives[1]
    found = latency.scale.back(latency.means(rows))
    assert found[seconds > 1.2 * AIMED] == pytest.approx(AIMED, rel=0.05)
    assert found == pytest.approx(np.minimum(seconds, AIMED), rel=0.2)


def test_versions_without_timings_are_told_by_their_layers_alone(observed: Observed) -> None:
    untimed = replace(observed, longest=np.full_like(observed.longest, np.nan))
    errors = believe(untimed, PROBLEM.codec, meaning(is_solved=True)).errors
    assert "longest path" not in errors
    assert errors["objective 1"].count == len(observed.rows)


@pytest.mark.parametrize(
    ("text", "metric", "expected"),
    [
        ("latency<5ms", "latency", AIM * 0.005),
        ("flops<50%", "flops", AIM * 50.0),
        ("accuracy>90%", "latency", np.inf),
        ("accuracy>90%", "accuracy", np.inf),
        ("latency.p99<5ms", "latency", np.inf),
    ],
)
def test_thresholds_aim_at_a_little_less_than_the_limit(text, metric, expected) -> None:
    dense = {"flops": Measurement("flops", 100.0, "expected", 1, 0.0, "any", "")}
    assert aimed(Budget.parse([text]), metric, dense) == pytest.approx(expected)
