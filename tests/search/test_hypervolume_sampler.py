"""What our sampler promises beyond Optuna's contract: no duplicates, limits, seeds, honest figures."""

from dataclasses import replace

import numpy as np
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
from pymoo.indicators.hv import HV

from search.samplers.hypervolume.acquisition import Marginals, choose_by_hypervolume, non_dominated_points
from search.samplers.hypervolume.encoding import Codec
from search.samplers.hypervolume.gaussian_process import fit_gp, held_out_errors
from search.samplers.hypervolume.knapsack import knapsacks
from search.samplers.hypervolume.nsga2 import evolve
from search.samplers.hypervolume.observations import read_observations
from search.samplers.hypervolume.proposals import EVOLUTION_ALONE, expected_costs
from search.samplers.hypervolume.sampler import HypervolumeSampler
from studies.benchmarks.synthetic import DENSE_S, Problem, Setting

SPACE = {
    "kind": CategoricalDistribution(["a", "b", "c"]),
    "width": IntDistribution(4, 32, step=4),
    "share": FloatDistribution(0.5, 1.0, step=0.05),
    "rate": FloatDistribution(1e-4, 1.0, log=True),
    "free": FloatDistribution(-1.0, 1.0),
}
SMALL = Setting(layers=9, exits=0, limit_s=0.005)


@given(
    kind=st.sampled_from("abc"),
    width=st.integers(1, 8),
    share=st.integers(0, 10),
    rate=st.floats(1e-4, 1.0),
    free=st.floats(-1, 1),
)
def test_parameters_come_back_as_they_were(kind, width, share, rate, free) -> None:
    values = {"kind": kind, "width": 4 * width, "share": 0.5 + 0.05 * share, "rate": rate, "free": free}
    codec = Codec(SPACE)
    found = codec.decode(codec.encode([values])[0])
    assert found["kind"] == kind
    assert found["width"] == 4 * width
    assert [found[name] for name in ("share", "rate", "free")] == pytest.approx([0.5 + 0.05 * share, rate, free])


def test_random_rows_lie_in_the_space() -> None:
    codec = Codec(SPACE)
    for row in codec.random(200, np.random.default_rng(0)):
        for name, value in codec.decode(row).items():
            assert SPACE[name]._contains(SPACE[name].to_internal_repr(value))
    assert Codec({name: SPACE[name] for name in ("kind", "width", "share")}).size == 3 * 8 * 11


def test_what_is_held_out_is_what_a_fit_without_it_says() -> None:
    rng = np.random.default_rng(0)
    columns = rng.normal(size=(20, 3))
    values = columns @ [1.0, -2.0, 0.5] + 0.05 * rng.normal(size=20)
    found = fit_gp(columns, values, np.ones(20))
    error = held_out_errors("", found.left_out_means, values)
    assert error.r2 > 0.98
    # The same kernel and noise without one measurement, by the textbook.
    keep = np.arange(20) != 7
    norms = found.squared_norms
    covariance = found.kernel(columns @ columns.T, norms, norms)
    target = (values - found.mean) / found.scale
    weights = np.linalg.solve(covariance[np.ix_(keep, keep)] + np.diag(found.noise_variances[keep]), target[keep])
    assert found.left_out_means[7] == pytest.approx(found.mean + found.scale * float(covariance[7, keep] @ weights))


def test_a_function_that_is_drawn_goes_through_what_was_measured() -> None:
    rng = np.random.default_rng(1)
    columns = rng.normal(size=(30, 4))
    values = columns @ [1.0, 2.0, 0.0, -1.0]
    found = fit_gp(columns, values, np.ones(30))
    assert found.draw(rng)(columns) == pytest.approx(values, abs=0.3 * values.std())
    means, stds = found.means_and_stds(np.vstack([columns[:1], 20 + columns[:1]]))
    assert means[0] == pytest.approx(found.means(columns[:1])[0])
    assert stds[0] < stds[1]


def test_functions_drawn_from_a_posterior_have_its_mean_and_standard_deviation() -> None:
    rng = np.random.default_rng(2)
    columns = rng.normal(size=(12, 3))
    model = fit_gp(columns, columns @ [1.0, -1.0, 0.5] + 0.3 * rng.normal(size=12), np.ones(12))
    there = rng.normal(size=(4, 3))
    draws = np.array([model.draw(rng)(there) for _ in range(3000)])
    means, stds = model.means_and_stds(there)
    assert draws.mean(axis=0) == pytest.approx(means, abs=0.08 * stds.max())
    assert draws.std(axis=0) == pytest.approx(stds, rel=0.08)


