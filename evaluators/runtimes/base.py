"""What a runtime is: the protocols that every runtime implements, targets, and capabilities."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from evaluators.inference.staged import Routes, Step, Steps, leaving_at, longest
from evaluators.runtimes.device_state import DeviceState
from evaluators.runtimes.paired_timing import TakeTurn, TimingProtocol
from spaces.errors import UserError

if TYPE_CHECKING:
    from typing import Self  # boards may run Python 3.10, which lacks it

    from evaluators.data import ImageStore

Images = NDArray[np.float32]
TensorReader = Callable[[Images], dict[str, Images]]
"""A loaded file as a function from a batch to all of its outputs, by name."""

Fp32In = Literal["fp32", "tf32", "bf16"]
"""The type that all fp32 layers of a file run in."""

FP32_IN_METADATA: Mapping[str, Mapping[str, str]] = {
    "fp32": {},
    "tf32": {"allow_tf32": "1"},
    "bf16": {"allow_bf16": "1"},
}
"""The metadata of an ONNX file that allows a type for its fp32 layers; ignored by runtimes that lack the type."""


def allows(model: bytes, kind: Literal["tf32", "bf16"]) -> bool:
    """Returns whether an ONNX file's metadata allows its fp32 layers to run in a faster type.

    The protobuf message is searched for in the file's bytes, because a board has no onnx package.

    Args:
        model: the file.
        kind: the type.
    """
    (pair,) = FP32_IN_METADATA[kind].items()
    fields = b"".join(bytes([field << 3 | 2, len(text)]) + text.encode() for field, text in enumerate(pair, 1))
    return bytes([14 << 3 | 2, len(fields)]) + fields in model  # metadata_props is field 14 of a ModelProto


class TargetError(UserError):
    """A target that does not exist, or not on this machine."""


@dataclass(frozen=True)
class Capabilities:
    """What a target can run; search spaces offer nothing else.

    Args:
        precisions: the reference precision first.
        channel_steps: for each precision, the multiple that channels are padded to; the finest that is tried where
            widths are timed, which is on runtimes of this machine that do not compile.
        weight_bits: of an int8 weight: 7 where 8 would overflow the accumulating instruction.
        dynamic_batch: whether one artifact takes batches of any size, which exits need at batch sizes above one.
        quantized_add: which inputs of an int8 residual addition carry Q/DQ: `both`, or the `residual` one only where
            the runtime fuses the addition into the convolution that feeds the other.
        int8_operators: operators without weights, besides addition, concatenation and average pooling, that are no
            slower in int8 than in float if all of their inputs are int8.
        int8_channels: the least number of input and output channels of an int8 or fp8 layer.
        sparse_2_4: whether 2:4 sparsity along the input channels makes a layer faster.
        compiles: whether loading an artifact compiles it for the device, so that timings are cached.
        fp32_in: faster types in which all fp32 layers of a file together can run.
        storage: precisions in which weights can be stored without making layers faster.
        skips: whether the runtime can skip a block for an input.
        int8_heads: whether an exit's last linear layer, whose output is float, is faster in int8.
        features: the fastest type for features between stages that are quantized on both sides: float, u8, or u8 with
            the channels as the last axis.
        clock: how work is timed. `cpu`: the CPU time of the calling thread, or the wall clock with several threads; it
            is the whole latency, other programs aside. `gpu`: the device's events; the host's part of a call is added
            to the latency.
    """

    precisions: tuple[str, ...]
    channel_steps: Mapping[str, int]
    weight_bits: int
    dynamic_batch: bool
    quantized_add: Literal["both", "residual"] = "both"
    int8_operators: tuple[str, ...] = ()
    int8_channels: int = 1
    sparse_2_4: bool = False
    compiles: bool = False
    fp32_in: tuple[str, ...] = ()
    storage: tuple[str, ...] = ()
    skips: bool = False
    int8_heads: bool = True
    features: Literal["float", "u8", "u8 channels-last"] = "float"
    clock: Literal["cpu", "gpu"] = "cpu"


@dataclass(frozen=True)
class Target:
    """A runtime on a device, with the deployed batch size and threads, and the type that fp32 layers run in."""

    runtime: str
    device: str
    batch: int
    threads: int
    fp32_in: Fp32In = "fp32"

    def __str__(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        faster = "" if self.fp32_in == "fp32" else f", fp32 in {self.fp32_in.upper()}"
        return f"{self.runtime} on {self.device}, batch {self.batch}, {threads}{faster}"

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready copy."""
        return asdict(self)


@dataclass(frozen=True)
class PrecedingKeyFrame:
    """The key frame that comes before a frame of a stream, and when it is reused.

    Args:
        key: the index of the key frame.
        age: how many frames ago that was.
        threshold: the difference from the key frame from which the frame is computed.
        max_age: the age from which the frame is computed whatever the difference.
    """

    key: int
    age: int
    threshold: float
    max_age: int


@dataclass(frozen=True)
class TimedBatch:
    """A batch of consecutive images to time, and the path that it takes.

    Args:
        start: the index of the first image.
        count: the number of images.
        longest: whether to take the longest path: no exit answers and no block is skipped.
        follows: for a frame of a stream, the key frame before it; None for independent images.
        exit: the exit at which all images leave; None if their confidences decide.
        share: how often such batches occur, relative to the other timed batches, in any unit.
        others: the first images of further batches that take the same path; local runtimes alternate between them.
    """

    start: int
    count: int
    longest: bool = False
    follows: PrecedingKeyFrame | None = None
    exit: int | None = None
    share: float = 1.0
    others: tuple[int, ...] = ()

    def path_plan(self, plan: Steps) -> Steps:
        """Returns the plan with thresholds that force the requested path; unchanged if none is requested."""
        if self.longest:
            return longest(plan)
        return plan if self.exit is None else leaving_at(plan, self.exit)


