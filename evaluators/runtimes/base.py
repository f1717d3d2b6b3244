"""Where a network will run, and what can run there."""

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
Watch = Callable[[Images], dict[str, Images]]
"""A network that answers a batch with every output that its file has, by name."""

Fp32In = Literal["fp32", "tf32", "bf16"]
"""What all fp32 layers of a file together run in."""

ALLOWANCES: Mapping[str, Mapping[str, str]] = {"fp32": {}, "tf32": {"allow_tf32": "1"}, "bf16": {"allow_bf16": "1"}}
"""Metadata of an ONNX file, by what its fp32 layers may run in; a runtime that has no such type never sees it."""


def allows(model: bytes, kind: Literal["tf32", "bf16"]) -> bool:
    """Returns whether an ONNX file's metadata allows a type; read from its bytes, because a board has no onnx package.

    Args:
        model: the file.
        kind: what its fp32 layers may run in.
    """
    (pair,) = ALLOWANCES[kind].items()
    texts = b"".join(bytes([field << 3 | 2, len(text)]) + text.encode() for field, text in enumerate(pair, 1))
    return bytes([14 << 3 | 2, len(texts)]) + texts in model  # metadata_props is field 14 of a ModelProto


class TargetError(UserError):
    """A target that does not exist, or not on this machine."""


@dataclass(frozen=True)
class Capabilities:
    """What a target runs well; a space never offers what is not here.

    Args:
        precisions: the reference precision first.
        channel_steps: for each precision, the multiple that channels are padded to.
        weight_bits: of an int8 weight: 7 where 8 would overflow the accumulating instruction.
        dynamic_batch: whether one artifact takes batches of any size, which exits need at batch sizes above one.
        quantized_add: which inputs of an int8 residual addition carry Q/DQ: `both`, or the `residual` one only where
            the runtime fuses the addition into the convolution that feeds the other.
        int8_operators: beside additions, concatenations and average pooling, the operators without weights that run no
            slower in int8 than in float where all that feeds them is int8.
        int8_channels: the fewest input and output channels with which a layer may be int8 or fp8.
        sparse_2_4: whether two zeros in each four weights along the input channels make a layer faster.
        compiles: whether loading compiles for the device, so that a known latency is worth keeping.
        fp32_in: the faster types in which fp32 layers can run, all of them together: a property of a whole engine.
        storage: precisions that weights can be stored in, at no promise of speed.
        skips: whether a block that an input passes by is a part of the artifact that is not run.
        int8_heads: whether the linear layer that an exit answers by is faster in int8 although its answer is float.
        features: what stages hand on fastest where both ends quantize it: float, u8, or u8 with the channels as the
            last axis, as int8 convolutions may compute.
        clock: what work is told by. `cpu`: the CPU time of the calling thread, or the wall clock where several threads
            share the work; that is all a caller waits for, other programs aside. `gpu`: the device's own events; a
            caller waits for the host's part of a call as well.
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
    """A runtime on a device, with the batch size and threads of the deployment, and what fp32 layers run in."""

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
class Follows:
    """What a frame of a stream finds when it comes.

    Args:
        key: the last key frame.
        age: how many frames ago that was.
        threshold: the difference from it from which a frame is a key frame.
        max_age: the age at which a frame is one anyway.
    """

    key: int
    age: int
    threshold: float
    max_age: int


@dataclass(frozen=True)
class TimedBatch:
    """Some consecutive images whose way through an artifact is timed.

    Args:
        start: the first of them.
        count: how many.
        longest: whether no exit may answer and no block be passed by.
        follows: of one frame of a stream, what decides whether it is computed; None where images come alone.
        exit: where all leave, whatever they are like; None where their confidences decide.
        share: how often such images come, in any unit, and so before others that are timed.
        others: the first images of further batches that go the same way; in a process of ours they take turns.
    """

    start: int
    count: int
    longest: bool = False
    follows: Follows | None = None
    exit: int | None = None
    share: float = 1.0
    others: tuple[int, ...] = ()

    def way(self, plan: Steps) -> Steps:
        """Returns the plan that makes its images go the way that it asks for."""
        if self.longest:
            return longest(plan)
        return plan if self.exit is None else leaving_at(plan, self.exit)


def thresholds_of(plan: Steps) -> list[float]:
    """Returns the confidence from which each exit answers.

    Raises:
        TargetError: blocks may be skipped, which engines cannot: each reads the buffer of the one before it.
    """
    thresholds = [threshold for threshold in plan if not isinstance(threshold, Step)]
    if len(thresholds) < len(plan):
        raise TargetError("blocks are skipped on a CPU, got tensorrt; take a version that runs them all")
    return thresholds


@dataclass(frozen=True)
class Spent:
    """What a call took, or the median of several: seconds of work by the runtime's clock, and on the wall."""

    work: float
    wall: float