def _in_clusters(rng: np.random.Generator, shared: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns 10 groups of 6 rows next to each other, and a slope with an error that is each group's or each row's."""
    columns = np.repeat(rng.normal(size=(10, 6)), 6, axis=0) + 0.05 * rng.normal(size=(60, 6))
    errors = np.repeat(rng.normal(size=10), 6) if shared else rng.normal(size=60)
    return columns, columns @ [1.0, 1.0, 0.0, 0.0, 0.0, 0.0] + errors


def test_what_next_rows_have_in_common_is_told_from_noise() -> None:
    rng = np.random.default_rng(0)
    for shared in (True, False):
        columns, values = _in_clusters(rng, shared)
        found = fit_gp(columns, values, np.ones(60))
        assert (found.kernel.local_variance > 0) == shared
        beside, far = columns[:1] + 0.03, 4 * columns[:1]
        stds = np.hypot(found.means_and_stds(np.vstack([beside, far]))[1], found.noise_factor)
        if shared:  # there is little left to hope for next to what was measured
            assert 3 * stds[0] < values.std()
            assert stds[0] < 0.5 * stds[1]
            assert found.means(beside)[0] == pytest.approx(values[:6].mean(), abs=0.5)
            draws = np.array([found.draw(rng)(np.vstack([beside, far])) for _ in range(60)])
            assert draws[:, 0].std() < 0.5 * draws[:, 1].std()
        else:
            assert stds[0] > 0.5


def test_accuracies_that_are_all_alike_leave_the_other_surrogates_in_charge() -> None:
    rng = np.random.default_rng(0)
    sampler = HypervolumeSampler(0, startup=12)
    study = optuna.create_study(sampler=sampler, directions=["maximize", "minimize"])
    for _ in range(30):
        trial = study.ask({f"x{n}": IntDistribution(0, 9) for n in range(6)})
        study.tell(trial, [float(rng.integers(0, 2)), float(sum(trial.params.values()))])
    assert sampler.errors[0].r2 < 0.1
    assert EVOLUTION_ALONE not in sampler.report(study.trials)["proposals"]


def test_evolution_finds_the_front_of_two_parabolas() -> None:
    codec = Codec({"x": FloatDistribution(-4, 4), "y": FloatDistribution(-4, 4)})

    def judge(rows):
        x, y = (8 * rows - 4).T
        return np.stack([(x - 1) ** 2 + y**2, (x + 1) ** 2 + y**2], axis=1), np.maximum(y - 3, 0)

    rng = np.random.default_rng(0)
    rows, _, broken = evolve(codec.random(40, rng), judge, codec, rng, 40, 40)
    assert (broken == 0).all()
    assert np.abs(8 * rows[:, 1] - 4).max() < 0.3
    assert np.abs(8 * rows[:, 0] - 4).max() < 1.3


def test_two_rows_that_win_the_same_are_not_both_chosen() -> None:
    points = non_dominated_points(np.zeros(2), np.ones(2), np.array([[0.6, 0.6]]), np.random.default_rng(0))
    assert not (points > 0.6).all(axis=1).any()
    better = [(cost <= points).all(axis=1).astype(float) for cost in ([0.2, 0.5], [0.2, 0.5], [0.5, 0.2])]
    assert choose_by_hypervolume(np.array(better), np.zeros((0, len(points))), 2) in ([0, 2], [2, 0])
    pending = np.array(better[:1])
    assert choose_by_hypervolume(np.array(better), pending, 1) == [2]


def test_points_won_are_the_expected_hypervolume_improvement() -> None:
    front, reference = np.array([[0.3, 0.7], [0.6, 0.4]]), np.ones(2)
    rng = np.random.default_rng(0)
    marginals = Marginals(np.array([[0.5, 0.5], [0.9, 0.1]]), np.full((2, 2), 0.2), np.log([1.0, 0.5]))
    ideal = np.full(2, -0.5)  # nothing that is likely lies below
    points = [non_dominated_points(ideal, reference, front, rng) for _ in range(20)]
    dominated = float(HV(ref_point=reference)(front))
    volume = 1.5**2 - dominated
    expected = np.mean([marginals.domination_probability(each).mean(axis=1) for each in points], axis=0) * volume
    for row in range(2):
        outcomes = marginals.means[row] + marginals.stds[row] * rng.standard_normal((4000, 2))
        won = [float(HV(ref_point=reference)(np.vstack([front, outcome]))) - dominated for outcome in outcomes]
        feasible = np.exp(marginals.log_feasibility[row])
        assert expected[row] == pytest.approx(feasible * np.mean(won), rel=0.08)


def test_a_constraint_that_follows_from_an_objective_is_noticed_and_tells_what_was_not_measured() -> None:
    study = optuna.create_study(directions=["maximize", "minimize"])
    space = {"x": FloatDistribution(0, 1)}
    for value in (0.1, 0.3, 0.5, 0.7, 0.9):
        study.enqueue_trial({"x": value})
        trial = study.ask(space)
        trial.set_constraint("time", 2 * value - 1)
        if 2 * value - 1 > 0:
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, [1.0, value])
    for value in (0.2, 0.4):
        study.enqueue_trial({"x": value})
        trial = study.ask(space)
        trial.set_constraint("time", 2 * value - 1)
        study.tell(trial, [1.0, value])
    found = read_observations(study.trials, Codec(space), study.directions, {})
    assert found.linear == {"time"}
    assert found.limits[1] == pytest.approx(0.5)
    assert found.costs[3, 1] == pytest.approx(0.7)
    assert np.isnan(found.costs[3, 0])


def _searched(problem: Problem, sampler: HypervolumeSampler, trials: int, warm=()) -> optuna.Study:
    study = optuna.create_study(directions=["maximize", "minimize", "minimize"], sampler=sampler)
    rng = np.random.default_rng(0)
    for values in warm:
        study.enqueue_trial(values)
    for _ in range(trials):
        trial = study.ask(problem.codec.space)
        values = problem.measure(trial.params, rng)
        for name, violation in problem.violations(values[0], values[1]).items():
            trial.set_constraint(name, violation)
        if values[0] is None:
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, list(values))
    return study


def test_proposals_are_new_come_from_surrogates_and_are_the_same_for_the_same_seed() -> None:
    problem = Problem(0, SMALL)
    runs = []
    for _ in range(2):
        sampler = HypervolumeSampler(3, problem.prior())
        study = _searched(problem, sampler, 40, problem.uniform())
        runs.append([trial.params for trial in study.trials])
    assert runs[0] == runs[1]
    assert len({tuple(params.items()) for params in runs[0]}) == 40
    report = sampler.report(study.trials)
    assert report["proposals"]["surrogate"] >= 15
    assert any(len(expected_costs(trial)) == 3 for trial in study.trials)
    assert report["held_out"]["objective 1"]["r2"] > 0.5
    assert report["foresight"]["objective 1"]["count"] > 5
    assert "surrogate of latency" in " ".join(sampler.remarks(study.trials, ("accuracy", "latency", "flops")))


def test_trials_that_run_at_once_are_different() -> None:
    problem = Problem(1, SMALL)
    study = _searched(problem, HypervolumeSampler(0, problem.prior()), 14, problem.uniform())
    running = [study.ask(problem.codec.space).params for _ in range(12)]
    assert len({tuple(params.items()) for params in running}) == 12


def test_it_searches_on_when_a_search_is_taken_up_again_and_after_failures() -> None:
    problem = Problem(0, SMALL)
    study = _searched(problem, HypervolumeSampler(0, problem.prior()), 15, problem.uniform())
    study.sampler = again = HypervolumeSampler(1, problem.prior())
    for _ in range(6):
        study.tell(study.ask(problem.codec.space), state=TrialState.FAIL)
    assert len({tuple(trial.params.items()) for trial in study.trials}) == 21
    proposed = 21 - len(problem.uniform())
    assert sum(again.report(study.trials)["proposals"].values()) == proposed, "those of the earlier run are among them"


def test_a_limit_that_no_uniform_version_keeps_is_reached() -> None:
    problem = Problem(0, Setting(layers=12, exits=0, limit_s=0.0038, floor=0.87))
    true = problem.true(problem.codec.encode(problem.uniform()))
    assert not ((true[:, 0] >= 0.87) & (true[:, 1] <= 0.0038)).any()
    study = _searched(problem, HypervolumeSampler(0, problem.prior()), 60, problem.uniform())
    assert any(all(value <= 0 for value in trial.constraints.values()) for trial in study.trials if trial.values)


@pytest.mark.parametrize("is_residual", [False, True])
def test_knapsacks_take_what_they_are_allowed_and_lose_less_than_uniform_versions(is_residual) -> None:
    problem = Problem(0, replace(SMALL, is_residual=is_residual))
    structure, codec = problem.prior().structure, problem.codec
    found = codec.encode(knapsacks(structure, codec, (0.6, 0.4, 0.3)))
    speeds = np.array(list(structure.speeds.values()))

    def time_and_damage(rows):
        time = (structure.work(codec, rows) * speeds[structure.precisions(codec, rows)]).sum(axis=1)
        return time / structure.flops.sum(), structure.estimated_damage(codec, rows).sum(axis=1)

    times, damages = time_and_damage(found)
    assert (times <= np.array([0.6, 0.4, 0.3]) * 1.15).all()
    assert (np.diff(damages) >= 0).all()
    uniform_times, uniform_damages = time_and_damage(codec.encode(problem.uniform()))
    for time, damage in zip(times, damages, strict=True):
        assert (uniform_damages[uniform_times <= time] >= damage - 1e-9).all()


def test_noise_in_place_of_an_objective_is_noticed_and_said() -> None:
    rng = np.random.default_rng(0)
    sampler = HypervolumeSampler(0, startup=12)
    study = optuna.create_study(sampler=sampler)
    for _ in range(40):
        study.tell(study.ask({f"x{n}": IntDistribution(0, 9) for n in range(6)}), float(rng.normal()))
    study.sampler = again = HypervolumeSampler(1, startup=12)
    for each in (sampler, again):  # a search that goes on says it as well
        alone = each.report(study.trials)["proposals"][EVOLUTION_ALONE]
        assert alone > 0
        assert f"told too little at times: {alone} proposals were" in " ".join(each.remarks(study.trials, ("noise",)))


def test_the_dense_network_of_the_benchmark_is_what_it_says() -> None:
    problem = Problem(0, SMALL)
    accuracy, seconds, flops = problem.true(problem.codec.encode(problem.uniform()[:1]))[0]
    assert accuracy == pytest.approx(0.92)
    assert seconds == pytest.approx(DENSE_S)
    assert flops == pytest.approx(1.0)
