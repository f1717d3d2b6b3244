"""Running, timing and failing on a GPU that follows a script."""

import ctypes
import gc
from typing import Any

import numpy as np
import pytest

from evaluators.inference.staged import StagedNetwork
from evaluators.runtimes.base import PrecedingKeyFrame, TargetError, TimedBatch
from evaluators.runtimes.paired_timing import TimingProtocol, time_pair
from evaluators.runtimes.tensorrt_gpu import cuda as cuda_module
from evaluators.runtimes.tensorrt_gpu.cuda import (
    Buffer,
    Cuda,
    CudaError,
    LaunchError,
    NoCudaLibraryError,
    NoDriverError,
    NoGpuError,
    OutOfDeviceMemoryError,
    TimedStream,
)
from evaluators.runtimes.tensorrt_gpu.engines import WITH_GRAPH, WITHOUT_GRAPH, EngineStage
from tests.helpers.scripted_gpu import (
    COPY_S,
    LOST,
    NO_DEVICE,
    NO_MEMORY,
    NOT_WHILE_CAPTURING,
    OLD_DRIVER,
    WORDS,
    ScriptedEngine,
    ScriptedGpu,
    first_half,
    one_line,
    opened,
    second_half,
)


def test_the_last_batch_is_padded_and_every_image_is_answered(gpu: ScriptedGpu, pictures: Any) -> None:
    logits, exits = opened(gpu).answer(pictures, batch=4)
    np.testing.assert_allclose(logits, first_half(pictures)[1], rtol=1e-6)
    assert not exits.any()


@pytest.mark.parametrize("batch", [1, 4])
def test_exits_answer_as_the_staged_network_does(gpu: ScriptedGpu, pictures: Any, batch: int) -> None:
    logits, exits = opened(gpu, thresholds=(0.8,)).answer(pictures, batch)
    wanted, left = StagedNetwork([first_half, second_half], [0.8])(pictures)
    assert set(left) == {0, 1}
    np.testing.assert_array_equal(exits, left)
    np.testing.assert_allclose(logits, wanted, rtol=1e-6)


@pytest.mark.parametrize("batch", [1, 4])
def test_every_exit_is_asked_and_a_batch_leaves_where_it_is_told(gpu: ScriptedGpu, pictures: Any, batch: int) -> None:
    network = opened(gpu, seconds=1e-3, thresholds=(0.8,))
    found = network.all_logits(pictures, batch)
    np.testing.assert_allclose(found, StagedNetwork([first_half, second_half], [0.8]).all_logits(pictures), rtol=1e-6)
    assert found.shape[:2] == (len(pictures), 2)
    batches = [TimedBatch(0, batch, exit=place) for place in (0, 1)]
    turn = network.turns(pictures, batches, opened(gpu, name="r"), 1, TimingProtocol())(True)
    assert turn.works[1] > 1.5 * turn.works[0], "one engine, then both"


def test_features_stay_on_the_device_at_batch_one(gpu: ScriptedGpu, pictures: Any) -> None:
    network = opened(gpu, thresholds=(2.0,))
    network.answer(pictures[:1], 1)
    gpu.log.clear()
    network.answer(pictures, 1)
    # One copy in, and the logits of both stages out; a wait after each stage.
    assert gpu.log.count("cudaMemcpyAsync") == 3 * len(pictures)
    assert gpu.log.count("cudaStreamSynchronize") == 2 * len(pictures)


def test_one_plain_run_precedes_the_capture_and_later_runs_are_launches(gpu: ScriptedGpu, pictures: Any) -> None:
    network = opened(gpu)
    network.seconds(pictures, 3)
    assert gpu.log.index("cudaStreamSynchronize") < gpu.log.index("cudaStreamBeginCapture")
    assert gpu.log.count("cudaGraphLaunch") == 3
    assert gpu.kernels == ["c"] * 4
    assert network.graph_errors == ()


def test_without_a_graph_it_runs_on_and_says_so(gpu: ScriptedGpu, pictures: Any) -> None:
    gpu.capturable = False
    network = opened(gpu)
    logits, _ = network.answer(pictures, 6)
    np.testing.assert_allclose(logits, first_half(pictures)[1], rtol=1e-6)
    assert "cudaGraphLaunch" not in gpu.log
    (error,) = network.graph_errors
    assert WORDS[NOT_WHILE_CAPTURING] in error


def test_a_graph_that_cannot_be_made_is_a_fallback_too(gpu: ScriptedGpu, pictures: Any) -> None:
    gpu.script["cudaGraphInstantiateWithFlags"] = [801]
    network = opened(gpu)
    network.answer(pictures, 6)
    assert len(network.graph_errors) == 1


