"""Runtimes that run artifacts in this process."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np

from evaluators.inference.frame_reuse import FrameReuse
from evaluators.inference.resizing import resized
from evaluators.inference.staged import Routes, StagedNetwork, Steps
from evaluators.runtimes.base import Capabilities, Images, Proof, Spent, TensorReader, TimedBatch
from evaluators.runtimes.cpu import cpu_name, weight_bits
from evaluators.runtimes.device_state import DeviceState, cpu_state
from evaluators.runtimes.paired_timing import Call, Clock, TakeTurn, TimingProtocol, turns_of

if TYPE_CHECKING:
    from evaluators.data import ImageStore

LoadedStage = Callable[[Images], Sequence[Images]]
"""A loaded file as a function from a batch to its outputs, in the file's order."""


class LocalSession:
    """An artifact whose stages are functions of this process.

    Args:
        stages: each maps a batch to the outputs that its step needs.
        plan: the confidence threshold of each exit, or the steps.
        threads: the number of threads of the stages, which decides the clock.
        confidence: the measure of an exit's confidence, a name in `staged.CONFIDENCES`.
        clock: the clock to read; by default that of the number of threads.
        input_size: height and width that images are resized to, before anything is timed; None for their own.
    """

    def __init__(
        self,
        stages: Sequence[LoadedStage],
        plan: Steps,
        threads: int,
        confidence: str = "softmax",
        clock: Clock | None = None,
        input_size: int | None = None,
    ) -> None:
        self._network = StagedNetwork(stages, plan, confidence)
        self._confidence = confidence
        self._clock = clock or Clock.for_threads(threads)
        self._input_size = input_size

    def _batch(self, images: "ImageStore", start: int, end: int) -> Images:
        """Returns images as the first stage takes them."""
        return resized(images[start:end], self._input_size)

    def answer(self, images: "ImageStore", batch: int) -> tuple[Images, Routes]:
        """Returns the logits `(n, classes)` and the routes `(n,)` of images, computed `batch` images at a time."""
        parts = [self._network(self._batch(images, start, start + batch)) for start in range(0, len(images), batch)]
        return np.concatenate([logits for logits, _ in parts]), np.concatenate([routes for _, routes in parts])

    def all_logits(self, images: "ImageStore", batch: int) -> Images:
        """Returns the logits of every exit and, last, of the end, `(n, exits + 1, classes)`; no image leaves early."""
        starts = range(0, len(images), batch)
        parts = [self._network.all_logits(self._batch(images, start, start + batch)) for start in starts]
        return np.concatenate(parts)

    def seconds(self, images: Images, calls: int) -> list[Spent]:
        """Returns the time of each of `calls` runs on one batch."""
        taken = []
        batch = self._batch(images, 0, len(images))
        for _ in range(calls):
            work, wall = self._clock.work(), self._clock.wall()
            self._network(batch)
            taken.append(Spent(self._clock.work() - work, self._clock.wall() - wall))
        return taken

    def launches(self, _images: Images, /) -> dict[str, float]:
        """Returns nothing: on a CPU there is only one launch mode."""
        return {}

    def turns(
        self,
        images: "ImageStore",
        batches: Sequence[TimedBatch],
        reference: "LocalSession",
        reference_batch: int,
        protocol: TimingProtocol,
    ) -> TakeTurn:
        """Returns a function that times batches and the reference, on the first `reference_batch` images, in turn."""
        reference_images = reference._batch(images, 0, reference_batch)
        calls = [self._call(images, batch) for batch in batches]
        shares = [batch.share for batch in batches]
        return turns_of(calls, lambda: reference._network(reference_images), protocol, self._clock, shares)

    def proof(self, _images: Images, _precisions: Mapping[str, str], /) -> Proof:
        """Returns an empty proof: a CPU runtime computes in the types of the file."""
        return Proof()

    def _call(self, images: "ImageStore", batch: TimedBatch) -> Call:
        network = StagedNetwork(self._network.stages, batch.path_plan(self._network.plan), self._confidence)
        if batch.follows is not None:
            frame = self._batch(images, batch.start, batch.start + batch.count)
            return frame_call(lambda: network(frame), images, batch)
        starts = (batch.start, *batch.others)
        batches = cycle([np.array(self._batch(images, start, start + batch.count)) for start in starts])
        return lambda: network(next(batches))


