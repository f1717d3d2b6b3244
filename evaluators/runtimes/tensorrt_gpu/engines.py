"""Runs and times engines with their buffers; exits are decided on the host.

Nothing here imports tensorrt: an engine is anything whose execution context can be enqueued on a stream.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from evaluators.inference.resizing import resized
from evaluators.inference.staged import Routes, StagedNetwork, Steps, longest
from evaluators.runtimes.base import Images, Proof, Spent, TargetError, TimedBatch
from evaluators.runtimes.local import frame_call
from evaluators.runtimes.paired_timing import Call, Clock, TakeTurn, TimingProtocol, turns_of
from evaluators.runtimes.tensorrt_gpu.cuda import Buffer, CaptureError, CudaError, Handle, TimedStream
from evaluators.runtimes.tensorrt_gpu.inspector import LayerRow, precision_proof

if TYPE_CHECKING:
    from evaluators.data import ImageStore

# tensorrt has no types: these are its classes' names, as in runtime.py.
ICudaEngine: TypeAlias = Any
IExecutionContext: TypeAlias = Any

Shape: TypeAlias = tuple[int, ...]

_WARMUP_S = 0.2
_LAUNCHES = 20
"""The number of timed calls with a CUDA graph, and as many without, alternating."""

WITH_GRAPH, WITHOUT_GRAPH = "with CUDA graph", "without CUDA graph"


class EngineError(TargetError):
    """TensorRT cannot build or load a stage."""


@dataclass(frozen=True)
class SerializedEngine:
    """An engine as a file.

    Args:
        content: as TensorRT serializes it.
        input: name of the input tensor.
        outputs: names of the output tensors, in the order of the ONNX file.
    """

    content: bytes
    input: str
    outputs: tuple[str, ...]


class DeviceFeatures:
    """Features of a batch in device memory; they are copied to the host only if some images of the batch leave.

    Args:
        buffer: holds them.
        count: number of rows that are not padding.
        stream: writes them.
    """

    def __init__(self, buffer: Buffer, count: int, stream: TimedStream) -> None:
        self.buffer = buffer
        self._count = count
        self._stream = stream

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, selected: NDArray[np.bool_]) -> "DeviceFeatures | Images":
        """Returns the selected rows: still on the device if all are selected, else copied to the host."""
        if selected.all():
            return self
        if not selected.any():
            return np.empty((0, *self.buffer.shape[1:]), dtype=np.float32)
        self.buffer.download(self._stream.stream)
        self._stream.finish()
        return np.array(self.buffer.host[: self._count][selected])


class EngineStage:
    """An engine with its buffers: a function from a batch to `[features, logits]`, or to `[logits]`.

    Features stay on the device, in the buffer that the next stage reads.

    Args:
        stream: where it runs.
        context: enqueues the engine; it has the buffers' addresses.
        input_buffer: holds its input.
        outputs: buffers of its outputs.
        engine: for the inspector.
    """

    def __init__(
        self,
        stream: TimedStream,
        context: IExecutionContext,
        input_buffer: Buffer,
        outputs: Sequence[Buffer],
        engine: ICudaEngine = None,
    ) -> None:
        self.engine = engine
        self.outputs = tuple(outputs)
        self.graph_error: str | None = None
        self.uses_graph = True
        self._stream = stream
        self._input = input_buffer
        self.context: IExecutionContext = context
        self.run_without_graph()  # TensorRT initializes itself in the first run, which cannot be captured
        self._graph = self._capture()

    def __call__(self, batch: "Images | DeviceFeatures") -> list[Any]:
        """Returns the outputs for a batch, which may be smaller than the engine's: it is padded with zeros."""
        count, stream = len(batch), self._stream.stream
        if not (isinstance(batch, DeviceFeatures) and batch.buffer is self._input):
            self._input.host[:count] = batch
            self._input.host[count:] = 0
            self._stream.start()
            self._input.upload(stream)
        self._launch()
        *features, logits = self.outputs
        logits.download(stream)
        self._stream.finish()
        answers = logits.host[:count].astype(np.float32)
        return [*(DeviceFeatures(feature, count, self._stream) for feature in features), answers]

    def all_outputs(self, batch: Images) -> list[Images]:
        """Returns all outputs, on the host, for a batch of the engine's size."""
        self._input.host[:] = batch
        self._input.upload(self._stream.stream)
        self._launch()
        for output in self.outputs:
            output.download(self._stream.stream)
        self._stream.finish()
        return [output.host.astype(np.float32) for output in self.outputs]

    def run_without_graph(self) -> None:
        """Runs the engine on the contents of its buffers, without a CUDA graph.

        Raises:
            CudaError: it cannot be enqueued, or did not finish.
        """
        self._enqueue()
        self._stream.finish()

    def _enqueue(self) -> None:
        if not self.context.execute_async_v3(self._stream.stream.value):
            self._stream.cuda.raise_last()
            raise CudaError("TensorRT runs what it has built, got a refusal without a reason; build it again")

    def _capture(self) -> Handle | None:
        """Returns the engine as a CUDA graph; None, with the reason in `graph_error`, if it cannot be captured."""
        try:
            return self._stream.cuda.capture(self._stream.stream, self._enqueue)
        except CaptureError as error:
            self.graph_error = str(error)
            return None

    def _launch(self) -> None:
        if self._graph is not None and self.uses_graph:
            self._stream.cuda.launch(self._graph, self._stream.stream)
        else:
            self._enqueue()