def test_gpu_time_spans_copies_and_kernels(gpu: ScriptedGpu, pictures: Any) -> None:
    network = opened(gpu, seconds=3e-3)
    network.seconds(pictures, 1)
    for spent in network.seconds(pictures, 4):
        assert spent.work == pytest.approx(3e-3 + 2 * COPY_S, rel=1e-3)
        assert spent.wall == pytest.approx(spent.work, rel=1e-3)


@pytest.mark.parametrize("thresholds", [(), (0.8,)])
def test_launches_with_and_without_a_graph_are_timed_side_by_side(
    gpu: ScriptedGpu, pictures: Any, thresholds: tuple[float, ...]
) -> None:
    gpu.launch_s = 1e-3
    stages = len(thresholds) + 1
    network = opened(gpu, seconds=3e-3, thresholds=thresholds)
    found = network.launches(pictures)
    assert list(found) == [WITH_GRAPH, WITHOUT_GRAPH]
    assert found[WITH_GRAPH] == pytest.approx(3e-3 * stages + (1 + stages) * COPY_S, rel=1e-3)
    assert found[WITHOUT_GRAPH] - found[WITH_GRAPH] == pytest.approx(1e-3 * stages, rel=1e-3)
    gpu.log.clear()
    network.seconds(pictures[:6], 1)
    assert "cudaGraphLaunch" in gpu.log, "the graph is what is deployed"


def test_without_a_graph_there_is_one_way_to_launch(gpu: ScriptedGpu, pictures: Any) -> None:
    gpu.capturable = False
    assert list(opened(gpu).launches(pictures)) == [WITHOUT_GRAPH]


@pytest.mark.parametrize(
    "speed",
    [lambda _: 1.0, lambda now: 1.0 + now / 5, lambda now: 1.3 if int(now / 0.037) % 2 else 1.0],
    ids=["steady", "slows down", "two speeds"],
)
def test_a_drifting_gpu_does_not_move_the_ratio(speed: Any, pictures: Any) -> None:
    gpu = ScriptedGpu(speed)
    candidate, reference = opened(gpu, 3e-3 - 2 * COPY_S), opened(gpu, 2e-3 - 2 * COPY_S, "r")
    protocol = TimingProtocol(limit_s=1e9)
    turns = candidate.turns(pictures, [TimedBatch(0, 4)], reference, 1, protocol)
    assert time_pair(turns, [1.0], protocol, lambda: gpu.now).ratio == pytest.approx(1.5, rel=0.02)


def test_both_sides_are_warm_before_they_take_turns(gpu: ScriptedGpu, pictures: Any) -> None:
    candidate, reference = opened(gpu), opened(gpu, name="r")
    take_turn = candidate.turns(pictures, [TimedBatch(0, 4)], reference, 1, TimingProtocol(burst_s=0))
    assert gpu.now > 0.2
    gpu.kernels.clear()
    for first in (True, False):
        take_turn(first)
    assert "".join(gpu.kernels) == "ccrr" + "rrcc"


def test_the_longest_path_passes_every_exit(gpu: ScriptedGpu, pictures: Any) -> None:
    candidate, reference = opened(gpu, thresholds=(0.0,)), opened(gpu, name="r")
    batches = [TimedBatch(0, 1), TimedBatch(0, 1, longest=True)]
    turn = candidate.turns(pictures, batches, reference, 1, TimingProtocol())(True)
    alone = 1e-3 + 2 * COPY_S
    assert turn.ratios == pytest.approx([1.0, (alone + 1e-3 + COPY_S) / alone], rel=1e-3)


def test_a_frame_that_is_answered_again_leaves_the_gpu_alone(gpu: ScriptedGpu, pictures: Any) -> None:
    candidate, reference = opened(gpu), opened(gpu, name="r")
    reused, computed = PrecedingKeyFrame(0, 1, 1e9, 30), PrecedingKeyFrame(0, 30, 1e9, 30)
    batches = [TimedBatch(1, 1, follows=reused), TimedBatch(1, 1, follows=computed, share=0)]
    take_turn = candidate.turns(pictures, batches, reference, 1, TimingProtocol(burst_s=0))
    gpu.kernels.clear()
    turn = take_turn(True)
    assert turn.ratios == pytest.approx([0.0, 1.0])
    assert "".join(gpu.kernels) == "cc" + "rr", "what never occurs is timed over and over, what is reused runs nothing"


