"""Runtimes of this process, and artifacts that run in it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np

from evaluators.inference.frame_reuse import FrameReuse
from evaluators.inference.staged import Network, Routes, StagedNetwork, Steps
from evaluators.runtimes.base import Capabilities, Follows, Images, Proof, Spent, TimedBatch, Watch
from evaluators.runtimes.cpu import cpu_name, weight_bits
from evaluators.runtimes.device_state import DeviceState, cpu_state
from evaluators.runtimes.paired_timing import Call, Clock, TakeTurn, TimingProtocol, turns_of

if TYPE_CHECKING:
    from evaluators.data import ImageStore

LoadedStage = Callable[[Images], Sequence[Images]]
"""A file as a function from a batch to its outputs, in the order in which the file has them."""


class LocalSession:
    """An artifact whose stages are functions of this process.

    Args:
        stages: each maps a batch to what its step wants.
        plan: the confidence from which each exit answers, or the steps.
        threads: that the stages use; it decides which clock tells their work.
        confidence: what the gates ask for.
        clock: to read; where not given, the one that goes with the threads.
    """

    def __init__(
        self,
        stages: Sequence[LoadedStage],
        plan: Steps,
        threads: int,
        confidence: str = "softmax",
        clock: Clock | None = None,
    ) -> None:
        self._network = StagedNetwork(stages, plan, confidence)
        self._kind = confidence
        self._clock = clock or Clock.for_threads(threads)

    def answer(self, images: "ImageStore", batch: int) -> tuple[Images, Routes]:
        """Returns the logits `(n, classes)` and the routes `(n,)` that led to them, from `batch` images at a time."""
        parts = [self._network(images[start : start + batch]) for start in range(0, len(images), batch)]
        return np.concatenate([logits for logits, _ in parts]), np.concatenate([routes for _, routes in parts])

    def all_logits(self, images: "ImageStore", batch: int) -> Images:
        """Returns what every exit and, last, the end says, `(n, exits + 1, classes)`: no image leaves early."""
        starts = range(0, len(images), batch)
        return np.concatenate([self._network.all_logits(images[start : start + batch]) for start in starts])

    def seconds(self, images: Images, calls: int) -> list[Spent]:
        """Returns what each of `calls` runs on one batch took."""
        taken = []
        for _ in range(calls):
            work, wall = self._clock.work(), self._clock.wall()
            self._network(images)
            taken.append(Spent(self._clock.work() - work, self._clock.wall() - wall))
        return taken

    def launches(self, _images: Images, /) -> dict[str, float]:
        """Returns nothing: on a CPU there is one way to call."""
        return {}

    def turns(
        self,
        images: "ImageStore",
        batches: Sequence[TimedBatch],
        reference: "LocalSession",
        reference_batch: int,
        protocol: TimingProtocol,
    ) -> TakeTurn:
        """Returns turns between some batches and the reference on the first `reference_batch` images, warmed up."""
        some = images[:reference_batch]
        calls = [self._call(images, batch) for batch in batches]
        shares = [batch.share for batch in batches]
        return turns_of(calls, lambda: reference._network(some), protocol, self._clock, shares)

    def proof(self, _images: Images, _precisions: Mapping[str, str], /) -> Proof:
        """Returns an empty proof: a CPU runtime computes in the types that the file says."""
        return Proof()

    def _call(self, images: "ImageStore", batch: TimedBatch) -> Call:
        network = StagedNetwork(self._network.stages, batch.way(self._network.plan), self._kind)
        if batch.follows is not None:
            chosen = images[batch.start : batch.start + batch.count]
            return following(network, images[batch.follows.key : batch.follows.key + 1], chosen, batch.follows)
        starts = (batch.start, *batch.others)
        several = cycle([np.array(images[start : start + batch.count]) for start in starts])
        return lambda: network(next(several))


class LocalRuntime(ABC):
    '''A library that runs ONNX files in this process, with what most of them have in common on a CPU.

    A subclass has a name, a version and a way to load a file; it overrides the rest where it does more. It is named by
    a line of `evaluators.runtimes.registry.RUNTIMES`.

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
            model: what `deployable` gave.
            threads: that run it.
        """

    @staticmethod
    def missing() -> str | None:
        """Returns why this runtime cannot be used here and what to do about it; None where it can."""
        return None

    def device(self) -> str:
        """Returns the CPU's model name."""
        return cpu_name()

    def capabilities(self) -> Capabilities:
        """Returns what holds on most CPUs: fp32, channels in eights, any batch size, blocks that can be skipped."""
        return Capabilities(("fp32",), {"fp32": 8}, weight_bits(), dynamic_batch=True, skips=True)

    def state(self) -> DeviceState:
        """Returns the CPU's frequency, governor and temperature, where the system tells."""
        return cpu_state()

    def deployable(self, model: bytes) -> bytes:
        """Returns the portable file as it is."""
        return model

    def open(self, stages: Sequence[bytes], plan: Steps, threads: int, confidence: str = "softmax") -> LocalSession:
        """Returns an artifact whose files are loaded one by one."""
        return LocalSession([self.load(stage, threads) for stage in stages], plan, threads, confidence)

    def tensors(self, model: bytes) -> Watch:
        """Returns a function from a batch to all outputs of a file, as float32."""
        import onnx  # a board runs files and makes none, so it has no onnx

        graph = onnx.load_from_string(model).graph
        dtype = onnx.helper.tensor_dtype_to_np_dtype(graph.input[0].type.tensor_type.elem_type)
        run, names = self.load(model, 1), [output.name for output in graph.output]

        def watch(images: Images) -> dict[str, Images]:
            found = run(images.astype(dtype, copy=False))
            return {name: np.asarray(tensor, np.float32) for name, tensor in zip(names, found, strict=True)}

        return watch

    def extras(self, _stages: Sequence[bytes], _images: Images, /) -> dict[str, bytes]:
        """Returns nothing: the files themselves are all that it needs."""
        return {}

    def remarks(self) -> list[str]:
        """Returns nothing: paired turns have taken care of a CPU whose speed moved."""
        return []


def following(network: Network, key: Images, frame: Images, follows: Follows) -> Call:
    """Returns a call that answers a frame as it is met in its stream, over and over.

    Args:
        network: that it is about.
        key: the last key frame, `(1, c, h, w)`.
        frame: the frame, `(1, c, h, w)`.
        follows: how long ago the key frame was, and what decides.
    """
    reuse = FrameReuse(network, follows.threshold, follows.max_age)
    last, _ = reuse.frame(key)

    def call() -> object:
        reuse.last, reuse.age = last, follows.age - 1  # the frame itself adds one
        return reuse.frame(frame)

    return call
