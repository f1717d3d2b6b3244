"""What is told of versions whose thresholds are solved: ways out by their layers, and how many inputs take them."""

from dataclasses import replace

import numpy as np
import optuna
import pytest
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from evaluators.measurement import Measurement
from search.config.budget import Budget
from search.pipeline.exit_thresholds import AIM, aimed
from search.samplers.hypervolume.encoding import Array
from search.samplers.hypervolume.models import Beliefs, believe
from search.samplers.hypervolume.observations import Observed, observe
from search.samplers.hypervolume.prior import Meaning
from studies.benchmarks.synthetic import Problem, Setting

PROBLEM = Problem(0, Setting(layers=9, exits=0, limit_s=0.003, noise=0.0))
AIMED = 0.003 * AIM
DIRECTIONS = [StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE, StudyDirection.MINIMIZE]
METRICS = ("accuracy", "latency", "flops")


BEFORE_EXITS = (3, 6)


def meaning(is_solved: bool) -> Meaning:
    known = PROBLEM.meaning()
    accuracy, latency, flops = known.aims
    structure = replace(known.structure, exit_after=BEFORE_EXITS)
    aims = (accuracy, replace(latency, aimed=AIMED), flops)
    return replace(known, structure=structure, aims=aims, is_solved=is_solved)


def exits(rows: Array, seconds: Array, flops: Array) -> tuple[Array, dict[str, Array]]:
    """Returns where inputs leave, just as many at the first exit as the limit asks for, and what each way costs."""
    structure = meaning(True).structure
    work, speeds = structure.work(PROBLEM.codec, rows)[:, : structure.layers], np.array(list(structure.speeds.values()))
    timed = work * speeds[structure.precisions(PROBLEM.codec, rows)]
    parts = [np.cumsum(each, axis=1)[:, [2, 5, 8]] / each.sum(axis=1, keepdims=True) for each in (timed, work)]
    ways = {"latency": parts[0] * seconds[:, None], "flops": parts[1] * flops[:, None]}
    first, _, last = ways["latency"].T
    leave = np.clip((last - AIMED) / (last - first), 0, 1)
    return np.stack([leave, np.zeros_like(leave), 1 - leave], axis=1), ways


def trials(count: int) -> list[FrozenTrial]:
    """Returns trials of random versions; a third of them break another limit."""
    rng = np.random.default_rng(0)
    rows = PROBLEM.codec.random(count, rng)
    accuracy, seconds, flops = PROBLEM.true(rows).T
    shares, ways = exits(rows, seconds, flops)
    made = []
    for number, row in enumerate(rows):
        costs = {name: float(way[number] @ shares[number]) for name, way in ways.items()}
        costs["latency"] *= 1 + 0.01 * rng.standard_normal()
        told = {"shares": list(shares[number]), "ways": {name: list(way[number]) for name, way in ways.items()}}
        evaluation = {"measurements": {name: {"value": value} for name, value in costs.items()}, "gates": told}
        is_whole = number % 3 > 0
        made.append(
            optuna.trial.create_trial(
                params=PROBLEM.codec.decode(row),
                distributions=dict(PROBLEM.codec.space),
                values=[accuracy[number], costs["latency"], costs["flops"]] if is_whole else None,
                state=TrialState.COMPLETE if is_whole else TrialState.PRUNED,
                user_attrs={"evaluation": evaluation},
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
    assert sorted(observed.ways) == [1, 2]
    assert observed.leaving.sum(axis=1) == pytest.approx(1)
    mean = (observed.leaving * observed.ways[2]).sum(axis=1)
    assert mean == pytest.approx(observed.costs[:, 2])


def test_a_version_whose_thresholds_nobody_solved_tells_nothing_of_exits() -> None:
    some = trials(6)
    del some[2].user_attrs["evaluation"]["gates"]
    found = observe(some, PROBLEM.codec, DIRECTIONS, {}, METRICS)
    assert list(np.isnan(found.leaving).all(axis=1)) == [False, False, True, False, False, False]
    assert list(np.isnan(found.ways[1]).all(axis=1)) == [False, False, True, False, False, False]


def test_ways_out_and_what_exits_leave_of_the_flops_are_told(observed: Observed, beliefs: Beliefs) -> None:
    assert beliefs.errors["longest way"].r2 > 0.9
    usual = believe(observed, PROBLEM.codec, meaning(is_solved=False)).errors["objective 2"]
    assert 1 - beliefs.errors["objective 2"].r2 < 0.7 * (1 - usual.r2)


def test_a_version_that_breaks_the_limit_without_exits_is_expected_near_what_is_aimed_at(beliefs: Beliefs) -> None:
    rows = PROBLEM.codec.random(200, np.random.default_rng(1))
    _, seconds, flops = PROBLEM.true(rows).T
    shares, ways = exits(rows, seconds, flops)
    for place, name in ((1, "latency"), (2, "flops")):
        cost = beliefs.objectives[place]
        off = np.abs(cost.scale.back(cost.means(rows)) / (shares * ways[name]).sum(axis=1) - 1)
        assert np.mean(off) < 0.1


def test_held_out_errors_are_as_large_as_those_on_new_versions(beliefs: Beliefs) -> None:
    rows = PROBLEM.codec.random(200, np.random.default_rng(2))
    _, seconds, flops = PROBLEM.true(rows).T
    shares, ways = exits(rows, seconds, flops)
    cost = beliefs.objectives[2]
    off = np.abs(cost.scale.back(cost.means(rows)) / (shares * ways["flops"]).sum(axis=1) - 1).mean()
    assert cost.error is not None
    assert 0.5 * off < cost.error.mape < 2 * off, "exits are fitted to the same versions, which errors must not hide"


def test_versions_without_solved_thresholds_are_told_by_their_layers_alone(observed: Observed) -> None:
    unsolved = replace(observed, leaving=np.zeros((len(observed.rows), 0)), ways={})
    errors = believe(unsolved, PROBLEM.codec, meaning(is_solved=True)).errors
    assert "longest way" not in errors
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
    values = {"flops": 100.0, "latency": 0.01}
    dense = {name: Measurement(name, value, "", 1, 0.0, "any", "") for name, value in values.items()}
    assert aimed(Budget.parse([text]), metric, dense) == pytest.approx(expected)