@dataclass(frozen=True)
class Proof:
    """In which precision layers really run, as far as the runtime tells.

    Args:
        differences: in words, every layer that does not run in the precision that it was written in.
        unproven: the nodes inside a fused region, whose precision the runtime does not tell.
    """

    differences: tuple[str, ...] = ()
    unproven: tuple[str, ...] = ()

    def remarks(self) -> list[str]:
        """Returns the differences, and one line for all that is unproven."""
        count = len(self.unproven)
        layers = "1 layer runs" if count == 1 else f"{count} layers run"
        hidden = f"{layers} inside a fused region whose precision the runtime does not tell"
        return [*self.differences, *([hidden] if count else [])]


class Session(Protocol):
    """An artifact, loaded where it will run: here, or on a board."""

    def answer(self, images: "ImageStore", batch: int) -> tuple[Images, Routes]:
        """Returns the logits `(n, classes)` and the routes `(n,)` that led to them, from `batch` images at a time.

        A route is the exit that answered and the blocks that were passed by: see `staged`.
        """
        ...

    def all_logits(self, images: "ImageStore", batch: int) -> Images:
        """Returns what every exit and, last, the end says, `(n, exits + 1, classes)`: no image leaves early."""
        ...

    def seconds(self, images: Images, calls: int) -> list[Spent]:
        """Returns what each of `calls` runs on one batch took."""
        ...

    def launches(self, images: Images, /) -> dict[str, float]:
        """Returns the median wall-clock seconds of each way to launch a batch, the one that is deployed first.

        There is nothing to tell where there is one way only.
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
        """Returns turns between some batches and the reference on the first `reference_batch` images, warmed up."""
        ...

    def proof(self, images: Images, precisions: Mapping[str, str], /) -> Proof:
        """Returns which layers do not run in the precision that they were written in, or do not tell.

        Args:
            images: one batch, as large as those that are deployed.
            precisions: what was written, by the name of the ONNX node; of the stages that are here.
        """
        ...


class Runtime(Protocol):
    """The library that runs artifacts on a device.

    One that runs files in this process needs a few lines: `evaluators.runtimes.local.LocalRuntime` has the rest.
    """

    name: str

    @staticmethod
    def missing() -> str | None:
        """Returns why this runtime cannot be used here and what to do about it; None where it can."""
        ...

    def version(self) -> str:
        """Returns the library's name and version."""
        ...

    def device(self) -> str:
        """Returns the name of the device it runs on."""
        ...

    def capabilities(self) -> Capabilities:
        """Returns what runs well on this device."""
        ...

    def state(self) -> DeviceState:
        """Returns how fast the device may run just now; in less than a millisecond, because it is asked in a trial."""
        ...

    def deployable(self, model: bytes) -> bytes:
        """Returns the file that is shipped for this runtime, made from a portable ONNX file."""
        ...

    def open(self, stages: Sequence[bytes], plan: Steps, threads: int, confidence: str = "softmax") -> Session:
        """Returns an artifact, loaded from the files that `deployable` or `deployed_stages` gave.

        Args:
            stages: the files.
            plan: the confidence from which each exit answers; or steps, where the runtime can skip blocks.
            threads: that run them.
            confidence: what tells how sure an exit is.
        """
        ...

    def tensors(self, model: bytes) -> Watch:
        """Returns one file, loaded to be looked into: a function from a batch to all of its outputs, as float32."""
        ...

    def extras(self, stages: Sequence[bytes], images: Images, /) -> dict[str, bytes]:
        """Returns further files for a bundle, by name, such as engines built for this device and such a batch."""
        ...

    def remarks(self) -> list[str]:
        """Returns what a user should know about the measurements so far: a line that broke, a clock that moved."""
        ...


def deployed_stages(runtime: Runtime, stages: Sequence[bytes], skips: bool) -> tuple[bytes, ...]:
    """Returns the files that are shipped of an artifact's portable ones.

    Args:
        library: what will run them.
        stages: the portable files.
        skips: whether inputs may pass blocks by: what comes around a block is not quantized as what comes through it.
    """
    features = runtime.capabilities().features
    if skips or features == "float":
        return tuple(runtime.deployable(stage) for stage in stages)
    from evaluators.runtimes.onnx_rewrites.stage_boundaries import integer_seams

    return integer_seams(stages, runtime.deployable, channels_last=features == "u8 channels-last")
