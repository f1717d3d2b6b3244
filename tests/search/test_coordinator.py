"""The way of trials through a search: failures, limits, samplers, known candidates."""

import time
from dataclasses import replace

import pytest
from optuna.samplers import RandomSampler
from optuna.trial import TrialState

from search.loading.user_code import UserCodeError
from search.loop.coordinator import build_coordinator
from search.loop.resume import without_slow_precisions
from search.loop.sampler_prior import problem_prior
from search.results.store import SearchFolder
from search.samplers.distributions import first_guesses
from tests.helpers.searches import finished, stored


class Wrecked:
    """A pipeline whose evaluations fail for the given reasons, and otherwise are those of a real one."""

    def __init__(self, pipeline, reasons) -> None:
        self._pipeline, self._reasons = pipeline, reasons

    def __getattr__(self, name):
        return getattr(self._pipeline, name)

    def evaluate(self, *arguments):
        reason = next(self._reasons)
        if reason:
            raise RuntimeError(reason)
        return self._pipeline.evaluate(*arguments)


@pytest.fixture
def coordinate(pipeline, tmp_path, folder):
    """Returns a function that searches with evaluations that fail for the given reasons."""
    baseline = replace(stored(folder).baseline, simple=())  # what is known already would not be evaluated
    search = SearchFolder(tmp_path / "wrecked")

    def make(reasons, sampler="random"):
        with search.lock():
            return build_coordinator(
                Wrecked(pipeline, iter(reasons)), search.create(), baseline, sampler, 0, []
            ), search

    return make


def test_a_failed_trial_is_kept_with_its_reason_and_the_search_goes_on(coordinate) -> None:
    coordinator, search = coordinate(["no memory", None, "no luck", None, None])
    assert coordinator.run(5, None).code == 0
    trials = search.open().trials[:5]
    assert [trial.state == TrialState.FAIL for trial in trials] == [True, False, True, False, False]
    assert trials[0].user_attrs["reason"] == "RuntimeError: no memory"


def test_ten_equal_failures_stop_the_search_with_their_reason(coordinate) -> None:
    coordinator, search = coordinate([None, "other", *["disk full"] * 50])
    outcome = coordinator.run(100, None)
    assert outcome.code == 1
    assert "disk full" in outcome.reason
    tried = [trial for trial in finished(search.open().trials) if "duplicate_of" not in trial.user_attrs]
    assert len(tried) == 12


def test_ten_different_failures_do_not(coordinate) -> None:
    coordinator, _ = coordinate(f"reason {index}" for index in range(100))
    assert coordinator.run(15, None).code == 0


class ForOneObjective(RandomSampler):
    """A sampler of a user's own that does not suit."""

    def before_trial(self, study, trial) -> None:
        raise ValueError("one objective only")


def for_one_objective(seed: int, _knowledge=None) -> ForOneObjective:
    return ForOneObjective(seed)


def test_a_sampler_that_does_not_suit_is_one_clear_line(coordinate) -> None:
    coordinator, _ = coordinate([None] * 10, f"{__name__}:for_one_objective")
    with pytest.raises(
        UserCodeError, match="2 objectives at once, got ForOneObjective, which says: one objective only"
    ):
        coordinator.run(5, None)


def test_the_time_limit_ends_a_search(coordinate) -> None:
    coordinator, search = coordinate([None] * 1000)
    begin = time.monotonic()
    assert "2 s are up" in coordinator.run(1000, 2.0).reason
    assert time.monotonic() - begin < 30
    assert 1 <= len(finished(search.open().trials)) < 1000


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "gp", "random", "ehvi"])
def test_every_sampler_proposes_beyond_the_first_guesses(sampler, pipeline, tmp_path, folder) -> None:
    count = len(first_guesses(pipeline.space)) + 4
    search = SearchFolder(tmp_path / sampler)
    with search.lock():
        coordinator = build_coordinator(pipeline, search.create(), stored(folder).baseline, sampler, 0, [])
        assert coordinator.run(count, None).code == 0
    assert len(finished(search.open().trials)) == count


