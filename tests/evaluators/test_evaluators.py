from dataclasses import replace

import numpy as np
import pytest
import torch

from evaluators.accuracy import AccuracyEvaluator
from evaluators.data import LabelledImages
from evaluators.deployed import DeployedCandidate, LoadedArtifact
from evaluators.flops.evaluator import FlopsEvaluator, count_by_module
from evaluators.latency.cache import LatencyCache, is_two_in_four
from evaluators.latency.evaluator import LatencyEvaluator, Reference
from evaluators.runtimes.base import Target, TargetError
from evaluators.runtimes.device_state import DeviceState
from evaluators.runtimes.onnxruntime_cpu import OnnxRuntime
from evaluators.runtimes.paired_timing import TimingProtocol
from evaluators.runtimes.registry import RUNTIMES, runtime
from evaluators.size import ParamsEvaluator, SizeEvaluator
from evaluators.testing import EvaluatorContract, RuntimeContract
from spaces.candidate import Candidate
from spaces.registry import UnknownNameError


@pytest.fixture(params=["dense", "pruned int8 with exits"])
def subject(request, builder, network, space, images) -> DeployedCandidate:
    values = space.uniform(1.0, "fp32") if request.param == "dense" else space.uniform(0.5, "int8", 0.6)
    candidate = space.candidate(values)
    pruned = space.apply(network, candidate)
    with torch.no_grad():
        labels = network(images)[-1].argmax(1).numpy()
    labels[0] = (labels[0] + 1) % 4
    data = LabelledImages(images.numpy(), labels)
    target = Target("onnxruntime", "test CPU", 4, 1)
    return DeployedCandidate(pruned, candidate, builder.build(pruned, candidate), data, OnnxRuntime(), target)


class TestAccuracy(EvaluatorContract):
    @pytest.fixture
    def evaluator(self):
        return AccuracyEvaluator()

    def test_is_the_share_of_right_answers(self, evaluator, subject) -> None:
        found = evaluator.measure(subject)
        assert found.value == subject.answers.correct.mean()
        assert found.spread == pytest.approx(np.sqrt(found.value * (1 - found.value) / 12))
        if not subject.artifact.exits:
            assert found.value == pytest.approx(11 / 12)


class TestSize(EvaluatorContract):
    @pytest.fixture
    def evaluator(self):
        return SizeEvaluator()

    def test_is_what_the_files_take_on_disk(self, evaluator, subject, tmp_path) -> None:
        for index, stage in enumerate(subject.artifact.deployed):
            (tmp_path / str(index)).write_bytes(stage)
        assert evaluator.measure(subject).value == sum(file.stat().st_size for file in tmp_path.iterdir())


class TestParams(EvaluatorContract):
    @pytest.fixture
    def evaluator(self):
        return ParamsEvaluator()

    def test_counts_only_heads_that_are_deployed(self, evaluator, subject) -> None:
        trunk = sum(parameter.numel() for parameter in subject.network.trunk.parameters())
        heads = sum(parameter.numel() for parameter in subject.network.exits.parameters())
        assert evaluator.measure(subject).value == trunk + (heads if subject.artifact.exits else 0)


class TestFlops(EvaluatorContract):
    @pytest.fixture
    def evaluator(self, network, image):
        return FlopsEvaluator(network, image)

    def test_is_the_expectation_over_the_stages_that_are_reached(self, evaluator, subject, image) -> None:
        found = evaluator.measure(subject)
        total = sum(count_by_module(subject.network, image).values())
        if not subject.artifact.exits:
            assert found.value == found.others["worst"] == sum(count_by_module(subject.network.trunk, image).values())
            return
        assert found.others["worst"] == total
        counts = count_by_module(subject.network, image)
        first = ("trunk.stem", "trunk.inner", "trunk.outer", "trunk.join", "trunk.pool", "exits.exit1")
        second = ("trunk.depthwise", "trunk.pointwise", "exits.exit2")
        stages = [sum(c for name, c in counts.items() if name.startswith(prefix)) for prefix in (first, second)]
        stages.append(total - sum(stages))
        assert found.value == pytest.approx(np.dot(subject.answers.reach_shares, stages))


