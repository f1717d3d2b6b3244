"""Running, timing and failing on a GPU that follows a script, and reading what TensorRT's inspector tells."""

import ctypes
import gc
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from evaluators.runtimes import cuda as cuda_module
from evaluators.runtimes import trt, trt_report
from evaluators.runtimes.cuda import (
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
from evaluators.runtimes.engines import EngineStage, OpenedEngines
from evaluators.runtimes.run_bundle import StagedNetwork
from evaluators.runtimes.trt import TensorRT
from evaluators.target import TargetError, TimedBatch
from evaluators.timing import Protocol, time_pair

CLASSES = 3
COPY_S = 1e-4
NO_MEMORY, OLD_DRIVER, NO_DEVICE, NOT_WHILE_CAPTURING, INVALIDATED, LOST = 2, 35, 100, 900, 901, 719
WORDS = {
    NO_MEMORY: "out of memory",
    OLD_DRIVER: "CUDA driver version is insufficient for CUDA runtime version",
    NO_DEVICE: "no CUDA-capable device is detected",
    NOT_WHILE_CAPTURING: "operation not permitted when stream is capturing",
    INVALIDATED: "operation failed due to a previous error during capture",
    LOST: "unspecified launch failure",
}


class ScriptedGpu:
    """A libcudart whose device memory is this process's and whose clock moves when it works, at a scripted speed."""

    def __init__(self, speed: Callable[[float], float] = lambda _: 1.0) -> None:
        self.now = 0.0
        self.speed = speed
        self.script: dict[str, list[int]] = {}
        self.log: list[str] = []
        self.kernels: list[str] = []
        self.memory: dict[int, Any] = {}
        self.capturable = True
        self.lost_after: int | None = None
        self._capturing: list[Callable[[], None]] | None = None
        self._broken_capture = False
        self._graphs: dict[int, list[Callable[[], None]]] = {}
        self._times: dict[int, float] = {}
        self._handles = iter(range(1, 1_000_000))
        self._last = 0
        self.cudaGetErrorString = lambda code: WORDS.get(code.value, "unknown error").encode()

    def __getattr__(self, function: str) -> Callable[..., int]:
        def run(*arguments: Any) -> int:
            self.log.append(function)
            codes = self.script.get(function)
            code = codes.pop(0) if codes else 0
            return code or self.functions.get(function, ScriptedGpu.nothing)(self, *arguments)

        if not function.startswith("cuda"):
            raise AttributeError(function)
        return run

    def nothing(self, *_: Any) -> int:
        return LOST if self.lost else 0

    @property
    def lost(self) -> bool:
        return self.lost_after is not None and len(self.kernels) >= self.lost_after

    def work(self, seconds: float) -> None:
        self.now += seconds * self.speed(self.now)

    def enqueue(self, name: str, seconds: float, compute: Callable[[], None]) -> bool:
        """Plays TensorRT, which gives work to the driver and hands back whether that went well."""

        def kernel() -> None:
            self.kernels.append(name)
            self.work(seconds)
            compute()

        if self._capturing is None:
            kernel()
            return True
        if not self.capturable:
            self._broken_capture, self._last = True, NOT_WHILE_CAPTURING
            return False
        self._capturing.append(kernel)
        return True

    def array(self, address: int, shape: tuple[int, ...]) -> Any:
        raw = self.memory[address][: 4 * int(np.prod(shape))]
        return raw.view(np.float32).reshape(shape)

    def handle(self, out: Any, *_: Any) -> int:
        out._obj.value = next(self._handles)
        return 0

    def on_malloc(self, out: Any, size: Any) -> int:
        block = np.zeros(size.value + 8, np.uint8)
        out._obj.value = block.ctypes.data
        self.memory[block.ctypes.data] = block
        return 0

    def on_free(self, pointer: Any) -> int:
        del self.memory[pointer.value]
        return 0

    def on_copy(self, target: Any, source: Any, size: Any, *_: Any) -> int:
        ctypes.memmove(target.value, source.value, size.value)
        self.work(COPY_S)
        return self.nothing()

    def on_record(self, event: Any, _: Any) -> int:
        self._times[event.value] = self.now
        return self.nothing()

    def on_elapsed(self, out: Any, begin: Any, end: Any) -> int:
        out._obj.value = (self._times[end.value] - self._times[begin.value]) * 1e3
        return 0

    def on_begin(self, *_: Any) -> int:
        self._capturing = []
        return 0

    def on_end(self, _: Any, out: Any) -> int:
        kernels, self._capturing = self._capturing, None
        if kernels is None or self._broken_capture:
            self._broken_capture = False
            return INVALIDATED
        self.handle(out)
        self._graphs[out._obj.value] = kernels
        return 0

    def on_instantiate(self, out: Any, graph: Any, _: Any) -> int:
        self.handle(out)
        self._graphs[out._obj.value] = self._graphs[graph.value]
        return 0

    def on_launch(self, graph: Any, _: Any) -> int:
        for kernel in self._graphs[graph.value]:
            kernel()
        return self.nothing()

    def on_last(self) -> int:
        last, self._last = self._last, 0
        return last

    def on_count(self, out: Any) -> int:
        out._obj.value = 1
        return 0

    def on_properties(self, out: Any, _: Any) -> int:
        out._obj.name, out._obj.memory = b"Scripted GPU", 8 << 30
        return 0

    def on_attribute(self, out: Any, attribute: Any, _: Any) -> int:
        out._obj.value = {75: 8, 76: 7}[attribute.value]
        return 0

    def on_version(self, out: Any) -> int:
        out._obj.value = 12060
        return 0

    functions: ClassVar[dict[str, Callable[..., int]]] = {
        "cudaStreamCreateWithFlags": handle,
        "cudaEventCreate": handle,
        "cudaMalloc": on_malloc,
        "cudaMallocHost": on_malloc,
        "cudaFree": on_free,
        "cudaFreeHost": on_free,
        "cudaMemcpyAsync": on_copy,
        "cudaEventRecord": on_record,
        "cudaEventElapsedTime": on_elapsed,
        "cudaStreamBeginCapture": on_begin,
        "cudaStreamEndCapture": on_end,
        "cudaGraphInstantiateWithFlags": on_instantiate,
        "cudaGraphLaunch": on_launch,
        "cudaGetLastError": on_last,
        "cudaGetDeviceCount": on_count,
        "cudaGetDeviceProperties": on_properties,
        "cudaDeviceGetAttribute": on_attribute,
        "cudaRuntimeGetVersion": on_version,
        "cudaDriverGetVersion": on_version,
    }


@dataclass
class ScriptedEngine:
    """What TensorRT gives: something that can be put on a stream, here a function of arrays with a price.

    It knows its arrays by address and shape only, as TensorRT does.
    """

    gpu: ScriptedGpu
    name: str
    seconds: float
    compute: Callable[[Any], list[Any]]
    feed: tuple[int, tuple[int, ...]]
    results: list[tuple[int, tuple[int, ...]]]
    refuses: list[bool] = field(default_factory=list)

    def execute_async_v3(self, stream: int) -> bool:
        assert stream
        if self.refuses and self.refuses.pop(0):
            return False
        return self.gpu.enqueue(self.name, self.seconds, self._run)

    def _run(self) -> None:
        made = self.compute(self.gpu.array(*self.feed))
        for place, value in zip(self.results, made, strict=True):
            self.gpu.array(*place)[...] = value


def first_half(images: Any) -> list[Any]:
    return [images * 2, np.stack([images.sum(axis=(1, 2, 3)) * factor for factor in (1, 0, -1)], axis=1)]


def second_half(features: Any) -> list[Any]:
    return [np.stack([features.max(axis=(1, 2, 3)) + index for index in range(CLASSES)], axis=1)]


def opened(gpu: ScriptedGpu, seconds: float = 1e-3, name: str = "c", thresholds: tuple[float, ...] = ()) -> Any:
    """Returns an artifact of scripted engines: one stage, or two with an exit."""
    stream = TimedStream(Cuda(gpu))

    def load(shape: tuple[int, ...]) -> list[EngineStage]:
        feed, logits = Buffer(stream.cuda, shape, np.float32), (shape[0], CLASSES)
        if not thresholds:
            return [stage(feed, [logits], lambda images: first_half(images)[1:], name)]
        first = stage(feed, [shape, logits], first_half, name)
        return [first, stage(first.results[0], [logits], second_half, name.upper())]

    def stage(feed: Buffer, shapes: list[Any], compute: Any, label: str) -> EngineStage:
        results = [Buffer(stream.cuda, shape, np.float32) for shape in shapes]
        places = [(buffer.address, buffer.shape) for buffer in (feed, *results)]
        engine = ScriptedEngine(gpu, label, seconds, compute, places[0], places[1:])
        return EngineStage(stream, engine, feed, results)

    return OpenedEngines(load, stream, thresholds, lambda engine: [], lambda: gpu.now)


@pytest.fixture
def gpu() -> ScriptedGpu:
    return ScriptedGpu()


@pytest.fixture
def pictures() -> Any:
    return np.random.default_rng(0).normal(size=(6, 1, 2, 2)).astype(np.float32)


def one_line(error: pytest.ExceptionInfo[Any]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert ", got" in text
    assert "; " in text
    return text


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
    assert network.graph_refusals == ()


def test_without_a_graph_it_runs_on_and_says_so(gpu: ScriptedGpu, pictures: Any) -> None:
    gpu.capturable = False
    network = opened(gpu)
    logits, _ = network.answer(pictures, 6)
    np.testing.assert_allclose(logits, first_half(pictures)[1], rtol=1e-6)
    assert "cudaGraphLaunch" not in gpu.log
    (refusal,) = network.graph_refusals
    assert WORDS[NOT_WHILE_CAPTURING] in refusal


def test_a_graph_that_cannot_be_made_is_a_fallback_too(gpu: ScriptedGpu, pictures: Any) -> None:
    gpu.script["cudaGraphInstantiateWithFlags"] = [801]
    network = opened(gpu)
    network.answer(pictures, 6)
    assert len(network.graph_refusals) == 1


def test_gpu_time_spans_copies_and_kernels(gpu: ScriptedGpu, pictures: Any) -> None:
    network = opened(gpu, seconds=3e-3)
    network.seconds(pictures, 1)
    for on_gpu, wall in network.seconds_on_gpu_and_wall(pictures, 4):
        assert on_gpu == pytest.approx(3e-3 + 2 * COPY_S, rel=1e-3)
        assert wall == pytest.approx(on_gpu, rel=1e-3)


@pytest.mark.parametrize(
    "speed",
    [lambda _: 1.0, lambda now: 1.0 + now / 5, lambda now: 1.3 if int(now / 0.037) % 2 else 1.0],
    ids=["steady", "slows down", "two speeds"],
)
def test_a_drifting_gpu_does_not_move_the_ratio(speed: Any, pictures: Any) -> None:
    gpu = ScriptedGpu(speed)
    candidate, reference = opened(gpu, 3e-3 - 2 * COPY_S), opened(gpu, 2e-3 - 2 * COPY_S, "r")
    protocol = Protocol(limit_s=1e9)
    turns = candidate.turns(pictures, [TimedBatch(0, 4)], reference, 1, protocol)
    assert time_pair(turns, [1.0], protocol, lambda: gpu.now).ratio == pytest.approx(1.5, rel=0.02)


def test_both_sides_are_warm_before_they_take_turns(gpu: ScriptedGpu, pictures: Any) -> None:
    candidate, reference = opened(gpu), opened(gpu, name="r")
    take_turn = candidate.turns(pictures, [TimedBatch(0, 4)], reference, 1, Protocol())
    assert gpu.now > 0.2
    gpu.kernels.clear()
    for first in (True, False):
        take_turn(first)
    assert "".join(gpu.kernels) == "ccrr" + "rrcc"


def test_the_longest_path_passes_every_exit(gpu: ScriptedGpu, pictures: Any) -> None:
    candidate, reference = opened(gpu, thresholds=(0.0,)), opened(gpu, name="r")
    batches = [TimedBatch(0, 1), TimedBatch(0, 1, longest=True)]
    turn = candidate.turns(pictures, batches, reference, 1, Protocol())(True)
    alone = 1e-3 + 2 * COPY_S
    assert turn.ratios == pytest.approx([1.0, (alone + 1e-3 + COPY_S) / alone], rel=1e-3)


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
    take_turn = candidate.turns(pictures, [TimedBatch(0, 4)], reference, 1, Protocol())
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


@pytest.mark.parametrize("version", ["8.6.1", "10.2.0", "12.0.0.1"])
def test_other_versions_of_tensorrt_are_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__=version))
    reason = TensorRT.missing()
    assert reason is not None
    assert f"got {version}; pip install" in reason


