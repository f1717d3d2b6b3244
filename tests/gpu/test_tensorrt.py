"""TensorRT on a real GPU: engines answer as ONNX Runtime does, in the precision that was asked for."""

import time
from pathlib import Path

import numpy as np
import pytest

from evaluators.artifact_builder import ArtifactBuilder
from evaluators.runtimes.base import Proof, TargetError, TimedBatch
from evaluators.runtimes.onnxruntime_cpu import OnnxRuntime
from evaluators.runtimes.paired_timing import TimingProtocol, time_pair
from evaluators.runtimes.tensorrt_gpu import inspector as trt_report
from evaluators.runtimes.tensorrt_gpu import runtime as trt
from evaluators.runtimes.tensorrt_gpu.engines import WITH_GRAPH, WITHOUT_GRAPH
from evaluators.runtimes.tensorrt_gpu.runtime import TensorRT
from evaluators.testing import RuntimeContract

MISSING = TensorRT.missing()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(MISSING is not None, reason=str(MISSING))]


@pytest.fixture(scope="session")
def runtime() -> TensorRT:
    return TensorRT()


@pytest.fixture(scope="session")
def builder(network, images) -> ArtifactBuilder:
    """Files for TensorRT: those of the other tests are for another target."""
    return ArtifactBuilder(network, images.numpy(), TensorRT())


@pytest.fixture(autouse=True)
def own_timing_cache(tmp_path_factory, monkeypatch) -> Path:
    folder = tmp_path_factory.getbasetemp() / "tensorrt-cache"
    monkeypatch.setenv("DEPLOYFRONT_CACHE", str(folder))
    return folder


def one_stage(builder, network, space, precision: str) -> bytes:
    (stage,) = builder.build(network, space.candidate(space.uniform(1.0, precision))).stages
    return stage


class TestRuntime(RuntimeContract):
    @pytest.fixture
    def runtime(self) -> TensorRT:
        return TensorRT()


def test_engines_answer_as_onnx_runtime_does(runtime, builder, network, space, images) -> None:
    stage, pictures = one_stage(builder, network, space, "fp32"), images.numpy()
    ours, _ = runtime.open([stage], [], 1).answer(pictures, 4)
    cpu = OnnxRuntime()
    theirs, _ = cpu.open([cpu.deployable(stage)], [], 1).answer(pictures, 4)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_exits_answer_as_onnx_runtime_does(runtime, builder, network, space, images) -> None:
    artifact = builder.build(network, space.candidate(space.uniform(1.0, "fp32", 0.6)))
    ours, exits = runtime.open(artifact.stages, artifact.thresholds, 1).answer(images.numpy(), 1)
    theirs, left = OnnxRuntime().open(artifact.stages, artifact.thresholds, 1).answer(images.numpy(), 1)
    np.testing.assert_array_equal(exits, left)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_layer_gets_the_precision_that_it_was_asked_for(runtime, builder, network, space, images, precision) -> None:
    opened = runtime.open([one_stage(builder, network, space, precision)], [], 1)
    opened.answer(images.numpy(), 4)
    (stage,) = opened.stages((4, *images.shape[1:]))
    rows = trt.inspect(stage.engine)
    assert rows
    asked = {"/trunk/inner/inner.0/Conv": precision, "/trunk/outer/outer.0/Conv": precision}
    assert trt_report.precision_proof(rows, asked) == Proof()
    assert opened.proof(images.numpy()[:4], asked) == Proof()
    layers = trt.layer_seconds(stage, trt._layer_profiler())
    assert layers
    assert all(0 <= seconds < 1 for seconds in layers.values())


def test_an_engine_takes_as_long_as_itself(runtime, builder, network, space, images) -> None:
    stage, protocol = one_stage(builder, network, space, "fp32"), TimingProtocol()
    first, second = (runtime.open([stage], [], 1) for _ in range(2))
    turns = first.turns(images.numpy(), [TimedBatch(0, 4)], second, 4, protocol)
    assert time_pair(turns, [1.0], protocol, time.perf_counter).ratio == pytest.approx(1.0, abs=0.1)
    assert first.graph_errors == ()
    for spent in first.seconds(images.numpy()[:4], 5):
        assert 0 < spent.work < spent.wall
    assert list(first.launches(images.numpy()[:4])) == [WITH_GRAPH, WITHOUT_GRAPH]


def test_the_timing_cache_is_written(runtime, builder, network, space, images, own_timing_cache) -> None:
    TensorRT().open([one_stage(builder, network, space, "fp32")], [], 1).answer(images.numpy(), 3)
    (found,) = (own_timing_cache / "tensorrt").iterdir()
    assert found.suffix == ".cache"
    assert found.stat().st_size


def test_what_cannot_be_parsed_is_one_clear_line(runtime, images) -> None:
    with pytest.raises(TargetError, match="reads every node") as error:
        runtime.open([b"no ONNX"], [], 1).answer(images.numpy(), 1)
    assert "\n" not in str(error.value)


def test_the_state_of_this_gpu_is_told() -> None:
    state = TensorRT().state()
    assert state.kind == "GPU"
    assert state.temperature_c is None or 0 < state.temperature_c < 120
    assert state.clock_hz is None or state.clock_hz > 1e6
