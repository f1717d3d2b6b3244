"""Gates: how sure an exit is, what each way out costs, and thresholds for a study's budget."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import binomtest

from evaluators.accuracy import wilson
from evaluators.data import Chosen, LabelledImages
from evaluators.deployed import DeployedCandidate, LoadedArtifact
from evaluators.exits.correctness import correctness_probabilities
from evaluators.exits.threshold_problem import margin
from evaluators.exits.threshold_solver import Cost, ThresholdSolver
from evaluators.inference.staged import CONFIDENCES, CONFIDENCES_OF_ONE, StagedNetwork
from evaluators.latency.evaluator import LatencyEvaluator, Reference
from evaluators.measurement import Measurement
from evaluators.runtimes.base import Target, TimedBatch
from evaluators.runtimes.local import LocalSession
from evaluators.runtimes.onnxruntime_cpu import OnnxRuntime, load
from evaluators.runtimes.paired_timing import Clock, TimingProtocol
from search.config.budget import Budget
from search.config.study import Study
from search.pipeline.early_stopping import NARROW_MISS, LimitsBroken
from search.pipeline.exit_thresholds import ExitThresholdSolver
from search.pipeline.pipeline import build_pipeline
from search.results.pareto import Version, feasible
from spaces.candidate import Candidate
from spaces.thresholds import UNSOLVED, Thresholds, ThresholdSpace
from tests.helpers import tiny

LOGITS = hnp.arrays(np.float32, (7, 5), elements=st.floats(-30, 30, width=32))


@settings(deadline=None)
@given(LOGITS)
def test_confidences_are_what_their_formulas_say(logits) -> None:
    chances = torch.from_numpy(logits).double().softmax(1)
    first, second = chances.topk(2).values.T
    entropy = torch.special.entr(chances).sum(1) / np.log(5)
    for name, wanted in (("softmax", first), ("margin", first - second), ("entropy", 1 - entropy)):
        found = CONFIDENCES[name](logits)
        np.testing.assert_allclose(found, wanted, atol=2e-6)
        assert found.dtype == np.float32
        assert found.min() >= 0
        assert found.max() <= 1
        one_by_one = [CONFIDENCES_OF_ONE[name](row) for row in logits.tolist()]
        np.testing.assert_allclose(one_by_one, wanted, atol=1e-9)


@pytest.mark.parametrize("classes", [5, 100])
@pytest.mark.parametrize("name", list(CONFIDENCES))
def test_a_single_input_is_answered_as_in_a_batch(name, classes) -> None:
    rows = np.random.default_rng(0).normal(0, 3, (40, classes)).astype(np.float32)
    network = StagedNetwork([lambda batch: [2 * batch, 1 * batch]] * 2 + [lambda batch: [1 * batch]], (0.6, 0.7), name)
    logits, exits = network(rows)
    found = [network(rows[place : place + 1]) for place in range(len(rows))]
    np.testing.assert_array_equal(np.concatenate([answer for answer, _ in found]), logits)
    np.testing.assert_array_equal(np.concatenate([left for _, left in found]), exits)
    assert len(set(exits)) > 1


@pytest.mark.parametrize("name", list(CONFIDENCES))
def test_stages_ask_for_the_confidence_that_they_are_told(name, builder, network, space, images) -> None:
    artifact = builder.build(network, space.candidate(space.uniform(1.0, "fp32", 0.6)))
    opened = OnnxRuntime().open(artifact.deployed, (0.4, 0.4), 1, name)
    every = opened.all_logits(images.numpy(), 5)
    with torch.no_grad():
        np.testing.assert_allclose(every, np.stack([found.numpy() for found in network(images)], axis=1), atol=1e-5)
    _, exits = opened.answer(images.numpy(), 5)
    sure = np.stack([CONFIDENCES[name](every[:, place]) for place in (0, 1)], axis=1) >= 0.4
    np.testing.assert_array_equal(exits, np.where(sure.any(axis=1), sure.argmax(axis=1), 2))


def test_a_batch_may_be_told_where_to_leave() -> None:
    stages = [lambda batch: [batch, batch]] * 2 + [lambda batch: [batch]]
    batch = np.eye(3, dtype=np.float32)
    for place in (0, 1, 2):
        gates = TimedBatch(0, 3, exit=place).path_plan([0.5, 0.5])
        assert set(StagedNetwork(stages, gates)(batch)[1]) == {place}
    assert TimedBatch(0, 3, longest=True).path_plan([0.5, 0.5]) == TimedBatch(0, 3, exit=2).path_plan([0.5, 0.5])
    assert TimedBatch(0, 3).path_plan([0.5, 0.6]) == [0.5, 0.6]


class Metered(OnnxRuntime):
    """ONNX Runtime on a clock of its own: each stage takes its units for every image, and some for a call."""

    def __init__(self, units: tuple[float, ...], start: float = 0.0) -> None:
        self.now, self._units, self._start = 0.0, units, start

    def open(self, stages, thresholds, threads, confidence="softmax"):
        def metered(stage, units):
            run = load(stage, threads)

            def call(batch):
                self.now += units * (self._start + len(batch))
                return run(batch)

            return call

        read = lambda: self.now  # noqa: E731
        units = self._units if len(stages) > 1 else (sum(self._units),)
        made = [metered(stage, each) for stage, each in zip(stages, units, strict=True)]
        return LocalSession(made, thresholds, threads, confidence, Clock(read, read))


@pytest.mark.parametrize("batch", [1, 4])
def test_the_formula_and_the_measurement_agree_on_a_clock_without_noise(batch, builder, network, space, images) -> None:
    library, target = Metered((2.0, 3.0, 5.0)), Target("onnxruntime", "meter", batch, 1)
    with torch.no_grad():
        sure = [found.softmax(1).max(1).values.numpy() for found in network(images)[:-1]]
    middles = {name: float(np.median(each)) for name, each in zip(network.exit_names, sure, strict=True)}
    candidate = replace(space.dense(), thresholds=Thresholds(middles))
    artifact, data = builder.build(network, candidate), LabelledImages(images.numpy(), np.zeros(12, np.int64))
    subject = LoadedArtifact(candidate, artifact, data, library, target)
    reference = Reference(builder.build(network, space.dense()).deployed[0], 10.0 * -(-batch // 4))
    latency = LatencyEvaluator({"fp32": reference}, library, target, TimingProtocol(limit_s=1e9, calls=40))
    found, shares = latency.measure(subject), subject.answers.exit_shares
    assert len(set(subject.answers.exits)) == 3, "some images leave at each exit"
    assert latency.paths(subject) == pytest.approx(tuple(batch * units for units in (2.0, 5.0, 10.0)))
    assert found.value == pytest.approx(batch * np.dot(shares, (2.0, 5.0, 10.0)))
    assert found.others["worst"] == pytest.approx(batch * 10.0)
    stages = np.dot(subject.answers.reach_shares, (2.0, 3.0, 5.0))
    assert found.value == pytest.approx(batch * stages), "shares times paths is reached times stages"


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=60), st.floats(0, 1))
def test_parts_share_no_image_and_each_class_is_in_both_in_proportion(labels, share) -> None:
    images = np.arange(len(labels), dtype=np.float32).reshape(-1, 1, 1, 1)
    count = round(share * len(labels))
    one, two = LabelledImages(images, np.array(labels)).parted(count)
    together = np.concatenate([one.images[:], two.images[:]]).ravel()
    assert len(one) == count
    assert sorted(together) == list(range(len(labels)))
    for label in set(labels):
        members = labels.count(label)
        assert abs(int((one.labels == label).sum()) - members * count / len(labels)) <= 1
    assert [labels[int(place)] for place in one.images[:].ravel()] == list(one.labels)


def test_halves_of_all_images_are_what_they_were() -> None:
    labels = np.random.default_rng(0).integers(0, 4, 101)
    images = np.arange(101, dtype=np.float32).reshape(-1, 1, 1, 1)
    one, _ = LabelledImages(images, labels).parted(51)
    assert sorted(one.images[:].ravel()) == sorted(np.argsort(labels, kind="stable")[0::2])


def test_a_part_is_not_larger_than_the_whole() -> None:
    with pytest.raises(ValueError, match="0 to 2 images, got 3"):
        LabelledImages(np.zeros((2, 1, 1, 1), np.float32), np.zeros(2, np.int64)).parted(3)


def test_parts_of_a_store_read_when_they_are_asked() -> None:
    asked: list[object] = []

    class Store:
        shape, dtype, digest = (6, 1, 1, 1), np.dtype(np.float32), "abc"

        def __len__(self) -> int:
            return 6

        def __getitem__(self, index):
            asked.append(index)
            return np.arange(6, dtype=np.float32).reshape(6, 1, 1, 1)[index]

    one, two = LabelledImages(Store(), np.array([0, 1, 0, 1, 0, 1])).parted(3)
    assert isinstance(one.images, Chosen)
    assert one.digest != two.digest
    assert asked == []
    np.testing.assert_array_equal(one.images[1:3].ravel(), one.images[:].ravel()[1:3])


@settings(deadline=None)
@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_is_wilsons(counts) -> None:
    right, n = counts
    wanted = binomtest(right, n).proportion_ci(0.95, "wilson")
    assert wilson(right / n, n) == pytest.approx((wanted.low, wanted.high), abs=1e-4)


def test_solved_gates_are_no_choice_of_the_sampler(space) -> None:
    gates = ThresholdSpace(["exit1", "exit2"], 0.5, 0.05, solved=True)
    assert gates.dimensions() == {}
    assert gates.read({}) == Thresholds({"exit1": UNSOLVED, "exit2": UNSOLVED})
    choices = Candidate({}, {"exits.exit1.classifier": "int8"}, gates.read({}))
    assert choices.is_unsolved
    assert choices.active_exits == ("exit1", "exit2")
    settled = space.with_thresholds(choices, Thresholds({"exit1": None, "exit2": 0.7}))
    assert not settled.is_unsolved
    assert settled.precision == {"exits.exit1.classifier": "fp32"}, "a head that is not there has no precision"
    assert settled.unsolved().thresholds == Thresholds({"exit1": None, "exit2": UNSOLVED})
    assert Candidate.from_dict(choices.to_dict()) == choices


@pytest.fixture(scope="module")
def dense(pipeline):
    latency = pipeline.references.latency_evaluator(
        {name: taken.work for name, taken in pipeline.references.time().items()}
    )
    return latency, pipeline.evaluate(pipeline.space.dense(), latency).measurements


def solver_for(pipeline, latency, dense, *limits: str) -> ExitThresholdSolver:
    return ExitThresholdSolver(pipeline, latency, dense, Budget.parse(limits))


@pytest.mark.parametrize("limits", [("flops<70%",), ("accuracy_drop<5%",), ("latency<1000%", "accuracy_drop<50%")])
def test_what_is_solved_is_what_the_deployed_files_do(limits, pipeline, dense) -> None:
    latency, measured = dense
    solver = solver_for(pipeline, latency, measured, *limits)
    choices = pipeline.space.candidate(pipeline.space.uniform(0.75, "int8"))
    settled = solver.resolve(choices)
    assert not settled.candidate.is_unsolved
    subject = pipeline.deployed(settled.candidate)
    answers = subject.answers_to(pipeline.threshold_images)
    assert answers.correct.mean() == pytest.approx(settled.thresholds.accuracy)
    present = [share for share in settled.thresholds.shares if share] or [1.0]
    assert [share for share in answers.exit_shares if share] == pytest.approx(present)
    if limits == ("flops<70%",):
        reached = np.dot(answers.reach_shares, pipeline.flops.stages(subject))
        assert settled.thresholds.first_cost == pytest.approx(reached)
        assert reached <= 0.7 * measured["flops"].value
    evaluation = settled.with_thresholds(pipeline.evaluate(settled.candidate, latency))
    assert evaluation.exit_thresholds["images"] == len(pipeline.threshold_images)
    assert evaluation.digest == pipeline.deployed(evaluation.candidate).artifact.digest, "rebuilt byte for byte"
    assert evaluation.measurements["accuracy"].n == len(pipeline.scored) == 40
    assert evaluation.measurements["accuracy"].others["low"] < evaluation.measurements["accuracy"].value


def test_what_parted_batches_cost_more_is_measured_and_counts(pipeline, monkeypatch) -> None:
    metered, target = Metered((2.0, 3.0), start=4.0), Target("onnxruntime", "meter", 8, 1)
    pipeline = replace(pipeline, runtime=metered, target=target)
    reference = Reference(pipeline.deployed(pipeline.space.dense()).artifact.deployed[0], 5.0 * (4 + 2))
    latency = LatencyEvaluator(
        {"fp32": reference, "int8": reference}, metered, target, TimingProtocol(limit_s=1e9, calls=40)
    )
    choices = pipeline.space.candidate(pipeline.space.uniform(0.75, "fp32"))
    dense = {"latency": Measurement("latency", 5.0 * (4 + 8), "median", 1, 0.0, "meter", "")}
    settled = solver_for(pipeline, latency, dense, "latency<75%").resolve(choices)
    assert settled.thresholds.correction > 1.01, "a call costs as much for a few images"
    version = pipeline.deployed(settled.candidate)
    asked = DeployedCandidate(
        version.network, version.candidate, version.artifact, pipeline.threshold_images, metered, target
    )
    assert latency.measure(asked).value == pytest.approx(settled.thresholds.first_cost, rel=0.1)


class ColdInSuccession(Metered):
    """Stages that take so many times as long in a version whose exits decide as in one whose exits are being asked."""

    def __init__(self, units: tuple[float, ...], factor: float) -> None:
        super().__init__(units)
        self.factor, self.staged = factor, 0

    def open(self, stages, thresholds, threads, confidence="softmax"):
        given, self.staged = self._units, self.staged + (len(stages) > 1)
        if len(stages) > 1 < self.staged:
            self._units = tuple(self.factor * units for units in given)
        opened = super().open(stages, thresholds, threads, confidence)
        self._units = given
        return opened


@pytest.mark.parametrize(("factor", "exits"), [(1.0, ("exit1",)), (4.0, ())])
def test_an_exit_that_saves_nothing_as_it_runs_is_left_out(factor, exits, pipeline, monkeypatch) -> None:
    metered, target = ColdInSuccession((2.0, 3.0), factor), Target("onnxruntime", "meter", 1, 1)
    pipeline = replace(pipeline, runtime=metered, target=target)
    reference = Reference(pipeline.deployed(pipeline.space.dense()).artifact.deployed[0], 5.0)
    latency = LatencyEvaluator(
        {"fp32": reference, "int8": reference}, metered, target, TimingProtocol(limit_s=1e9, calls=40)
    )
    choices = pipeline.space.candidate(pipeline.space.uniform(1.0, "fp32"))
    dense = {"latency": Measurement("latency", 5.0, "median", 1, 0.0, "meter", "")}
    settled = solver_for(pipeline, latency, dense, "latency<1000%").resolve(choices)
    assert settled.candidate.active_exits == exits
    assert len(pipeline.deployed(settled.candidate).artifact.deployed) == 1 + len(exits), (
        "its stages are one file again"
    )
    assert settled.thresholds.first_cost == pytest.approx(5.0) or exits


@pytest.fixture
def metered(pipeline):
    """Returns the pipeline and its latency evaluator on a clock without noise, one image at a time, and the dense
    network's figures.
    """
    library, target = Metered((2.0, 3.0)), Target("onnxruntime", "meter", 1, 1)
    pipeline = replace(pipeline, runtime=library, target=target)
    reference = Reference(pipeline.deployed(pipeline.space.dense()).artifact.deployed[0], 5.0)
    latency = LatencyEvaluator(
        {"fp32": reference, "int8": reference}, library, target, TimingProtocol(limit_s=1e9, calls=40)
    )
    return pipeline, latency, pipeline.evaluate(pipeline.space.dense(), latency).measurements


def test_a_narrow_miss_is_solved_again_and_scored(metered) -> None:
    pipeline, latency, dense = metered
    choices, near = pipeline.space.candidate(pipeline.space.uniform(0.25, "fp32")), []
    halves = pipeline.threshold_images, pipeline.scored
    for choosing, scored in (halves, halves[::-1]):  # in one order, if not in the other, more images go on
        part = replace(pipeline, threshold_images=choosing, scored=scored)
        for percent in range(52, 72):
            budget = Budget.parse([f"latency<{percent}.3%"])
            (limit,) = budget.constraints
            solver = ExitThresholdSolver(part, latency, dense, budget)
            settled = solver.resolve(choices)
            once = part.evaluate(settled.candidate, latency).measurements
            found = solver.evaluate(settled, [LimitsBroken(budget, dense)])
            if not 0 < limit.violation(once["latency"], dense["latency"]) <= NARROW_MISS:
                assert found.candidate == settled.candidate
                assert "rounds" not in found.exit_thresholds
                continue
            near.append(found)
            assert limit.violation(found.measurements["latency"], dense["latency"]) <= 0
            assert 1 <= found.exit_thresholds["rounds"] <= 2
            assert found.exit_thresholds["correction"] > 1, "the images that count cost more"
            assert found.measurements["accuracy"].n == len(scored)
    assert near, "other images leave elsewhere, so one limit or the other is missed"


def test_what_no_thresholds_keep_is_scored_just_outside_and_given_up_far_out(metered) -> None:
    pipeline, latency, dense = metered
    choices = pipeline.space.candidate(pipeline.space.uniform(1.0, "fp32"))
    least = (
        solver_for(pipeline, latency, dense, "flops<1%").resolve(choices).thresholds.first_cost / dense["flops"].value
    )
    for over, is_scored in ((1.05, True), (1.3, False)):
        budget = Budget.parse([f"flops<{100 * least / over:.4g}%"])
        solver = ExitThresholdSolver(pipeline, latency, dense, budget)
        found = solver.evaluate(solver.resolve(choices), [LimitsBroken(budget, dense)])
        version = Version(0, found)
        assert version.is_complete == is_scored
        assert not budget.is_met(found.measurements, dense)
        assert feasible([version], budget, dense) == []


def test_a_miss_within_the_interval_of_its_timing_is_narrow() -> None:
    budget = Budget.parse(["latency<1ms", "size<1KB"])

    def hopeless(seconds: float, half_width: float, size: float) -> bool:
        latency = Measurement("latency", seconds, "median", 1, 0.0, "", "", notes={"half_width": half_width})
        measured = {"latency": latency, "size": Measurement("size", size, "total", 1, 0.0, "", "")}
        return LimitsBroken(budget, measured).should_stop(None, measured) is not None

    assert not hopeless(1.09e-3, 0.01, 900)
    assert hopeless(1.15e-3, 0.01, 900)
    assert not hopeless(1.15e-3, 0.2, 900)
    assert hopeless(0.9e-3, 0.01, 1001), "what is exact is not missed narrowly"


def test_the_margin_follows_the_interval_of_the_timing() -> None:
    margins = [margin(half_width) for half_width in (0.0, 0.01, 0.02, 0.05, 0.5)]
    assert margins == sorted(margins)
    assert 0 < margins[0] < margins[1] < margins[2] < margins[3] <= margins[4] <= 0.1
    assert margins[2] == pytest.approx(np.hypot(0.02, 0.02))


def test_a_timing_that_is_less_sure_leaves_more_below_the_limit(metered) -> None:
    pipeline, latency, dense = metered
    choices = pipeline.space.candidate(pipeline.space.uniform(1.0, "fp32"))
    least = latency.timed_paths(pipeline.deployed(choices))
    assert least.half_width == 0
    told = solver_for(pipeline, latency, dense, "latency<80%").resolve(choices).thresholds
    assert told.margin == margin(0.0)
    assert told.first_cost <= 0.8 * (1 - told.margin) * dense["latency"].value


def test_of_thresholds_that_are_alike_the_cheapest_are_taken(pipeline, dense) -> None:
    choices = pipeline.space.candidate(pipeline.space.uniform(0.5, "fp32"))
    solver = solver_for(pipeline, *dense, "flops<1000%")
    told = solver.resolve(choices).thresholds
    subject = pipeline.deployed(choices)
    logits = subject.session.all_logits(pipeline.threshold_images.images, subject.target.batch)
    kind = CONFIDENCES[subject.artifact.confidence]
    said = np.stack([kind(logits[:, place]) for place in (0, 1)], axis=1)
    confidences, likely = (
        said[:, :1],
        correctness_probabilities(said, logits.argmax(axis=2) == pipeline.threshold_images.labels[:, None]),
    )
    costs = [Cost(told.paths["flops"], pipeline.flops.heads(subject))]
    best = ThresholdSolver(confidences, likely, costs, price=0.0).solve()
    alike = best.accuracy - 0.5 / len(likely)
    assert alike <= told.expected_accuracy < best.accuracy
    assert told.first_cost < best.costs[0]
    solved = ThresholdSolver(confidences, likely, costs)
    outcomes = [solved.outcome([each]) for each in (*np.unique(confidences), 1.0)]
    assert told.first_cost == pytest.approx(min(each.costs[0] for each in outcomes if each.accuracy >= alike))


def test_exits_save_the_cost_that_counts(pipeline, dense) -> None:
    latency, measured = dense
    choices = pipeline.space.candidate(pipeline.space.uniform(1.0, "int8"))
    for objectives, first in ((("accuracy", "flops"), "flops"), (("accuracy", "latency", "flops"), "latency")):
        other = replace(pipeline, study=pipeline.study.with_objectives(objectives))
        thresholds = solver_for(other, latency, measured, "latency<1000%").resolve(choices).thresholds
        assert next(iter(thresholds.costs)) == first
        assert thresholds.first_cost == pytest.approx(thresholds.costs[first])


def test_what_is_not_open_stays_as_it_is(pipeline, dense) -> None:
    solver = ExitThresholdSolver(pipeline, *dense)
    assert solver.resolve(pipeline.space.dense()).candidate == pipeline.space.dense()
    again = solver.resolve_again(pipeline.space.candidate(pipeline.space.uniform(1.0, "fp32")), None)
    assert not again.candidate.is_unsolved


def test_every_version_is_scored_on_the_other_half(pipeline) -> None:
    assert len(pipeline.threshold_images) + len(pipeline.scored) == len(pipeline.data.validation)
    assert any("choose the exits' thresholds" in remark for remark in pipeline.remarks)
    searched = Study.parse(tiny.STUDY.replace("grid = 2", 'grid = 2, thresholds = "searched"'), "test")
    other = build_pipeline(searched, lambda *_: None)
    assert len(other.scored) == len(pipeline.data.validation)
    assert "threshold.exit1" in other.space.dimensions()
    assert "threshold.exit1" not in pipeline.space.dimensions()
    # The network is the same one: how thresholds are chosen is no matter of training.
    assert other.fingerprint == pipeline.fingerprint


def test_fewer_images_choose_thresholds_where_the_study_says_so(pipeline) -> None:
    study = Study.parse(tiny.STUDY.replace("grid = 2", "grid = 2, choose_on = 12"), "test")
    fewer = build_pipeline(study, lambda *_: None)
    assert len(fewer.threshold_images) == 12
    assert len(fewer.scored) == len(pipeline.data.validation) - 12
    assert study.question_key != pipeline.study.question_key, "an accuracy on other images is another answer"
    most = build_pipeline(
        Study.parse(tiny.STUDY.replace("grid = 2", "grid = 2, choose_on = 999"), "test"), lambda *_: None
    )
    assert len(most.threshold_images) == len(pipeline.threshold_images), "half at most"


def test_a_network_is_compressed_once_for_its_thresholds_and_its_measurement(pipeline) -> None:
    choices = pipeline.space.candidate(pipeline.space.uniform(0.5, "fp32"))
    settled = pipeline.space.with_thresholds(choices, Thresholds(dict.fromkeys(choices.thresholds.exits, 0.8)))
    assert pipeline.compress(settled) is pipeline.compress(choices)
    assert pipeline.compress(replace(choices, patterns={"hidden": "50%"})) is not pipeline.compress(choices)