def exit_thresholds(plan: Steps) -> list[float]:
    """Returns the confidence threshold of each exit.

    Raises:
        TargetError: blocks may be skipped, which engines cannot do: each reads the buffer of the one before it.
    """
    thresholds = [threshold for threshold in plan if not isinstance(threshold, Step)]
    if len(thresholds) < len(plan):
        raise TargetError("blocks are skipped on a CPU, got tensorrt; take a version that runs them all")
    return thresholds


@dataclass(frozen=True)
class Spent:
    """The time of a call, or the median of several: work by the runtime's clock, and wall-clock time, in seconds."""

    work: float
    wall: float


@dataclass(frozen=True)
class Proof:
    """The precisions in which layers really run, as far as the runtime reports them.

    Args:
        differences: a sentence for each layer that does not run in the precision that it was written in.
        unproven: the nodes inside a fused region, whose precision the runtime does not report.
    """

    differences: tuple[str, ...] = ()
    unproven: tuple[str, ...] = ()

    def remarks(self) -> list[str]:
        """Returns the differences, and one line that counts the unproven layers."""
        count = len(self.unproven)
        layers = "1 layer runs" if count == 1 else f"{count} layers run"
        hidden = f"{layers} inside a fused region whose precision the runtime does not tell"
        return [*self.differences, *([hidden] if count else [])]


class Session(Protocol):
    """An artifact loaded on its runtime, on this machine or on a board."""

    def answer(self, images: "ImageStore", batch: int) -> tuple[Images, Routes]:
        """Returns the logits `(n, classes)` and the routes `(n,)` of images, computed `batch` images at a time.

        A route encodes the exit that answered and the skipped blocks: see `evaluators.inference.staged`.
        """
        ...

    def all_logits(self, images: "ImageStore", batch: int) -> Images:
        """Returns the logits of every exit and, last, of the end, `(n, exits + 1, classes)`; no image leaves early."""
        ...

    def seconds(self, images: Images, calls: int) -> list[Spent]:
        """Returns the time of each of `calls` runs on one batch."""
        ...

    def launches(self, images: Images, /) -> dict[str, float]:
        """Returns the median wall-clock seconds of each launch mode, the deployed one first.

        Empty if the runtime has only one launch mode.
        """
        ...

    def turns(
        self,
        images: "ImageStore",
        batches: Sequence[TimedBatch],
        reference: "Self",
        reference_batch: int,
        protocol: TimingProtocol,
    ) -> TakeTurn:
        """Returns a function that times the batches and the reference, on the first `reference_batch` images, in turn.

        Both are warmed up already.
        """
        ...

    def proof(self, images: Images, precisions: Mapping[str, str], /) -> Proof:
        """Returns the layers that do not run in the precision in which they were written, and the unknown ones.

        Args:
            images: one batch of the deployed size.
            precisions: the written precision of each layer of the deployed stages, by the name of its ONNX node.
        """
        ...


class Runtime(Protocol):
    """The library that runs artifacts on a device.

    A library that runs ONNX files in this process subclasses `evaluators.runtimes.local.LocalRuntime`.
    """

    name: str

    @staticmethod
    def missing() -> str | None:
        """Returns why this runtime cannot be used here and what to do about it; None if it can be used."""
        ...

    def version(self) -> str:
        """Returns the library's name and version."""
        ...

    def device(self) -> str:
        """Returns the name of the device that it runs on."""
        ...

    def capabilities(self) -> Capabilities:
        """Returns what this device can run."""
        ...

    def state(self) -> DeviceState:
        """Returns the device's clocks, power mode and temperature; in under a millisecond, as trials call it."""
        ...

    def deployable(self, model: bytes) -> bytes:
        """Returns the file that is deployed on this runtime, made from a portable ONNX file."""
        ...

    def open(self, stages: Sequence[bytes], plan: Steps, threads: int, confidence: str = "softmax") -> Session:
        """Returns an artifact, loaded from the files that `deployable` or `deployed_stages` returned.

        Args:
            stages: the files.
            plan: the confidence threshold of each exit; or steps, if blocks may be skipped.
            threads: the number of threads.
            confidence: the measure of an exit's confidence, a name in `staged.CONFIDENCES`.
        """
        ...

    def tensors(self, model: bytes) -> TensorReader:
        """Returns a file, loaded as a function from a batch to all of its outputs by name, as float32."""
        ...

    def extras(self, stages: Sequence[bytes], images: Images, /) -> dict[str, bytes]:
        """Returns further files for a bundle, by name, such as engines built for this device and such a batch."""
        ...

    def remarks(self) -> list[str]:
        """Returns remarks on the measurements so far, such as a lost connection or a changed clock."""
        ...


def deployed_stages(runtime: Runtime, stages: Sequence[bytes], skips: bool) -> tuple[bytes, ...]:
    """Returns the deployed files of an artifact's portable stages.

    Args:
        runtime: the library that will run them.
        stages: the portable files.
        skips: whether blocks may be skipped; then features stay float between stages, because those that come around
            a block are not quantized like those that come through it.
    """
    features = runtime.capabilities().features
    if skips or features == "float":
        return tuple(runtime.deployable(stage) for stage in stages)
    from evaluators.runtimes.onnx_rewrites.stage_boundaries import integer_boundaries

    return integer_boundaries(stages, runtime.deployable, channels_last=features == "u8 channels-last")
