"""Key frames: what is computed, what is answered again, and what a stream costs."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from evaluators.accuracy import accuracy_of
from evaluators.data import LabelledImages
from evaluators.deployed import DeployedCandidate, predict
from evaluators.flops.evaluator import FlopsEvaluator
from evaluators.inference.frame_reuse import FrameReuse, Reuse, difference, thumbnail
from evaluators.inference.staged import StagedNetwork
from evaluators.latency.evaluator import LatencyEvaluator, Reference
from evaluators.latency.remeasure import remeasure, write_job
from evaluators.runtimes.base import PrecedingKeyFrame, Target, TimedBatch
from evaluators.runtimes.local import frame_call
from evaluators.runtimes.onnxruntime_cpu import OnnxRuntime, load
from evaluators.streams import KEY_FRAMES, Stream, timed_frames
from evaluators.testing import EvaluatorContract
from spaces.candidate import Candidate
from spaces.dimensions import Real
from spaces.testing import SpaceContract
from spaces.thresholds import Thresholds, ThresholdSpace
from tests.helpers import tiny

NEVER = 1e9
"""A maximal age that no stream reaches."""

streams = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 30), st.just(1), st.just(2), st.just(2)), elements=st.floats(-1, 1, width=16)
)
thresholds = st.floats(0, 2, width=16)
ages = st.integers(1, 12)


def stream_of(images: np.ndarray, labels: np.ndarray | None = None) -> Stream:
    return Stream(images, np.zeros(len(images), np.int64) if labels is None else labels, np.array([0]))


def counting() -> tuple[list[np.ndarray], object]:
    """Returns a network whose answer is the frame itself, and the frames that it was asked about."""
    seen: list[np.ndarray] = []

    def network(frame: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        seen.append(frame)
        return frame.reshape(1, -1), np.zeros(1, np.int64)

    return seen, network


@pytest.fixture(scope="module")
def stream() -> Stream:
    """Returns five clips of twelve frames: a bar under a little noise, that moves from clip to clip."""
    rng = np.random.default_rng(3)
    labels = np.repeat(np.array([0, 2, 1, 3, 0]), 12)
    images = rng.normal(0, 0.2, (60, 1, 8, 8)).astype(np.float32)
    for image, label in zip(images, labels, strict=True):
        image[0, 2 * label : 2 * label + 2] += 1.0
    return Stream(images, labels, np.arange(0, 60, 12))


@pytest.fixture(params=["fp32, exits", "int8, no exits"])
def subject(request, builder, network, space, stream) -> DeployedCandidate:
    precision, threshold = ("fp32", 0.6) if "fp32" in request.param else ("int8", 1.0)
    candidate = space.candidate(space.uniform(0.5, precision, threshold))
    smaller = space.apply(network, candidate)
    artifact = replace(builder.build(smaller, candidate), reuse=Reuse(0.5, 10))
    target = Target("onnxruntime", "this CPU", batch=1, threads=1)
    return DeployedCandidate(smaller, candidate, artifact, stream, OnnxRuntime(), target)


@pytest.mark.parametrize("max_age", [1, 2, 7])
def test_an_unchanged_stream_has_one_key_frame_per_maximal_age(max_age) -> None:
    seen, network = counting()
    frames = np.ones((20, 1, 4, 4), np.float32)
    _, _, keys = FrameReuse(network, 0.1, max_age)(frames)
    np.testing.assert_array_equal(np.flatnonzero(keys), np.arange(0, 20, max_age))
    assert len(seen) == keys.sum()


@given(streams, ages)
def test_at_threshold_zero_every_frame_is_computed(frames, max_age) -> None:
    seen, network = counting()
    logits, _, keys = FrameReuse(network, 0.0, max_age)(frames)
    assert keys.all()
    assert len(seen) == len(frames)
    np.testing.assert_array_equal(logits, frames.reshape(len(frames), -1))


def test_cuts_to_another_picture_are_key_frames(stream) -> None:
    _, network = counting()
    _, _, keys = FrameReuse(network, 0.35, 1_000)(stream.images)
    np.testing.assert_array_equal(np.flatnonzero(keys), stream.starts)


@given(streams, thresholds, ages)
def test_every_frame_is_answered_by_a_key_frame_that_is_like_it_and_not_too_old(frames, threshold, max_age) -> None:
    answering = stream_of(frames).key_frames(Reuse(threshold, max_age))
    small = [thumbnail(frame) for frame in frames]
    for index, key in enumerate(answering):
        assert answering[key] == key
        assert 0 <= index - key < max_age
        if key != index:
            assert difference(small[index], small[key]) < threshold
        elif index:
            before = answering[index - 1]
            assert index - before == max_age or threshold == 0 or difference(small[index], small[before]) >= threshold


@given(streams, thresholds, ages, st.integers(1, 5))
def test_thumbnails_alone_tell_what_the_loop_does(frames, threshold, max_age, at_once) -> None:
    _, network = counting()
    loop = FrameReuse(network, threshold, max_age)
    parts = [loop(frames[at : at + at_once]) for at in range(0, len(frames), at_once)]
    answering = stream_of(frames).key_frames(Reuse(threshold, max_age))
    np.testing.assert_array_equal(np.concatenate([keys for *_, keys in parts]), answering == np.arange(len(frames)))
    logits = np.concatenate([logits for logits, *_ in parts])
    np.testing.assert_array_equal(logits, frames[answering].reshape(len(frames), -1))


@given(streams, thresholds, thresholds)
def test_a_higher_threshold_never_brings_the_second_key_frame_forward(frames, one, other) -> None:
    def second(threshold: float) -> int:
        answering = stream_of(frames).key_frames(Reuse(threshold, int(NEVER)))
        return int(np.append(np.flatnonzero(answering), len(frames))[0])

    assert second(min(one, other)) <= second(max(one, other))


def test_a_higher_threshold_may_add_key_frames_later() -> None:
    # From the second key frame on, frames are compared with other key frames than at a lower threshold.
    values = np.array([0.0, 0.4, 0.6, 0.1, 0.7, 0.1, 0.7], np.float32)
    frames = np.broadcast_to(values[:, None, None, None], (7, 1, 2, 2))
    counts = [len(set(stream_of(frames).key_frames(Reuse(threshold, 100)))) for threshold in (0.35, 0.45)]
    assert counts == [2, 6]


@given(st.integers(1, 3), st.integers(1, 19), st.integers(1, 19), st.integers(0, 2**16))
def test_a_thumbnail_is_the_mean_of_its_cells(channels, height, width, seed) -> None:
    frame = np.random.default_rng(seed).normal(size=(channels, height, width)).astype(np.float32)
    small = thumbnail(frame)
    rows, columns = (np.linspace(0, size, min(8, size) + 1).astype(int) for size in (height, width))
    assert small.shape == (len(rows) - 1, len(columns) - 1)
    for row in range(len(rows) - 1):
        for column in range(len(columns) - 1):
            cell = frame[:, rows[row] : rows[row + 1], columns[column] : columns[column + 1]]
            assert small[row, column] == pytest.approx(cell.mean(), abs=1e-5)


@pytest.mark.parametrize("threshold", [0.2, 0.35, 0.9, 3.0])
def test_accuracy_follows_from_single_answers_and_equals_that_of_the_loop(threshold, subject, stream) -> None:
    reuse, stages = Reuse(threshold, 9), len(subject.artifact.deployed)
    every = predict(subject.session, stages, stream, 1)
    network = StagedNetwork([load(stage, 1) for stage in subject.artifact.deployed], subject.artifact.thresholds)
    logits, exits, keys = FrameReuse(network, threshold, 9)(stream.images)
    answering = stream.key_frames(reuse)
    np.testing.assert_array_equal(every.classes[answering], logits.argmax(axis=1))
    np.testing.assert_array_equal(every.exits[answering], exits)
    asked = predict(subject.session, stages, stream, 1, reuse)
    np.testing.assert_array_equal(asked.classes, logits.argmax(axis=1))
    np.testing.assert_array_equal(asked.exits, exits)
    np.testing.assert_array_equal(asked.computed, keys)
    found = accuracy_of(asked, subject.target, "validation")
    assert found.value == (logits.argmax(axis=1) == stream.labels).mean()
    assert found.notes[KEY_FRAMES] == keys.mean()


@given(hnp.arrays(np.bool_, 24), st.sampled_from([1, 2, 3, 4]))
def test_the_standard_error_does_not_fall_with_frames_of_the_same_clip(right, repeats) -> None:
    labels = np.zeros(24 * repeats, np.int64)
    images = np.zeros((24 * repeats, 1, 1, 2), np.float32)
    images[:, 0, 0, 1] = np.repeat(~right, repeats)
    stream = Stream(images, labels, np.arange(0, 24 * repeats, repeats))

    class Says:
        def answer(self, images, batch):
            return images.reshape(len(images), -1), np.zeros(len(images), np.int64)

    found = accuracy_of(predict(Says(), 1, stream, 1), Target("onnxruntime", "none", 1, 1), "validation")
    share = right.mean()
    assert found.spread == pytest.approx(np.sqrt(share * (1 - share) / 24), abs=1e-9)


class TestFlops(EvaluatorContract):
    @pytest.fixture
    def evaluator(self, network, image) -> FlopsEvaluator:
        return FlopsEvaluator(network, image)

    def test_only_key_frames_are_computed_and_every_frame_is_compared(self, evaluator, subject, stream) -> None:
        found = evaluator.measure(subject)
        alone = DeployedCandidate(
            subject.network,
            subject.candidate,
            replace(subject.artifact, reuse=None),
            LabelledImages(stream.images[subject.answers.computed], stream.labels[subject.answers.computed]),
            OnnxRuntime(),
            subject.target,
        )
        per_key = evaluator.measure(alone).value
        assert found.value == pytest.approx(64 + subject.answers.computed.mean() * per_key)
        assert found.statistic_value("worst") == evaluator.measure(alone).statistic_value("worst") + 64


class TestLatency(EvaluatorContract):
    repeats_exactly = False

    @pytest.fixture
    def evaluator(self, builder, network, space) -> LatencyEvaluator:
        dense = space.dense()
        files = {
            precision: builder.build(
                network, Candidate(dense.channels, dict.fromkeys(dense.precision, precision), dense.thresholds)
            ).deployed[0]
            for precision in ("fp32", "int8")
        }
        references = {precision: Reference(file, 1e-3) for precision, file in files.items()}
        return LatencyEvaluator(references, OnnxRuntime(), Target("onnxruntime", "this CPU", batch=1, threads=1))

    def test_key_frames_cost_more_than_frames_that_are_answered_again(self, evaluator, subject) -> None:
        found = evaluator.measure(subject)
        assert found.statistic == "expected over the frames of the validation stream"
        assert found.statistic_value("worst") > found.value > 0
        assert found.notes["ratio"] > 0

    def test_a_new_process_finds_the_same_frames(self, evaluator, subject, tmp_path) -> None:
        write_job(tmp_path, subject, evaluator)
        again = remeasure(tmp_path)
        assert again.latency.statistic == "expected over the frames of the validation stream"
        assert again.latency.statistic_value("worst") > again.latency.value


class TestGates(SpaceContract):
    @pytest.fixture
    def part(self) -> ThresholdSpace:
        return ThresholdSpace(["exit1"], 0.5, 0.05, Real(0.0, 0.4, 0.1))


def test_a_gate_for_frames_is_no_exit() -> None:
    candidate = Candidate({}, {}, Thresholds({"exit1": 0.8}, frames=0.2))
    assert candidate.active_exits == ("exit1",)
    gates = ThresholdSpace(["exit1"], 0.5, 0.05, Real(0.0, 0.4, 0.1))
    assert gates.closed() == Thresholds({"exit1": None}, frames=0.0)
    assert gates.alike(None) == {"threshold.exit1": 1.0, "threshold.frames": 0.0}
    assert gates.alike(0.5) == {"threshold.exit1": 0.5, "threshold.frames": 0.4}
    assert ThresholdSpace(["exit1"], 0.5, 0.05).closed() == Thresholds({"exit1": None})


@pytest.mark.parametrize("starts", [[], [1], [0, 3, 3], [0, 9]])
def test_clips_start_where_there_are_frames(starts) -> None:
    with pytest.raises(ValueError, match="clips start at frame 0"):
        Stream(np.zeros((4, 1, 2, 2), np.float32), np.zeros(4, np.int64), np.array(starts, dtype=np.int64))


@settings(max_examples=20)
@given(st.integers(1, 60))
def test_the_head_of_a_stream_is_answered_as_in_the_whole(count) -> None:
    images = np.random.default_rng(0).normal(size=(60, 1, 2, 2)).astype(np.float32)
    stream = Stream(images, np.zeros(60, np.int64), np.array([0, 20, 45]))
    reuse = Reuse(0.5, 7)
    np.testing.assert_array_equal(stream.head(count).key_frames(reuse), stream.key_frames(reuse)[:count])
    assert tiny.splits().classes == 4


def test_every_kind_of_frame_is_timed_as_often_as_it_occurs_and_the_longest_path_last(subject) -> None:
    answers, reuse = subject.answers, subject.artifact.reuse
    batches, counts = timed_frames(answers.key_frames, answers.profiles, reuse, is_dynamic=answers.stages > 1)
    assert sum(counts) == len(subject.validation)
    keys = [batch for batch in batches if answers.computed[batch.start]]
    assert len(batches) - len(keys) == 1, "one frame that is answered again"
    assert batches[-1].longest == (answers.stages > 1)
    for batch in batches:
        met = batch.follows
        again = (
            met.age < reuse.max_age
            and difference(*(thumbnail(subject.validation.images[index]) for index in (batch.start, met.key)))
            < met.threshold
        )
        assert again != answers.computed[batch.start]


@pytest.mark.parametrize(("age", "threshold", "computes"), [(1, 0.5, False), (1, 0.2, True), (30, 0.5, True)])
def test_a_frame_is_compared_in_its_own_size_and_computed_in_the_networks(age, threshold, computes) -> None:
    """Frames of 4x4 pixels that differ by 0.25 on average; the network would get them in another size."""
    frames = np.zeros((2, 1, 4, 4), np.float32)
    frames[1, 0, 0] = 1.0
    small: list[int] = []

    def compute() -> tuple[np.ndarray, np.ndarray]:
        small.append(1)
        return np.zeros((1, 3), np.float32), np.zeros(1, np.int64)

    call = frame_call(compute, frames, TimedBatch(1, 1, follows=PrecedingKeyFrame(0, age, threshold, 30)))
    small.clear()  # the key frame itself was computed once, before
    call()
    assert bool(small) == computes


def test_what_follows_no_key_frame_is_no_frame() -> None:
    with pytest.raises(ValueError, match="follows a key frame"):
        frame_call(lambda: (np.zeros((1, 3)), np.zeros(1)), np.zeros((1, 1, 4, 4), np.float32), TimedBatch(0, 1))
