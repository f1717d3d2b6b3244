"""When an evaluation ends after some of the images, how sure that is, and what becomes of such a version."""

import json
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import TrialState
from scipy.stats import beta, hypergeom

from evaluators.accuracy import wilson
from evaluators.data import LabelledImages, Splits
from evaluators.deployed import Answers
from evaluators.statistics import PairedAccuracy, largest_count, smallest_count
from evaluators.streams import Stream
from search.commands.front import front_json
from search.config.budget import Budget
from search.config.objectives import BEFORE
from search.config.study import Study
from search.loop.baseline import measure_baseline
from search.loop.candidate_evaluator import accuracy_screen
from search.loop.coordinator import build_coordinator
from search.loop.resume import requeue_running
from search.loop.sampler_observations import observe_evaluations
from search.pipeline.early_stopping import (
    ENOUGH,
    ERROR,
    FEWEST,
    AccuracyScreen,
    max_screened,
    saved_seconds,
    subset_size,
)
from search.pipeline.pipeline import CompressionPipeline, build_pipeline
from search.report.caveats import caveats
from search.report.overview import Overview
from search.report.report import report_of
from search.results.pareto import Version, feasible, pareto
from search.results.store import SearchFolder, StoredSearch
from search.samplers.hypervolume.encoding import Codec
from search.samplers.hypervolume.observations import read_observations
from search.tracking.trial_run import trial_content
from spaces.thresholds import Thresholds
from tests.helpers import tiny
from tests.helpers.searches import measurement, version

TOTAL, BATCH = 800, 4
DENSE = version(-1, 0.9, 10e-3, 100).measured


@st.composite
def seen_of_asked(draw) -> tuple[int, int, int]:
    total = draw(st.integers(1, 60))
    sampled = draw(st.integers(1, total))
    return draw(st.integers(0, sampled)), sampled, total


@given(seen_of_asked())
def test_limits_are_the_furthest_that_what_was_seen_leaves_likely(case) -> None:
    seen, sampled, total = case
    possible = range(seen, total - (sampled - seen) + 1)
    assert largest_count(seen, sampled, total, 0.01) == max(
        many for many in possible if hypergeom.cdf(seen, total, many, sampled) > 0.01
    )
    assert smallest_count(seen, sampled, total, 0.01) == min(
        many for many in possible if hypergeom.sf(seen - 1, total, many, sampled) > 0.01
    )


@pytest.mark.parametrize("seen", [0, 1, 9, 60, 200])
def test_limits_are_the_exact_binomial_ones_where_there_are_far_more_images(seen) -> None:
    total = 1_000_000
    exact = float(beta.ppf(0.99, seen + 1, 200 - seen)) if seen < 200 else 1.0
    assert largest_count(seen, 200, total, 0.01) / total == pytest.approx(exact, abs=2e-4)
    lowest = float(beta.ppf(0.01, seen, 201 - seen)) if seen else 0.0
    assert smallest_count(seen, 200, total, 0.01) / total == pytest.approx(lowest, abs=2e-4)


@pytest.mark.parametrize(
    ("gained", "lost"), [(0, 0), (1, 3), (4, 24), (8, 40), (24, 24), (40, 60), (0, 80), (16, 80), (60, 120)]
)
def test_the_bound_fails_as_rarely_as_it_says(gained, lost) -> None:
    """All subsets count: of 400 images so many are gained and lost in truth, and 200 are sampled."""
    total, sampled = 400, 200
    truth, missed = 0.9 + (gained - lost) / total, 0.0
    for some in range(max(0, sampled - total + gained), min(gained, sampled) + 1):
        chance = hypergeom.pmf(some, total, gained, sampled)
        if chance < 1e-7:
            continue
        others = np.arange(min(lost, sampled - some) + 1)
        chances = chance * hypergeom.pmf(others, total - gained, lost, sampled - some)
        missed += sum(
            float(each)
            for other, each in zip(others, chances, strict=True)
            if each > 1e-8 and PairedAccuracy(some, int(other), sampled, total, 0.9).upper_bound(ERROR) < truth - 1e-12
        )
    assert missed <= ERROR


def test_the_bound_is_narrower_than_that_of_a_share_alone_and_closes_as_all_are_asked() -> None:
    pair = PairedAccuracy(2, 10, 250, 1000, 0.92)
    alone = wilson(pair.accuracy, 250, 2.326)[1]
    assert pair.upper_bound(ERROR) - pair.accuracy < 0.8 * (alone - pair.accuracy)
    whole = PairedAccuracy(8, 40, 1000, 1000, 0.92)
    assert whole.upper_bound(ERROR) == pytest.approx(0.888)
    assert whole.accuracy == pytest.approx(0.888)
    assert whole.spread == 0