def test_a_failing_launch_is_one_clear_line(gpu: ScriptedGpu, pictures: Any) -> None:
    network = opened(gpu)
    network.answer(pictures, 6)
    gpu.script["cudaGraphLaunch"] = [LOST]
    with pytest.raises(LaunchError) as error:
        network.answer(pictures, 6)
    assert WORDS[LOST] in one_line(error)


def test_an_engine_that_is_refused_without_a_reason_is_one_clear_line(gpu: ScriptedGpu) -> None:
    stream = TimedStream(Cuda(gpu))
    feed = Buffer(stream.cuda, (1, 1), np.float32)
    engine = ScriptedEngine(gpu, "c", 1e-3, lambda _: [], (feed.address, (1, 1)), [], refuses=[True])
    with pytest.raises(CudaError) as error:
        EngineStage(stream, engine, feed, [])
    one_line(error)


def test_a_gpu_lost_in_the_middle_of_a_turn_is_one_clear_line(gpu: ScriptedGpu, pictures: Any) -> None:
    candidate, reference = opened(gpu), opened(gpu, name="r")
    take_turn = candidate.turns(pictures, [TimedBatch(0, 4)], reference, 1, TimingProtocol())
    gpu.lost_after = len(gpu.kernels) + 3
    with pytest.raises(LaunchError) as error:
        take_turn(True)
    assert len(gpu.kernels) == gpu.lost_after
    assert "Xid" in one_line(error)


def test_a_gpu_lost_while_capturing_is_no_fallback(gpu: ScriptedGpu, pictures: Any) -> None:
    gpu.script["cudaStreamEndCapture"] = [LOST]
    with pytest.raises(LaunchError):
        opened(gpu).answer(pictures, 6)


@pytest.mark.parametrize("function", ["cudaMalloc", "cudaMallocHost", "cudaGraphInstantiateWithFlags"])
def test_a_full_gpu_is_one_clear_line_and_everything_is_given_back(
    gpu: ScriptedGpu, pictures: Any, function: str
) -> None:
    gpu.script[function] = [NO_MEMORY]
    with pytest.raises(OutOfDeviceMemoryError) as error:
        opened(gpu).answer(pictures, 6)
    assert "smaller batch" in one_line(error)
    del error
    gc.collect()
    assert not gpu.memory


def test_an_artifact_that_nobody_refers_to_leaves_nothing_behind(gpu: ScriptedGpu, pictures: Any) -> None:
    network = opened(gpu, thresholds=(0.5,))
    network.answer(pictures, 2)
    assert len(gpu.memory) == 8  # input, features and two logits, on both sides
    del network
    gc.collect()
    assert not gpu.memory
    for made, destroyed in (("EventCreate", "EventDestroy"), ("StreamCreateWithFlags", "StreamDestroy")):
        assert gpu.log.count(f"cuda{made}") == gpu.log.count(f"cuda{destroyed}")
    assert gpu.log.count("cudaGraphExecDestroy") == gpu.log.count("cudaGraphDestroy") == 2


def test_the_device_is_described(gpu: ScriptedGpu) -> None:
    cuda = Cuda(gpu)
    assert cuda.device() == cuda_module.Device("Scripted GPU", (8, 7), 8 << 30)
    assert cuda.runtime_version() == "12.6"


@pytest.mark.parametrize(
    ("code", "kind"), [(OLD_DRIVER, NoDriverError), (NO_DEVICE, NoGpuError), (NO_MEMORY, OutOfDeviceMemoryError)]
)
def test_what_is_missing_is_one_clear_line(gpu: ScriptedGpu, code: int, kind: type[Exception]) -> None:
    gpu.script["cudaGetDeviceCount"] = [code]
    with pytest.raises(kind) as error:
        Cuda(gpu).device()
    assert WORDS[code] in one_line(error)
    assert isinstance(error.value, TargetError)


def test_a_machine_without_libcudart_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    with pytest.raises(NoCudaLibraryError) as error:
        Cuda.find()
    assert "pip install" in one_line(error)


def test_the_library_that_the_driver_can_serve_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    newer, older = ScriptedGpu(), ScriptedGpu()
    newer.script["cudaGetDeviceCount"] = [OLD_DRIVER]
    loaded = {"libcudart.so.13": newer, "libcudart.so.12": older}

    def load(name: str) -> ScriptedGpu:
        if name not in loaded:
            raise OSError(name)
        return loaded[name]

    monkeypatch.setattr(ctypes, "CDLL", load)
    Cuda.find().device()
    assert "cudaGetDeviceProperties" in older.log
    assert "cudaGetDeviceProperties" not in newer.log