def test_flops_of_a_layer_scale_exactly_with_its_kept_channels(network, space, image) -> None:
    dense = count_by_module(network, image)
    channels = {"inner.0": 8, "pointwise.0": 16}
    pruned = count_by_module(space.sparsity.apply(network, channels), image)
    assert pruned["trunk.inner.0"] == dense["trunk.inner.0"] * 8 / 24
    assert pruned["trunk.outer.0"] == dense["trunk.outer.0"] * 8 / 24
    assert pruned["trunk.pointwise.0"] == dense["trunk.pointwise.0"] / 2
    assert pruned["trunk.hidden"] == dense["trunk.hidden"] / 2
    assert pruned["trunk.stem.0"] == dense["trunk.stem.0"]


def test_one_multiply_add_is_one_flop(network, image) -> None:
    assert count_by_module(network, image)["trunk.inner.0"] == 8 * 8 * 24 * 16 * 9


class TestLatency(EvaluatorContract):
    repeats_exactly = False

    @pytest.fixture
    def evaluator(self, builder, network, space):
        dense = space.dense()
        references = {}
        for precision in ("fp32", "int8"):
            candidate = Candidate(dense.channels, dict.fromkeys(dense.precision, precision), dense.thresholds)
            references[precision] = Reference(builder.build(network, candidate).deployed[0], 1.0)
        target = Target("onnxruntime", "test CPU", 4, 1)
        return LatencyEvaluator(references, OnnxRuntime(), target, TimingProtocol(limit_s=0.2))

    def test_is_told_at_the_speed_of_the_reference(self, evaluator, subject) -> None:
        precision = "int8" if subject.artifact.exits else "fp32"
        twice = {name: Reference(found.model, 2.0) for name, found in evaluator.references.items()}
        slower = LatencyEvaluator(twice, OnnxRuntime(), subject.target, TimingProtocol(limit_s=0.2))
        found = slower.measure(subject)
        assert found.value == pytest.approx(2.0 * found.notes["ratio"])
        assert f"dense {precision}" in found.protocol

    def test_the_longest_path_is_part_of_it(self, evaluator, subject) -> None:
        found = evaluator.measure(subject)
        if subject.artifact.exits:
            assert found.statistic.startswith("expected")
            assert found.others["worst"] > 0.8 * found.value
        else:
            assert found.others["worst"] == found.value

    def test_percentiles_are_on_the_scale_of_the_latency(self, evaluator, subject) -> None:
        found = evaluator.measure(subject)
        tails = [found.others[name] for name in ("p90", "p95", "p99")]
        assert tails == sorted(tails)
        if not subject.artifact.exits:
            assert found.value <= tails[0]

    def test_on_a_gpu_the_host_s_part_of_a_call_is_added(self, evaluator, subject) -> None:
        class ByEvents(OnnxRuntime):
            def capabilities(self):
                return replace(super().capabilities(), clock="gpu")

        events = LatencyEvaluator(evaluator.references, ByEvents(), subject.target, TimingProtocol(limit_s=0.2))
        found = events.measure(subject)
        assert found.value == pytest.approx(found.notes["ratio"] * 1.0 + found.notes["wait_s"])
        assert "CUDA events" in found.protocol
        assert "CUDA events" not in evaluator.measure(subject).protocol

    def test_a_reference_takes_as_long_as_itself(self, evaluator, images) -> None:
        assert evaluator.reference_self_ratio("fp32", images.numpy()) == pytest.approx(1.0, abs=0.3)


class Compiling(OnnxRuntime):
    """ONNX Runtime, as if loading it compiled for the device; counts how often something is loaded."""

    opened = 0

    def capabilities(self):
        return replace(super().capabilities(), compiles=True)

    def open(self, stages, thresholds, threads, confidence="softmax"):
        self.opened += 1
        return super().open(stages, thresholds, threads, confidence)