def test_a_known_candidate_is_told_from_memory(pipeline, tmp_path, folder) -> None:
    search = SearchFolder(tmp_path / "twice")
    with search.lock():
        study = search.create()
        coordinator = build_coordinator(pipeline, study, stored(folder).baseline, "random", 0, [])
        guess = without_slow_precisions(pipeline.space, stored(folder).baseline.slow_layers).uniform(1.0, "int8")
        study.enqueue_trial(guess)
        study.enqueue_trial(guess)
        coordinator.run(2, None)
        first, second = study.trials[:2]
    assert second.user_attrs["duplicate_of"] == first.number
    assert second.values == first.values
    assert second.constraints == first.constraints


def test_the_same_choices_are_solved_once_and_come_to_the_same_version_in_a_later_run(
    pipeline, tmp_path, folder
) -> None:
    search = SearchFolder(tmp_path / "choices")
    baseline = stored(folder).baseline
    guess = without_slow_precisions(pipeline.space, baseline.slow_layers).uniform(0.8, "int8")
    space = without_slow_precisions(pipeline.space, baseline.slow_layers)
    for count in (1, len(first_guesses(space)) + 2):  # the second time what the first one found is in the journal
        with search.lock():
            study = search.create()
            study.enqueue_trial(guess)
            build_coordinator(pipeline, study, baseline, "random", 0, []).run(count, None)
    trials = [trial for trial in search.open().trials if trial.params == guess and trial.state.is_finished()]
    first, second = trials[0], trials[-1]
    assert first.number != second.number
    assert second.user_attrs["duplicate_of"] == first.number
    assert second.user_attrs["choices"] == first.user_attrs["choices"]
    evaluation = first.user_attrs["evaluation"]
    assert evaluation["gates"]["images"] == len(pipeline.threshold_images)
    assert "thresholds" in evaluation["seconds"]


def test_choices_that_differ_in_a_head_that_is_not_there_come_to_one_version(pipeline) -> None:
    one = pipeline.space.candidate(pipeline.space.uniform(1.0, "fp32"))
    two = replace(one, precision={**one.precision, "exits.exit1.classifier": "int8"})
    assert one.key != two.key
    never = one.thresholds.without_exits()
    assert (
        pipeline.space.with_thresholds(one, never)
        == pipeline.space.with_thresholds(two, never)
        == pipeline.space.dense()
    )


def test_patience_ends_a_search_that_wins_nothing_and_says_so(coordinate) -> None:
    coordinator, search = coordinate(f"reason {index}" for index in range(100))
    outcome = coordinator.run(60, None, patience=7)
    assert outcome.code == 0
    assert outcome.reason == "the last 7 trials won nothing"
    assert len(finished(search.open().trials)) == 7


def test_our_sampler_knows_the_study_and_reports_on_itself(pipeline, tmp_path, folder) -> None:
    baseline = stored(folder).baseline
    space = without_slow_precisions(pipeline.space, baseline.slow_layers)
    prior = problem_prior(pipeline, space, baseline)
    assert prior.structure.names <= set(space.dimensions())
    assert prior.structure.flops.sum() == pytest.approx(baseline.evaluation.measurements["flops"].value, rel=0.1)
    search = SearchFolder(tmp_path / "ehvi")
    with search.lock():
        study = search.create()
        study.set_user_attr("study", pipeline.study.model_dump(mode="json"))
        study.set_user_attr("baseline", baseline.to_dict())
        coordinator = build_coordinator(pipeline, study, baseline, "ehvi", 0, [])
        seeds = len(coordinator.initial_proposals)
        outcome = coordinator.run(seeds + 8, None)
    report = stored(search.path.parent, "ehvi").report
    assert any("proposals of the sampler" in remark for remark in report["remarks"])
    assert not any("sampler" in remark or "surrogate" in remark for remark in outcome.remarks)
    proposed = sum(report["proposals"].values())
    assert proposed >= 8  # more where two seeds are the same version
    for more in (0, 3):  # a run without proposals leaves the report as it was
        with search.lock():
            build_coordinator(pipeline, search.create(), baseline, "ehvi", 0, []).run(seeds + 8 + more, None)
        again = stored(search.path.parent, "ehvi").report
        assert sum(again["proposals"].values()) == proposed + more
        assert again["held_out"] == report["held_out"] or more
