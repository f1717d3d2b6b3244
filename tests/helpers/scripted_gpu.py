"""A GPU that follows a script: a libcudart whose memory is this process's, and engines with a price."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pytest

from evaluators.runtimes.tensorrt_gpu.cuda import (
    Buffer,
    Cuda,
    TimedStream,
)
from evaluators.runtimes.tensorrt_gpu.engines import EngineSession, EngineStage

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
        self.launch_s = 0.0  # what the host takes to launch an engine without a graph
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
            self.now += self.launch_s
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
    """An engine as TensorRT returns it, here a function of arrays that takes a given time.

    It has only the addresses and shapes of its arrays, as in TensorRT.
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
        return [first, stage(first.outputs[0], [logits], second_half, name.upper())]

    def stage(feed: Buffer, shapes: list[Any], compute: Any, label: str) -> EngineStage:
        results = [Buffer(stream.cuda, shape, np.float32) for shape in shapes]
        places = [(buffer.address, buffer.shape) for buffer in (feed, *results)]
        engine = ScriptedEngine(gpu, label, seconds, compute, places[0], places[1:])
        return EngineStage(stream, engine, feed, results)

    return EngineSession(load, stream, thresholds, lambda engine: [], lambda: gpu.now)


def one_line(error: pytest.ExceptionInfo[Any]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert ", got" in text
    assert "; " in text
    return text