def test_a_latency_is_measured_once_per_shape(builder, network, space, images, tmp_path) -> None:
    library, target = Compiling(), Target("onnxruntime", "test CPU", 4, 1)
    dense = builder.build(network, space.dense()).deployed[0]
    make = lambda: LatencyEvaluator(  # noqa: E731
        {"fp32": Reference(dense, 1.0)}, library, target, TimingProtocol(limit_s=0.1), LatencyCache(tmp_path)
    )
    data = LabelledImages(images.numpy(), np.zeros(len(images), np.int64))

    def measure(keep: float, threshold: float, noise: float, evaluator) -> tuple[float, int]:
        candidate = space.candidate(space.uniform(keep, "fp32", threshold))
        pruned = space.apply(network, candidate)
        for parameter in pruned.parameters():
            parameter.data += noise
        subject = LoadedArtifact(candidate, builder.build(pruned, candidate), data, library, target)
        before = library.opened
        return evaluator.measure(subject).value, library.opened - before

    first, opened = measure(0.5, 1.0, 0.0, make())
    assert opened == 2
    assert measure(0.5, 1.0, 0.1, make()) == (first, 0), "other weights, same shapes"
    assert measure(0.75, 1.0, 0.0, make())[1] == 2, "other shapes"
    assert measure(0.5, 0.6, 0.0, make())[1] == 2, "with exits, inputs decide"
    for file in tmp_path.iterdir():
        file.write_text("torn")
    assert measure(0.5, 1.0, 0.0, make())[1] == 2, "what cannot be read is measured again"


class Warming(OnnxRuntime):
    """A GPU's state that is told anew each time."""

    def __init__(self, *told: DeviceState) -> None:
        self._told = iter(told)

    def state(self) -> DeviceState:
        return next(self._told)


def test_a_latency_has_the_state_before_and_after_and_says_when_it_moved(builder, network, space, images) -> None:
    cool, hot = DeviceState("GPU", 1.5e9, None, 50.0), DeviceState("GPU", 1.0e9, None, 70.0)
    library, target = Warming(cool, hot, DeviceState("GPU"), DeviceState("GPU")), Target("onnxruntime", "test", 4, 1)
    artifact = builder.build(network, space.dense())
    evaluator = LatencyEvaluator(
        {"fp32": Reference(artifact.deployed[0], 1.0)}, library, target, TimingProtocol(limit_s=0.05)
    )
    data = LabelledImages(images.numpy(), np.zeros(len(images), np.int64))
    first, second = (
        evaluator.measure(LoadedArtifact(space.dense(), artifact, data, library, target)) for _ in range(2)
    )
    assert first.states == {"before": cool.known(), "after": hot.known()}
    assert [word for line, word in zip(first.remarks, ("1000 MHz", "70 degrees"), strict=True) if word in line]
    assert first.notes["drift"] == pytest.approx(first.notes["work_s"] / first.notes["ratio"])
    assert (second.states, second.remarks) == ({}, ())


def test_a_pattern_of_two_in_four_is_seen_along_the_input_channels() -> None:
    weight = np.ones((3, 8, 3, 3), np.float32)
    assert not is_two_in_four(weight)
    weight[:, [0, 3, 5, 6]] = 0
    assert is_two_in_four(weight)
    weight[1, 0, 2, 2] = 1
    assert not is_two_in_four(weight)
    assert not is_two_in_four(np.zeros((3, 6, 3, 3), np.float32))


class TestOnnxRuntime(RuntimeContract):
    @pytest.fixture
    def runtime(self):
        return OnnxRuntime()

    def test_weights_are_seven_bits_where_sums_would_overflow(self, runtime, monkeypatch) -> None:
        from evaluators.runtimes import cpu

        monkeypatch.setattr(cpu.platform, "machine", lambda: "x86_64")
        monkeypatch.setattr(cpu, "cpu_flags", lambda: frozenset({"avx2"}))
        assert runtime.capabilities().weight_bits == 7
        monkeypatch.setattr(cpu, "cpu_flags", lambda: frozenset({"avx2", "avx512_vnni"}))
        assert runtime.capabilities().weight_bits == 8
        monkeypatch.setattr(cpu.platform, "machine", lambda: "aarch64")
        monkeypatch.setattr(cpu, "cpu_flags", lambda: frozenset())
        assert runtime.capabilities().weight_bits == 8


def test_every_runtime_in_the_table_loads_or_says_why_not() -> None:
    for name in RUNTIMES:
        try:
            found = runtime(name)
        except TargetError as error:
            found, reason = None, str(error)
        assert found.name == name if found else name in reason


def test_an_unknown_target_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match="onnxruntime"):
        runtime("abacus")