class LocalRuntime(ABC):
    '''Base class of libraries that run ONNX files in this process, with defaults for CPUs.

    A subclass has a name, a version and a method that loads a file; it may override the rest. It is registered by a
    line of `evaluators.runtimes.registry.RUNTIMES`.

    Example:
        """The reference implementation of ONNX: what every operator means, at no speed."""

        import onnx
        from onnx.reference import ReferenceEvaluator

        from evaluators.runtimes.local import LoadedStage, LocalRuntime


        class Reference(LocalRuntime):
            """The evaluator that comes with the onnx package."""

            name = "reference"

            def version(self) -> str:
                """Returns the library's name and version."""
                return f"reference {onnx.__version__}"

            def load(self, model: bytes, threads: int) -> LoadedStage:
                """Returns a file as a function from a batch to its outputs; it has one thread."""
                evaluator = ReferenceEvaluator(onnx.load_from_string(model))
                (source,) = evaluator.input_names
                return lambda images: evaluator.run(None, {source: images})
    '''

    name: str

    @abstractmethod
    def version(self) -> str:
        """Returns the library's name and version."""

    @abstractmethod
    def load(self, model: bytes, threads: int) -> LoadedStage:
        """Returns a file as a function from a batch of any size to its outputs.

        Args:
            model: a file that `deployable` returned.
            threads: the number of threads.
        """

    @staticmethod
    def missing() -> str | None:
        """Returns why this runtime cannot be used here and what to do about it; None if it can be used."""
        return None

    def device(self) -> str:
        """Returns the CPU's model name."""
        return cpu_name()

    def capabilities(self) -> Capabilities:
        """Returns the capabilities of most CPUs: fp32, channels in eights, any batch size, skippable blocks."""
        return Capabilities(("fp32",), {"fp32": 8}, weight_bits(), dynamic_batch=True, skips=True)

    def state(self) -> DeviceState:
        """Returns the CPU's frequency, governor and temperature, as far as the system reports them."""
        return cpu_state()

    def deployable(self, model: bytes) -> bytes:
        """Returns the portable file unchanged."""
        return model

    def open(
        self,
        stages: Sequence[bytes],
        plan: Steps,
        threads: int,
        confidence: str = "softmax",
        input_size: int | None = None,
    ) -> LocalSession:
        """Returns an artifact, each of whose files is loaded by `load`."""
        loaded = [self.load(stage, threads) for stage in stages]
        return LocalSession(loaded, plan, threads, confidence, input_size=input_size)

    def tensors(self, model: bytes) -> TensorReader:
        """Returns a function from a batch to all outputs of a file, as float32."""
        import onnx  # a board runs files and makes none, so it has no onnx

        graph = onnx.load_from_string(model).graph
        dtype = onnx.helper.tensor_dtype_to_np_dtype(graph.input[0].type.tensor_type.elem_type)
        run, names = self.load(model, 1), [output.name for output in graph.output]

        def read_tensors(images: Images) -> dict[str, Images]:
            tensors = run(images.astype(dtype, copy=False))
            return {name: np.asarray(tensor, np.float32) for name, tensor in zip(names, tensors, strict=True)}

        return read_tensors

    def extras(self, _stages: Sequence[bytes], _images: Images, /) -> dict[str, bytes]:
        """Returns nothing: the deployed files are all that a bundle needs."""
        return {}

    def remarks(self) -> list[str]:
        """Returns nothing: timing in turn with a reference already cancels changes of a CPU's speed."""
        return []


def frame_call(compute: Callable[[], tuple[Images, Routes]], images: "ImageStore", batch: TimedBatch) -> Call:
    """Returns a call that processes a frame each time as if it came in its place in the stream.

    Frames are compared in their own size, as a bundle compares them, whatever size the network gets them in.

    Args:
        compute: runs the network on the frame.
        images: frames of the stream, `(n, c, h, w)`.
        batch: which frame, and the key frame that it follows.

    Raises:
        ValueError: the batch is no frame of a stream.
    """
    follows = batch.follows
    if follows is None:
        raise ValueError("a frame of a stream follows a key frame, got a batch that follows none")
    reuse = FrameReuse(lambda _frame: compute(), follows.threshold, follows.max_age)
    key = images[follows.key : follows.key + 1]
    frame = np.array(images[batch.start : batch.start + 1])
    last, _ = reuse.frame(key)

    def call() -> object:
        reuse.last, reuse.age = last, follows.age - 1  # the frame itself adds one
        return reuse.frame(frame)

    return call