class EngineSession:
    """An artifact whose stages are engines on this machine's GPU.

    Calls are serial and each waits for its answer, so a call's time is a latency. With exits, the host decides after
    every stage.

    Args:
        load: returns the stages for inputs of a shape, `(n, c, h, w)`.
        stream: where they run.
        thresholds: the confidence from which each exit answers.
        inspect: returns the layers of an engine.
        wall: a clock, in seconds.
        confidence: measure of confidence: `softmax`, `margin` or `entropy`.
        input_size: height and width that images are resized to, before anything is timed; None for their own.
    """

    def __init__(
        self,
        load: Callable[[Shape], Sequence[EngineStage]],
        stream: TimedStream,
        thresholds: Sequence[float],
        inspect: Callable[[ICudaEngine], Sequence[LayerRow]],
        wall: Callable[[], float] = time.perf_counter,
        confidence: str = "softmax",
        input_size: int | None = None,
    ) -> None:
        self._input_size = input_size
        self.gpu_s = 0.0  # total of all calls so far, copies included
        self._load = load
        self._stream = stream
        self._wall = wall
        self._inspect = inspect
        self._thresholds = tuple(thresholds)
        self._confidence = confidence
        self._loaded: dict[Shape, Sequence[EngineStage]] = {}

    @property
    def graph_errors(self) -> tuple[str, ...]:
        """The reasons why stages run without a CUDA graph; empty if all of them have one."""
        return tuple(stage.graph_error for stages in self._loaded.values() for stage in stages if stage.graph_error)

    def stages(self, shape: Shape) -> Sequence[EngineStage]:
        """Returns the stages for inputs of a shape, loaded at the first call with that shape."""
        if shape not in self._loaded:
            self._loaded[shape] = self._load(shape)
        return self._loaded[shape]

    def answer(self, images: "ImageStore", batch: int) -> tuple[Images, Routes]:
        """Returns the logits `(n, classes)` and the exit `(n,)` that gave them, computed `batch` images at a time."""
        starts = range(0, len(images), batch)
        parts = [self._run(self._batch(images, start, start + batch), batch) for start in starts]
        return np.concatenate([logits for logits, _ in parts]), np.concatenate([exits for _, exits in parts])

    def all_logits(self, images: "ImageStore", batch: int) -> Images:
        """Returns the logits of every exit and, last, of the end, `(n, exits + 1, classes)`: no image leaves early."""
        network = self._network(self._batch(images, 0, 1).shape, batch)
        starts = range(0, len(images), batch)
        return np.concatenate([network.all_logits(self._batch(images, start, start + batch)) for start in starts])

    def _batch(self, images: "ImageStore", start: int, end: int) -> Images:
        """Returns images as the first engine takes them."""
        return resized(images[start:end], self._input_size)

    def seconds(self, images: Images, calls: int) -> list[Spent]:
        """Returns the GPU time and the wall-clock time of each of `calls` runs on one batch."""
        batch = self._batch(images, 0, len(images))
        return [self._timed_run(batch) for _ in range(calls)]

    def launches(self, images: Images) -> dict[str, float]:
        """Returns the median wall-clock seconds of a batch with and without a CUDA graph, on the longest path.

        A graph is deployed wherever one can be captured: the host then launches once instead of once for each kernel.
        Where none can be captured, there is only the time without.
        """
        images = self._batch(images, 0, len(images))
        stages = self.stages(images.shape)
        modes = {WITHOUT_GRAPH: False} if self.graph_errors else {WITH_GRAPH: True, WITHOUT_GRAPH: False}
        seconds: dict[str, list[float]] = {mode: [] for mode in modes}
        try:
            for _ in range(_LAUNCHES):
                for mode, uses_graph in modes.items():
                    for stage in stages:
                        stage.uses_graph = uses_graph
                    seconds[mode].append(self._timed_run(images, longest(self._thresholds)).wall)
        finally:
            for stage in stages:
                stage.uses_graph = True
        return {mode: float(np.median(values)) for mode, values in seconds.items()}

    def turns(
        self,
        images: "ImageStore",
        batches: Sequence[TimedBatch],
        reference: "EngineSession",
        reference_batch: int,
        protocol: TimingProtocol,
    ) -> TakeTurn:
        """Returns turns, timed by the GPU, between some batches and the reference, after a warm-up."""
        calls = [self._call(images, batch) for batch in batches]
        reference_call = reference._call(images, TimedBatch(0, reference_batch))
        begin = self._wall()
        while self._wall() - begin < _WARMUP_S:  # the GPU leaves its idle clocks, as in trtexec
            calls[0]()
            reference_call()
        clock = Clock(lambda: self.gpu_s + reference.gpu_s, self._wall)
        return turns_of(calls, reference_call, protocol, clock, [batch.share for batch in batches])

    def proof(self, images: Images, precisions: Mapping[str, str]) -> Proof:
        """Returns the layers that run in another precision than requested, and those whose precision is unknown."""
        rows = [
            row
            for stage in self.stages(self._batch(images, 0, len(images)).shape)
            for row in self._inspect(stage.engine)
        ]
        return precision_proof(rows, precisions)

    def _call(self, images: "ImageStore", batch: TimedBatch) -> Call:
        timed = self._batch(images, batch.start, batch.start + batch.count)
        self.stages((batch.count, *timed.shape[1:]))  # loads the engines before the timing
        plan = batch.path_plan(self._thresholds)
        if batch.follows is not None:
            return frame_call(lambda: self._run(timed, 1, plan), images, batch)
        return lambda: self._run(timed, batch.count, plan)

    def _timed_run(self, images: Images, plan: Steps | None = None) -> Spent:
        gpu, wall = self.gpu_s, self._wall()
        self._run(images, len(images), plan)
        return Spent(self.gpu_s - gpu, self._wall() - wall)

    def _network(self, shape: Shape, batch: int, plan: Steps | None = None) -> StagedNetwork:
        stages: Sequence[Any] = self.stages((batch, *shape[1:]))
        return StagedNetwork(stages, self._thresholds if plan is None else plan, self._confidence)

    def _run(self, images: Images, batch: int, plan: Steps | None = None) -> tuple[Images, Routes]:
        network = self._network(images.shape, batch, plan)
        self._stream.restart()
        answer = network(images)
        self.gpu_s += self._stream.elapsed_s()
        return answer


def layer_seconds(stage: EngineStage, profiler: Any, runs: int = 20) -> dict[str, float]:
    """Returns the median seconds of each layer, from separate runs, because profiling slows all layers down.

    Args:
        stage: the loaded engine.
        profiler: a TensorRT profiler that collects the times of each layer in `seconds`.
        runs: number of runs.
    """
    context: IExecutionContext = stage.context
    context.profiler = profiler
    try:
        for _ in range(runs):
            stage.run_without_graph()
    finally:
        context.profiler = None
    return {name: float(np.median(seconds)) for name, seconds in profiler.seconds.items()}