@given(st.lists(st.integers(0, 5), min_size=8, max_size=80), st.integers(1, 80))
def test_every_beginning_has_each_class_by_its_share(labels, count) -> None:
    images = LabelledImages(np.arange(len(labels), dtype=np.float32).reshape(-1, 1, 1, 1), np.array(labels))
    mixed = images.mixed()
    order = mixed.images[:].ravel().astype(int)
    assert sorted(order) == list(range(len(labels)))
    assert (mixed.labels == images.labels[order]).all()
    assert (images.mixed().labels == mixed.labels).all()
    count = min(count, len(labels))
    share = count / len(labels)
    for label in set(labels):
        first = int((mixed.labels[:count] == label).sum())
        assert abs(first - share * labels.count(label)) <= len(set(labels))


def test_a_stream_stays_in_its_order() -> None:
    stream = Stream(np.zeros((3, 1, 2, 2), np.float32), np.array([2, 0, 1]), np.array([0]))
    assert stream.mixed() is stream


def test_the_size_of_the_subset_is_what_tells_neighbours_of_the_front_apart() -> None:
    share = 0.9
    found = subset_size([0.88, 0.90, 0.92], 10_000, 0.93, 0.8)
    assert math.sqrt(share * (1 - share) / found) == pytest.approx(0.02, rel=0.01)
    assert subset_size([0.88], 10_000, 0.93, 0.91) == math.ceil(0.91 * 0.09 / 0.02**2)
    assert subset_size([], 4_000, 0.93, None) == 1_000
    assert subset_size([0.5, 0.9], 10_000, 0.93, None) == FEWEST


def test_few_images_are_asked_at_once_and_subsets_are_whole_batches() -> None:
    assert max_screened(ENOUGH - 1, 4) == 0
    assert max_screened(1000, 16) == 512
    assert max_screened(1000, 600) == 600
    assert max_screened(1000, 1000) == 0


class Scripted:
    """A subject that says what it is told to."""

    target = SimpleNamespace(batch=BATCH)

    def __init__(self, correct) -> None:
        self.correct = correct

    def first_answers(self, count: int) -> Answers:
        nothing = np.zeros(count, dtype=np.int64)
        return Answers(nothing, self.correct[:count], nothing, 1, (), np.zeros((count, 0), bool), 1)


def drawn(rng, accuracy: float, right):
    """Returns answers of which as many are right, mostly where those of the dense network are."""
    ease = rng.uniform(size=len(right)) - 0.7 * right
    correct = np.zeros(len(right), dtype=bool)
    correct[np.argsort(ease)[: round(accuracy * len(right))]] = True
    return correct