def test_no_tensorrt_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    reason = TensorRT.missing()
    assert reason is not None
    assert "pip install" in reason


class ScriptedTensorRT(SimpleNamespace):
    """A tensorrt module whose engines run on a scripted GPU; a stage's file is `first`, `second` or the like."""

    __version__ = "10.9.0.34"
    IProfiler = type("IProfiler", (), {})
    ILogger = type("ILogger", (), {"Severity": SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2)})
    NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
    BuilderFlag = SimpleNamespace(TF32="TF32", SPARSE_WEIGHTS="SPARSE_WEIGHTS")
    ProfilingVerbosity = SimpleNamespace(DETAILED="DETAILED")
    LayerInformationFormat = SimpleNamespace(JSON=1)
    information = "{}"

    def __init__(self, gpu: ScriptedGpu) -> None:
        super().__init__(gpu=gpu, says="", configs=[])
        self.nptype = lambda datatype: datatype

    def Builder(self, log: Any) -> Any:  # noqa: N802
        def build(network: Any, config: Any) -> bytes | None:
            if self.says:
                log.log(1, self.says)
                return None
            self.configs.append(config)
            return bytes(network.stage)

        profile = SimpleNamespace(set_shape=lambda name, *shapes: profile.__dict__.update({name: shapes}))
        return SimpleNamespace(
            create_network=lambda flags: SimpleNamespace(num_inputs=1, flags=flags),
            create_builder_config=self.config,
            create_optimization_profile=lambda: profile,
            build_serialized_network=build,
        )

    def config(self) -> Any:
        made = SimpleNamespace(cleared=[], set=[], profiles=[], timings=None)
        made.set_flag = made.set.append
        made.clear_flag, made.add_optimization_profile = made.cleared.append, made.profiles.append
        made.create_timing_cache = lambda stored: SimpleNamespace(stored=stored, serialize=lambda: stored + b"t")
        made.set_timing_cache = lambda timings, _: made.__dict__.update(timings=timings) or True
        made.get_timing_cache = lambda: made.timings
        return made

    def OnnxParser(self, network: Any, log: Any) -> Any:  # noqa: N802
        def parse(stage: bytes) -> bool:
            names = {b"first": ["features", "logits"]}.get(stage, ["logits"])
            network.stage, network.num_outputs = stage, len(names)
            network.get_input = lambda _: SimpleNamespace(name="in", shape=(-1, -1, -1, -1))
            network.get_output = lambda index: SimpleNamespace(name=names[index])
            return stage != b"bad"

        error = SimpleNamespace(node_name=lambda: "/a/Bogus", node_operator=lambda: "Bogus", desc=lambda: "no importer")
        return SimpleNamespace(parse=parse, num_errors=1, get_error=lambda _: error)

    def Runtime(self, log: Any) -> Any:  # noqa: N802
        context = lambda plan: ScriptedContext(self.gpu, bytes(plan))  # noqa: E731
        return SimpleNamespace(
            deserialize_cuda_engine=lambda plan: SimpleNamespace(
                create_execution_context=lambda: context(plan),
                get_tensor_dtype=lambda _: np.float32,
                create_engine_inspector=lambda: SimpleNamespace(get_engine_information=lambda _: self.information),
            )
        )


