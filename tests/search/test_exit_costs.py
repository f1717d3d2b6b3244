"""What is told of versions whose thresholds are solved: paths by their layers, and how many inputs take them."""

from dataclasses import replace
from functools import partial

import numpy as np
import optuna
import pytest
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from evaluators.measurement import Measurement
from search.config.budget import Budget
from search.config.objectives import BEFORE
from search.loop.sampler_observations import observe_evaluations
from search.pipeline.exit_thresholds import AIM, cost_target
from search.samplers.hypervolume.encoding import Array
from search.samplers.hypervolume.exit_costs import LONGEST_PATH
from search.samplers.hypervolume.models import Posteriors, fit_models
from search.samplers.hypervolume.observations import Observations, read_observations
from search.samplers.hypervolume.prior import ProblemPrior
from studies.benchmarks.synthetic import Problem, Setting

PROBLEM = Problem(0, Setting(layers=9, exits=0, limit_s=0.003, noise=0.0))
AIMED = 0.003 * AIM
DIRECTIONS = [StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE, StudyDirection.MINIMIZE]
observe = partial(observe_evaluations, objectives=BEFORE)
BEFORE_EXITS = (3, 6)


def prior(solves_thresholds: bool) -> ProblemPrior:
    known = PROBLEM.prior()
    accuracy, latency, flops = known.objectives
    structure = replace(known.structure, exit_after=BEFORE_EXITS)
    objectives = (accuracy, replace(latency, aimed_at=AIMED), flops)
    return replace(known, structure=structure, objectives=objectives, solves_thresholds=solves_thresholds)


def exits(rows: Array, seconds: Array, flops: Array) -> tuple[Array, dict[str, Array]]:
    """Returns where inputs leave, just as many at the first exit as the limit asks for, and what each way costs."""
    structure = prior(True).structure
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
def observations() -> Observations:
    return read_observations(trials(90), PROBLEM.codec, DIRECTIONS, PROBLEM.prior().linear_constraints, observe)


@pytest.fixture(scope="module")
def posteriors(observations: Observations) -> Posteriors:
    return fit_models(observations, PROBLEM.codec, prior(solves_thresholds=True))


def test_what_was_measured_before_a_limit_was_broken_is_known(observations: Observations) -> None:
    unknown = np.isnan(observations.costs)
    assert unknown[::3, 0].all()
    assert not unknown[:, 1:].any()
    assert sorted(observations.path_costs) == [1, 2]
    assert observations.exit_shares.sum(axis=1) == pytest.approx(1)
    mean = (observations.exit_shares * observations.path_costs[2]).sum(axis=1)
    assert mean == pytest.approx(observations.costs[:, 2])


def test_a_version_whose_thresholds_nobody_solved_tells_nothing_of_exits() -> None:
    some = trials(6)
    del some[2].user_attrs["evaluation"]["gates"]
    found = read_observations(some, PROBLEM.codec, DIRECTIONS, {}, observe)
    assert list(np.isnan(found.exit_shares).all(axis=1)) == [False, False, True, False, False, False]
    assert list(np.isnan(found.path_costs[1]).all(axis=1)) == [False, False, True, False, False, False]


def test_paths_and_what_exits_leave_of_the_flops_are_told(observations: Observations, posteriors: Posteriors) -> None:
    assert posteriors.errors[LONGEST_PATH].r2 > 0.9
    usual = fit_models(observations, PROBLEM.codec, prior(solves_thresholds=False)).errors[2]
    assert 1 - posteriors.errors[2].r2 < 0.7 * (1 - usual.r2)


def test_a_version_that_breaks_the_limit_without_exits_is_expected_near_what_is_aimed_at(
    posteriors: Posteriors,
) -> None:
    rows = PROBLEM.codec.random(200, np.random.default_rng(1))
    _, seconds, flops = PROBLEM.true(rows).T
    shares, ways = exits(rows, seconds, flops)
    for place, name in ((1, "latency"), (2, "flops")):
        cost = posteriors.objectives[place]
        off = np.abs(cost.transform.inverse(cost.means(rows)) / (shares * ways[name]).sum(axis=1) - 1)
        assert np.mean(off) < 0.1


def test_held_out_errors_are_as_large_as_those_on_new_versions(posteriors: Posteriors) -> None:
    rows = PROBLEM.codec.random(200, np.random.default_rng(2))
    _, seconds, flops = PROBLEM.true(rows).T
    shares, ways = exits(rows, seconds, flops)
    cost = posteriors.objectives[2]
    off = np.abs(cost.transform.inverse(cost.means(rows)) / (shares * ways["flops"]).sum(axis=1) - 1).mean()
    assert cost.error is not None
    assert 0.5 * off < cost.error.mape < 2 * off, "exits are fitted to the same versions, which errors must not hide"


def test_versions_without_solved_thresholds_are_told_by_their_layers_alone(observations: Observations) -> None:
    unsolved = replace(observations, exit_shares=np.zeros((len(observations.rows), 0)), path_costs={})
    errors = fit_models(unsolved, PROBLEM.codec, prior(solves_thresholds=True)).errors
    assert LONGEST_PATH not in errors
    assert errors[1].count == len(observations.rows)


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
    assert cost_target(Budget.parse([text]), metric, dense) == pytest.approx(expected)