@pytest.mark.parametrize("limits", [["latency<9ms"], ["accuracy_drop<3%"], ["latency<9ms", "accuracy>85%"]])
def test_what_would_have_been_on_the_front_is_ended_as_rarely_as_is_said(limits) -> None:
    rng = np.random.default_rng(0)
    budget, wrong, ended, good = Budget.parse(limits), 0, 0, 0
    known = {str(n): version(n, a, ms * 1e-3, f) for n, (a, ms, f) in enumerate([(0.89, 8, 90), (0.87, 6, 60)])}
    front = pareto(feasible(list(known.values()), budget, DENSE), BEFORE)
    for number in range(600):
        right = np.zeros(TOTAL, dtype=bool)
        right[rng.permutation(TOTAL)[: round(0.9 * TOTAL)]] = True
        screen = AccuracyScreen(budget, DENSE, right[: TOTAL // 2], known, TOTAL, BATCH, BEFORE)
        each = version(
            100 + number, round(rng.uniform(0.8, 0.91) * TOTAL) / TOTAL, rng.uniform(4e-3, 9e-3), rng.uniform(40, 99)
        )
        costs = {name: each.measured[name] for name in ("flops", "latency")}
        found = screen.should_stop(Scripted(drawn(rng, each.measured["accuracy"].value, right)), costs)
        is_good = bool(feasible([each], budget, DENSE)) and each in pareto([*front, each], BEFORE)
        good, ended, wrong = good + is_good, ended + (found is not None), wrong + (is_good and found is not None)
    assert wrong <= ERROR * good + 3 * math.sqrt(ERROR * good)
    assert ended > 0.2 * (600 - good), "and it does end what is hopeless"


def test_only_versions_that_keep_the_budget_end_others_and_reach_is_left_to_those_that_are_recovered() -> None:
    right = np.arange(TOTAL // 2) % 10 > 0
    correct = right & (np.arange(TOTAL // 2) % 20 > 1)  # five points fewer
    costs = {"latency": measurement("latency", 9e-3), "flops": measurement("flops", 90)}
    better = {"a": version(1, 0.9, 8e-3, 80)}

    def judged(limit: str, known, measured=costs, reach=0.0):
        screen = AccuracyScreen(Budget.parse([limit]), DENSE, right, known, TOTAL, BATCH, BEFORE, reach)
        return screen.should_stop(Scripted(correct), measured)

    told = judged("latency<10ms", better)
    assert "trial 1 reaches 90.00%, no slower and with no more FLOPs" in told.reason
    assert told.estimates["accuracy"].statistic == "on a subset, ended early"
    assert told.estimates["accuracy"].n == FEWEST
    assert told.estimates["accuracy"].value == pytest.approx(0.85)
    assert judged("latency<10ms", {}) is None
    assert judged("size<1B", better) is None
    assert judged("latency<10ms", better, {}) is None, "nothing is known of its costs"
    assert "accuracy_drop<1% asks for 89.00%" in judged("accuracy_drop<1%", {}, {}).reason
    assert judged("accuracy_drop<1%", {}, {}, reach=0.05) is None


def splits() -> Splits:
    """Returns the tiny network's bars with enough images to ask some of them first."""
    few = tiny.splits()
    rng = np.random.default_rng(3)
    labels = np.sort(rng.integers(0, 4, TOTAL))
    images = rng.normal(0, 0.6, (TOTAL, 1, 8, 8)).astype(np.float32)
    for image, label in zip(images, labels, strict=True):
        image[0, 2 * label : 2 * label + 2] += 1.0
    return Splits(few.train, few.calibration, LabelledImages(images, labels.astype(np.int64)), few.test, classes=4)


STUDY = (
    tiny.STUDY.replace("tests.helpers.tiny:splits", "tests.search.test_early_stopping:splits")
    .replace('["latency<1000%", "size<80%"]', '["latency<1000%", "accuracy_drop<4%"]')
    .replace('level = "bn"', 'level = "none"')
)


@pytest.fixture(scope="module")
def pipeline(cache) -> CompressionPipeline:
    return build_pipeline(Study.parse(STUDY, "the screen's study"), lambda *_: None)


@pytest.fixture(scope="module")
def baseline(pipeline):
    return measure_baseline(pipeline)


@pytest.fixture(scope="module")
def searched(pipeline, baseline, tmp_path_factory):
    """Returns the folder of a search of fourteen trials, some of which were ended early, and what it said."""
    search = SearchFolder(tmp_path_factory.mktemp("screen") / "early")
    with search.lock():
        study = search.create()
        study.set_user_attr("study", pipeline.study.model_dump(mode="json"))
        study.set_user_attr("baseline", baseline.to_dict())
        outcome = build_coordinator(pipeline, study, baseline, "random", 0, []).run(14, None)
    return search, outcome


def test_nothing_is_asked_twice_and_nothing_comes_out_otherwise(pipeline, baseline) -> None:
    for exit_from in (1.0, 0.5):  # without exits, and with all of them
        subject = pipeline.deployed(pipeline.space.with_thresholds(*settled(pipeline, exit_from)))
        counts: list[int] = []
        opened, answer = subject.session, subject.session.answer
        opened.answer = lambda images, batch, a=answer, counts=counts: (
            counts.append(len(images)),
            a(images, batch),
        )[1]
        subject.first_answers(200)
        parts = subject.answers
        assert counts == [200, len(pipeline.scored) - 200]
        whole = subject.answers_to(pipeline.scored)
        for name in ("classes", "correct", "exits", "skipped"):
            assert (getattr(parts, name) == getattr(whole, name)).all()
        assert (parts.profiles, parts.path_count) == (whole.profiles, whole.path_count)


def settled(pipeline, threshold: float):
    choices = pipeline.space.candidate(pipeline.space.uniform(0.75, "int8"))
    return choices, Thresholds(dict.fromkeys(choices.thresholds.exits, 0.5 if threshold < 1 else None))


def test_an_evaluation_that_is_not_ended_is_as_without_a_screen(pipeline, baseline) -> None:
    latency = pipeline.references.latency_evaluator(baseline.reference_seconds)
    screen = accuracy_screen(pipeline, baseline.evaluation.measurements, {})
    assert screen is not None
    dense = pipeline.evaluate(pipeline.space.dense(), latency, [screen])
    assert dense.ended == ""
    assert "subset" in dense.seconds
    assert dense.measurements["accuracy"] == baseline.evaluation.measurements["accuracy"]


def test_versions_are_ended_recorded_and_told_as_pruned(pipeline, baseline, searched) -> None:
    search, outcome = searched
    read = StoredSearch.read(search)
    ended = [each for each in read.versions if each.evaluation.ended]
    assert ended
    assert any(f"{len(ended)} version" in remark and "ended early" in remark for remark in outcome.remarks)
    latency = pipeline.references.latency_evaluator(baseline.reference_seconds)
    for each in ended:
        trial = read.trials[each.number]
        assert trial.state == TrialState.PRUNED
        assert not each.is_complete
        whole = Version(each.number, pipeline.evaluate(each.evaluation.candidate, latency))
        if "accuracy_drop<4%" in each.evaluation.ended:  # else a version of the front is as good in everything
            assert trial.constraints["accuracy_drop<4%"] > 0
            assert not feasible([whole], read.budget, baseline.evaluation.measurements)
        assert whole.measured["accuracy"].value <= each.measured["accuracy"].others["high"]
    assert saved_seconds(ended, len(pipeline.scored)) > 0


def test_people_and_mlflow_are_told(searched) -> None:
    read = StoredSearch.read(searched[0])
    overview = Overview.of(read)
    ended = overview.ended_early
    numbers = {each.number for each in ended}
    assert not numbers & {each.number for each in [*overview.front, *overview.feasible, *overview.not_scored]}
    shown = json.loads(json.dumps(front_json(overview)))["ended_early"]
    assert {each["trial"] for each in shown} == numbers
    assert all(each["ended"] and each["measurements"]["accuracy"]["n"] < TOTAL / 2 for each in shown)
    assert any(
        f"{len(ended)} of {len(overview.versions)} versions were ended early" in line for line in caveats(overview)
    )
    assert f" {len(ended)} of which were ended early" in report_of(overview).to_markdown()
    told = trial_content(read.trials[ended[0].number], read)
    assert told.tags["feasible"] == "false"
    assert told.tags["reason"].startswith("ended early: at most")
    assert "accuracy_estimate_pct" in told.metrics
    assert "accuracy_pct" not in told.metrics


def test_a_search_that_goes_on_keeps_them(pipeline, baseline, searched) -> None:
    search, _ = searched
    before = {each.number: each.evaluation for each in StoredSearch.read(search).versions if each.evaluation.ended}
    with search.lock():
        study = search.create()
        for trial in study.trials:
            if trial.number in before:
                study.enqueue_trial(trial.params)
        build_coordinator(pipeline, study, baseline, "random", 0, []).run(14 + len(before), None)
        running = study.ask()  # it was measured, and stopped on the way into the journal
        running.set_user_attr("evaluation", next(iter(before.values())).to_dict())
        requeue_running(study)
        trials = study.trials
    assert trials[-1].state == TrialState.PRUNED
    again = [trial for trial in trials if trial.user_attrs.get("duplicate_of") in before]
    assert len(again) >= len(before)
    assert all(trial.state == TrialState.PRUNED for trial in again)
    after = {each.number: each.evaluation for each in StoredSearch.read(search).versions if each.number in before}
    assert after == before


def test_our_sampler_learns_from_what_was_estimated(searched) -> None:
    read = StoredSearch.read(searched[0])
    ended = {
        version.number: version.measured["accuracy"].value for version in read.versions if version.evaluation.ended
    }
    numbered = [trial for trial in read.trials if trial.params]
    trials = [trial for trial in numbered if trial.user_attrs.get("duplicate_of", trial.number) in ended]
    space = trials[0].distributions  # what the search was left with, which may be less than the space
    observe = partial(observe_evaluations, objectives=read.objectives)
    observed = read_observations(trials, Codec(space), searched[0].open().directions, {}, observe)
    expected = [ended[trial.user_attrs.get("duplicate_of", trial.number)] for trial in trials]
    assert (-observed.costs[:, 0]).tolist() == expected
    assert not observed.is_feasible.any()


def test_a_study_may_do_without(pipeline, baseline) -> None:
    class Without:
        study = Study.parse(STUDY.replace("trials = 12", "trials = 12, early_stopping = false"), "test")

        def __getattr__(self, name):
            return getattr(pipeline, name)

    assert accuracy_screen(Without(), baseline.evaluation.measurements, {}) is None