class ScriptedContext:
    """An execution context, which learns its shape and addresses before it runs."""

    def __init__(self, gpu: ScriptedGpu, plan: bytes) -> None:
        self._gpu, self._plan = gpu, plan
        self._shape: tuple[int, ...] = ()
        self._addresses: dict[str, int] = {}
        self.profiler: Any = None

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shape = shape
        return name == "in"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (self._shape[0], CLASSES) if name == "logits" else self._shape

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        compute = first_half if self._plan == b"first" else second_half
        names = [name for name in self._addresses if name != "in"]
        places = [(self._addresses[name], self.get_tensor_shape(name)) for name in ("in", *names)]
        if self.profiler is not None:
            self.profiler.report_layer_time("/stem/Conv", 1.0)
        return ScriptedEngine(self._gpu, "c", 1e-3, compute, places[0], places[1:]).execute_async_v3(stream)


@pytest.fixture
def scripted(gpu: ScriptedGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    def load(name: str) -> ScriptedGpu:
        return gpu

    module = ScriptedTensorRT(gpu)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.setenv("DEPLOYFRONT_CACHE", str(tmp_path))
    trt._log.cache_clear()
    yield module
    trt._log.cache_clear()


def test_the_runtime_builds_loads_and_chains_its_stages(scripted: Any, pictures: Any, tmp_path: Path) -> None:
    assert TensorRT.missing() is None
    runtime = TensorRT()
    assert runtime.device() == "Scripted GPU"
    assert runtime.capabilities().precisions == ("fp32", "fp16", "int8")
    logits, exits = runtime.open([b"first", b"second"], [0.8], 1).answer(pictures, 1)
    wanted, left = StagedNetwork([first_half, second_half], [0.8])(pictures)
    np.testing.assert_array_equal(exits, left)
    np.testing.assert_allclose(logits, wanted, rtol=1e-6)
    assert all(config.cleared == ["TF32"] for config in scripted.configs)
    assert all(config.profiling_verbosity == "DETAILED" for config in scripted.configs)
    assert [vars(config.profiles[0])["in"] for config in scripted.configs] == [((1, 1, 2, 2),) * 3] * 2
    (file,) = (tmp_path / "tensorrt").iterdir()
    assert file.read_bytes() == b"tt"


def test_the_same_stage_is_built_once_for_each_batch_size(scripted: Any, pictures: Any) -> None:
    runtime = TensorRT()
    for _ in range(3):
        runtime.open([b"second"], [], 1).answer(pictures, 2)
    runtime.open([b"second"], [], 1).answer(pictures, 3)
    assert len(scripted.configs) == 2


def test_a_bundle_gets_the_engines_and_hears_of_refused_graphs(scripted: Any, pictures: Any) -> None:
    runtime = TensorRT()
    files = runtime.extras([b"first", b"second"], pictures[:2])
    told = json.loads(files.pop("engines.json"))
    assert files == {"stage1.engine": b"first", "stage2.engine": b"second"}
    assert [engine["file"] for engine in told["engines"]] == list(files)
    assert told["timing_cache"].startswith("timing-")
    assert [engine["seconds"] for engine in told["engines"]] == [{"/stem/Conv": pytest.approx(1e-3)}] * 2
    assert len(scripted.configs) == 2
    assert runtime.remarks() == []
    scripted.gpu.capturable = False
    for batch in (1, 3):
        runtime.open([b"second"], [], 1).answer(pictures, batch)
    (remark,) = runtime.remarks()
    assert "without" in remark


def test_an_artifact_tells_which_layers_run_in_another_precision(scripted: Any, pictures: Any) -> None:
    scripted.information = json.dumps({"Layers": [layer("/stem/Conv + /stem/Relu", v11("Int8"), v11("Int8"), "Int8")]})
    opened = TensorRT().open([b"second"], [], 1)
    assert opened.differences(pictures[:1], {"/stem/Conv": "int8"}) == []
    assert len(opened.differences(pictures[:1], {"/stem/Conv": "fp32"})) == 2


@pytest.mark.parametrize(
    ("says", "kind", "words"),
    [
        ("Error Code 10: Could not find any\nimplementation for node /a/Conv", trt.EngineError, "node /a/Conv"),
        ("Error Code 1: Cuda Runtime (out of memory)", OutOfDeviceMemoryError, "smaller batch"),
        ("", trt.EngineError, "node '/a/Bogus' (Bogus): no importer"),
    ],
)
def test_what_tensorrt_refuses_is_one_clear_line(
    scripted: Any, pictures: Any, says: str, kind: Any, words: str
) -> None:
    scripted.says = says
    with pytest.raises(kind) as error:
        TensorRT().open([b"second" if says else b"bad"], [], 1).answer(pictures, 2)
    assert words in one_line(error)


INT8_10 = "Thirty-two wide channel vectorized row major Int8 format"
FP32_10 = "Row major linear FP32"
FP16_10 = "Channel major FP16 format where channel % 8 == 0"


def layer(name: str, source: Any, result: Any, weights: str | None = None, kind: str = "CaskConvolution") -> Any:
    """Returns one layer as the inspector writes it, its tensors' fields as that version has them."""
    tensors = {"Inputs": [{"Name": "in", **source}], "Outputs": [{"Name": "out", **result}]}
    told = {"Weights": {"Type": weights, "Count": 432}} if weights else {}
    return {"Name": name, "LayerType": kind, **tensors, **told, "TacticName": "t", "StreamId": 0, "Metadata": ""}


def v10(text: str) -> dict[str, Any]:
    return {"Location": "Device", "Dimensions": [4, 16, 8, 8], "Format/Datatype": text}


def v11(datatype: str) -> dict[str, Any]:
    return {"Location": "Device", "Dimensions": [4, 16, 8, 8], "Format": "Row major linear", "DataType": datatype}


TEN = [
    layer("Reformatting CopyNode for Input Tensor 0 to /stem/Conv", v10(FP32_10), v10(INT8_10), None, "Reformat"),
    layer("/stem/Conv + /stem/Relu", v10(INT8_10), v10(INT8_10), "Int8"),
    layer("/inner/Conv", v10(FP16_10), v10(FP16_10), "Half"),
    layer("/head/Gemm", v10("N/A due to dynamic shapes"), v10(FP32_10), "Float", "MatrixMultiply"),
]
ELEVEN = [
    layer("Reformatting CopyNode for Input Tensor 0 to /stem/Conv", v11("Float"), v11("Int8"), None, "Reformat"),
    layer("/stem/Conv + /stem/Relu", v11("Int8"), v11("Int8"), "Int8"),
    layer("/inner/Conv", v11("Half"), v11("Half"), "Half"),
    layer("/head/Gemm", v11("Float"), v11("Float"), "Float", "MatrixMultiply"),
]


def rows(layers: Any) -> Any:
    return trt_report.layer_rows(json.dumps({"Layers": layers, "Bindings": ["images", "logits"]}))


@pytest.mark.parametrize("layers", [TEN, ELEVEN], ids=["10", "11"])
def test_both_forms_of_the_inspector_are_read(layers: Any) -> None:
    found = rows(layers)
    assert [row.kind for row in found] == ["Reformat", "CaskConvolution", "CaskConvolution", "MatrixMultiply"]
    assert [row.inputs for row in found[:3]] == [("fp32",), ("int8",), ("fp16",)]
    assert [row.weights for row in found] == [None, "int8", "fp16", "fp32"]
    assert found[-1].outputs == ("fp32",)


def test_precisions_that_are_as_asked_leave_nothing_to_report() -> None:
    asked = {"/stem/Conv": "int8", "/inner/Conv": "fp16", "/head/Gemm": "fp32"}
    assert trt_report.precision_report(rows(ELEVEN), asked) == []


def test_every_mismatch_is_told_in_words() -> None:
    asked = {"/stem/Conv": "fp16", "/inner/Conv": "fp16", "/gone/Conv": "int8", "/ste": "int8"}
    found = trt_report.precision_report(rows(TEN), asked)
    where = "in '/stem/Conv + /stem/Relu' (CaskConvolution)"
    assert found == [
        f"/stem/Conv: asked for fp16, but reads int8 {where}",
        f"/stem/Conv: asked for fp16, but has int8 weights {where}",
        "/gone/Conv: asked for int8, but no layer of the engine names it",
        "/ste: asked for int8, but no layer of the engine names it",
    ]


def test_what_is_inside_a_fused_region_is_not_taken_for_a_proof() -> None:
    region = layer("{ForeignNode[/a/Conv.../b/Gemm]}", v11("Int8"), v11("Float"), None, "Myelin")
    region["Metadata"] = "[ONNX Layer: /a/Conv]\x1e[ONNX Layer: /b/Gemm]"
    (line,) = trt_report.precision_report(rows([region]), {"/a/Conv": "int8"})
    assert "fused region" in line


def test_an_engine_without_detailed_profiling_is_refused() -> None:
    with pytest.raises(trt_report.InspectionError) as error:
        rows(["/stem/Conv + /stem/Relu"])
    assert "DETAILED" in one_line(error)


@pytest.mark.parametrize(
    ("text", "precision"),
    [("BFloat16", "bf16"), ("BF16", "bf16"), ("FP8", "fp8"), ("Int64", "int64"), ("Int32", "int32"), ("", None)],
)
def test_datatypes_whose_names_contain_others(text: str, precision: str | None) -> None:
    assert trt_report.precision_of(text) == precision


def tool(folder: Path, name: str, output: str, code: int = 0) -> None:
    (folder / name).write_text(f"#!/bin/sh\necho '{output}'\nexit {code}\n")
    (folder / name).chmod(0o755)


def test_the_state_of_a_discrete_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool(tmp_path, "nvidia-smi", "1980, 2619, 41, 120.50, P0")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert trt_report.state(tmp_path) == trt_report.DeviceState(1.98e9, 2.619e9, 41.0, 120.5, "P0")


def test_the_state_of_a_jetson(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool(tmp_path, "nvidia-smi", "[N/A], [N/A], [N/A], [N/A], [N/A]")
    tool(tmp_path, "nvpmodel", "NV Power Mode: MAXN")
    clock, zone = tmp_path / "class/devfreq/17000000.gpu", tmp_path / "class/thermal/thermal_zone1"
    for folder in (clock, zone):
        folder.mkdir(parents=True)
    (clock / "cur_freq").write_text("624750000\n")
    (zone / "type").write_text("gpu-thermal\n")
    (zone / "temp").write_text("48500\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert trt_report.state(tmp_path) == trt_report.DeviceState(624.75e6, None, 48.5, None, "MAXN")


def test_no_tools_or_broken_ones_leave_the_state_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert trt_report.state(tmp_path) == trt_report.DeviceState()
    tool(tmp_path, "nvidia-smi", "no devices were found", code=9)
    tool(tmp_path, "nvpmodel", "", code=1)
    assert trt_report.state(tmp_path) == trt_report.DeviceState()


def test_a_state_that_moved_is_told_and_one_that_did_not_is_not() -> None:
    before = trt_report.DeviceState(1.5e9, 2e9, 50.0, 30.0, "MAXN")
    assert trt_report.state_moved(before, trt_report.DeviceState(1.49e9, 2e9, 55.0, 31.0, "MAXN")) == []
    moved = trt_report.state_moved(before, trt_report.DeviceState(1.0e9, 2e9, 65.0, 31.0, "15W"))
    assert [word for line in moved for word in ("1000 MHz", "65 degrees", "'15W'") if word in line] == [
        "1000 MHz",
        "65 degrees",
        "'15W'",
    ]
    assert trt_report.state_moved(trt_report.DeviceState(), before)[0].startswith("the power mode")
