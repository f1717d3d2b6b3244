"""Engines with their buffers: run, gated on the host and timed, whatever has built them.

Nothing here imports tensorrt: an engine is what can be put on a stream.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from evaluators.inference.staged import Routes, StagedNetwork, Steps, longest
from evaluators.runtimes.base import Images, Proof, Spent, TargetError, TimedBatch
from evaluators.runtimes.local import frame_call
from evaluators.runtimes.paired_timing import Call, Clock, TakeTurn, TimingProtocol, turns_of
from evaluators.runtimes.tensorrt_gpu.cuda import Buffer, CaptureError, CudaError, Handle, TimedStream
from evaluators.runtimes.tensorrt_gpu.inspector import LayerRow, precision_proof

if TYPE_CHECKING:
    from evaluators.data import ImageStore

# tensorrt has no types: these are its classes' names, as in trt.py.
ICudaEngine: TypeAlias = Any
IExecutionContext: TypeAlias = Any

Shape: TypeAlias = tuple[int, ...]

_WARMUP_S = 0.2
_LAUNCHES = 20
"""So many calls of each way to launch a batch are timed, in turn."""

WITH_GRAPH, WITHOUT_GRAPH = "with CUDA graph", "without CUDA graph"


class EngineError(TargetError):
    """A stage that TensorRT refuses to build or to load."""


@dataclass(frozen=True)
class Plan:
    """A serialized engine, and the names of its input and outputs in the order of the file it was built from."""

    engine: bytes
    source: str
    results: tuple[str, ...]


class Resident:
    """Features that stay on the device as long as all or none of their batch go on.

    Args:
        buffer: holds them.
        count: of its rows that are not padding.
        stream: that writes them.
    """

    def __init__(self, buffer: Buffer, count: int, stream: TimedStream) -> None:
        self.buffer = buffer
        self._count = count
        self._stream = stream

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, chosen: NDArray[np.bool_]) -> "Resident | Images":
        """Returns the rows that are chosen: these themselves where all are, else copied to the host."""
        if chosen.all():
            return self
        if not chosen.any():
            return np.empty((0, *self.buffer.shape[1:]), dtype=np.float32)
        self.buffer.download(self._stream.stream)
        self._stream.finish()
        return np.array(self.buffer.host[: self._count][chosen])


class EngineStage:
    """An engine with its buffers: a function from a batch to `[features, logits]`, or to `[logits]`.

    Features stay on the device, in the buffer that the next stage reads.

    Args:
        stream: where it runs.
        context: enqueues the engine; it knows the buffers' addresses.
        feed: its input.
        results: its outputs.
        engine: what can be inspected.
    """

    def __init__(
        self,
        stream: TimedStream,
        context: IExecutionContext,
        feed: Buffer,
        results: Sequence[Buffer],
        engine: ICudaEngine = None,
    ) -> None:
        self.engine = engine
        self.results = tuple(results)
        self.graph_refusal: str | None = None
        self.avoids_graph = False
        self._stream, self._feed = stream, feed
        self.context: IExecutionContext = context
        self.run_plainly()  # TensorRT sets itself up in the first run, which no graph may hold
        self._graph = self._captured()

    def __call__(self, batch: "Images | Resident") -> list[Any]:
        """Returns the outputs for up to as many inputs as the engine was built for; the rest of it is padded."""
        count, stream = len(batch), self._stream.stream
        if not (isinstance(batch, Resident) and batch.buffer is self._feed):
            self._feed.host[:count] = batch
            self._feed.host[count:] = 0
            self._stream.start()
            self._feed.upload(stream)
        self._launch()
        *features, logits = self.results
        logits.download(stream)
        self._stream.finish()
        answers = logits.host[:count].astype(np.float32)
        return [*(Resident(feature, count, self._stream) for feature in features), answers]

    def everything(self, batch: Images) -> list[Images]:
        """Returns all outputs for as many inputs as the engine was built for."""
        self._feed.host[:] = batch
        self._feed.upload(self._stream.stream)
        self._launch()
        for result in self.results:
            result.download(self._stream.stream)
        self._stream.finish()
        return [result.host.astype(np.float32) for result in self.results]

    def run_plainly(self) -> None:
        """Runs the engine on what its buffers hold, without a graph.

        Raises:
            CudaError: it was refused, or did not finish.
        """
        self._enqueue()
        self._stream.finish()

    def _enqueue(self) -> None:
        if not self.context.execute_async_v3(self._stream.stream.value):
            self._stream.cuda.raise_last()
            raise CudaError("TensorRT runs what it has built, got a refusal without a reason; build it again")

    def _captured(self) -> Handle | None:
        try:
            return self._stream.cuda.capture(self._stream.stream, self._enqueue)
        except CaptureError as error:
            self.graph_refusal = str(error)
            return None

    def _launch(self) -> None:
        if self._graph is None or self.avoids_graph:
            self._enqueue()
        else:
            self._stream.cuda.launch(self._graph, self._stream.stream)


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
        confidence: what the gates ask for.
    """

    def __init__(
        self,
        load: Callable[[Shape], Sequence[EngineStage]],
        stream: TimedStream,
        thresholds: Sequence[float],
        inspect: Callable[[ICudaEngine], Sequence[LayerRow]],
        wall: Callable[[], float] = time.perf_counter,
        confidence: str = "softmax",
    ) -> None:
        self.gpu_s = 0.0  # of all calls so far, copies included
        self._load = load
        self._stream = stream
        self._wall = wall
        self._inspect = inspect
        self._thresholds, self._kind = tuple(thresholds), confidence
        self._loaded: dict[Shape, Sequence[EngineStage]] = {}

    @property
    def graph_refusals(self) -> tuple[str, ...]:
        """Why stages run without a CUDA graph; empty where all of them have one."""
        return tuple(stage.graph_refusal for stages in self._loaded.values() for stage in stages if stage.graph_refusal)

    def stages(self, shape: Shape) -> Sequence[EngineStage]:
        """Returns the stages for inputs of a shape, built when it is first asked for."""
        if shape not in self._loaded:
            self._loaded[shape] = self._load(shape)
        return self._loaded[shape]

    def answer(self, images: "ImageStore", batch: int) -> tuple[Images, Routes]:
        """Returns the logits `(n, classes)` and the exit `(n,)` that gave them, computed `batch` images at a time."""
        parts = [self._run(images[start : start + batch], batch) for start in range(0, len(images), batch)]
        return np.concatenate([logits for logits, _ in parts]), np.concatenate([exits for _, exits in parts])

    def all_logits(self, images: "ImageStore", batch: int) -> Images:
        """Returns what every exit and, last, the end says, `(n, exits + 1, classes)`: no image leaves early."""
        starts = range(0, len(images), batch)
        return np.concatenate([self._staged(images.shape, batch).all_logits(images[at : at + batch]) for at in starts])

    def seconds(self, images: Images, calls: int) -> list[Spent]:
        """Returns what each of `calls` runs on one batch took, by the GPU's clock and by the one on the wall."""
        return [self._spent(images) for _ in range(calls)]

    def launches(self, images: Images) -> dict[str, float]:
        """Returns the median wall-clock seconds of a batch with and without a CUDA graph, on the longest path.

        A graph is what is deployed wherever one can be captured: a single launch instead of one for each kernel, so
        that the host is out of the way. Where none can be, there is one way only.
        """
        stages = self.stages(images.shape)
        ways = {WITHOUT_GRAPH: True} if self.graph_refusals else {WITH_GRAPH: False, WITHOUT_GRAPH: True}
        taken: dict[str, list[float]] = {way: [] for way in ways}
        try:
            for _ in range(_LAUNCHES):
                for way, avoids in ways.items():
                    for stage in stages:
                        stage.avoids_graph = avoids
                    taken[way].append(self._spent(images, longest(self._thresholds)).wall)
        finally:
            for stage in stages:
                stage.avoids_graph = False
        return {way: float(np.median(seconds)) for way, seconds in taken.items()}

    def turns(
        self,
        images: "ImageStore",
        batches: Sequence[TimedBatch],
        reference: "EngineSession",
        reference_batch: int,
        protocol: TimingProtocol,
    ) -> TakeTurn:
        """Returns turns, by the GPU's clock, between some batches and the reference, warmed up."""
        calls = [self._call(images, batch) for batch in batches]
        reference_call = reference._call(images, TimedBatch(0, reference_batch))
        begin = self._wall()
        while self._wall() - begin < _WARMUP_S:  # until the GPU has left its idle clocks, as trtexec does
            calls[0](), reference_call()
        clock = Clock(lambda: self.gpu_s + reference.gpu_s, self._wall)
        return turns_of(calls, reference_call, protocol, clock, [batch.share for batch in batches])

    def proof(self, images: Images, precisions: Mapping[str, str]) -> Proof:
        """Returns which layers do not run in the precision that they were written in, or do not tell."""
        rows = [row for stage in self.stages(images.shape) for row in self._inspect(stage.engine)]
        return precision_proof(rows, precisions)

    def _call(self, images: "ImageStore", batch: TimedBatch) -> Call:
        chosen = images[batch.start : batch.start + batch.count]
        self.stages((batch.count, *images.shape[1:]))  # built before the clock runs
        plan = batch.path_plan(self._thresholds)
        if batch.follows is not None:
            key = images[batch.follows.key : batch.follows.key + 1]
            return frame_call(lambda frame: self._run(frame, 1, plan), key, chosen, batch.follows)
        return lambda: self._run(chosen, batch.count, plan)

    def _spent(self, images: Images, plan: Steps | None = None) -> Spent:
        gpu, wall = self.gpu_s, self._wall()
        self._run(images, len(images), plan)
        return Spent(self.gpu_s - gpu, self._wall() - wall)

    def _staged(self, shape: Shape, batch: int, plan: Steps | None = None) -> StagedNetwork:
        stages: Sequence[Any] = self.stages((batch, *shape[1:]))
        return StagedNetwork(stages, self._thresholds if plan is None else plan, self._kind)

    def _run(self, images: Images, batch: int, plan: Steps | None = None) -> tuple[Images, Routes]:
        network = self._staged(images.shape, batch, plan)
        self._stream.restart()
        answer = network(images)
        self.gpu_s += self._stream.elapsed_s()
        return answer


def layer_seconds(stage: EngineStage, listener: Any, runs: int = 20) -> dict[str, float]:
    """Returns the median seconds of each layer, from runs of their own: profiling slows them all down.

    Args:
        stage: loaded.
        listener: tensorrt's profiler, which keeps what it hears in `taken`.
        runs: how many.
    """
    context: IExecutionContext = stage.context
    context.profiler = listener
    try:
        for _ in range(runs):
            stage.run_plainly()
    finally:
        context.profiler = None
    return {name: float(np.median(seconds)) for name, seconds in listener.taken.items()}
