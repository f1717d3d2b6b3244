"""Where a network will run, and what can run there."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from spaces.errors import UserError

RUNTIMES: Mapping[str, str] = {
    "onnxruntime": "evaluators.runtimes.ort:OnnxRuntime",
}
"""Every runtime, by the name a target gives it; loaded when asked for."""


class TargetError(UserError):
    """A target that does not exist, or not on this machine."""


@dataclass(frozen=True)
class Capabilities:
    """What a target runs well; a space never offers what is not here.

    Args:
        precisions: the reference precision first.
        channel_step: channels come in multiples of it.
        weight_bits: of an int8 weight: 7 where 8 would overflow the accumulating instruction.
        dynamic_batch: whether one artifact takes batches of any size, which exits need at batch sizes above one.
    """

    precisions: tuple[str, ...]
    channel_step: int
    weight_bits: int
    dynamic_batch: bool


@dataclass(frozen=True)
class Target:
    """A runtime on a device, with the batch size and threads of the deployment."""

    runtime: str
    device: str
    batch: int
    threads: int

    def __str__(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{self.runtime} on {self.device}, batch {self.batch}, {threads}"

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready copy."""
        return asdict(self)


class Loaded(Protocol):
    """One stage of an artifact, ready to run on the target."""

    def __call__(self, inputs: NDArray[np.float32]) -> Sequence[NDArray[np.float32]]:
        """Returns the stage's outputs for a batch."""
        ...


class Runtime(Protocol):
    """The library that runs artifacts on a device."""

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

    def deployable(self, model: bytes) -> bytes:
        """Returns the file that is shipped for this runtime, made from a portable ONNX file."""
        ...

    def load(self, model: bytes, threads: int) -> Loaded:
        """Returns a stage, loaded from the file that `deployable` gave."""
        ...


def runtime(name: str) -> Runtime:
    """Returns the runtime called `name`.

    Raises:
        TargetError: there is no such runtime, or it is not installed here.
    """
    if name not in RUNTIMES:
        raise TargetError(f"a target is one of {', '.join(RUNTIMES)}, got {name!r}; see: python -m search doctor")
    module, _, attribute = RUNTIMES[name].partition(":")
    found: type[Runtime] = getattr(importlib.import_module(module), attribute)
    reason = found.missing()
    if reason:
        raise TargetError(f"target {name!r} is not available here: {reason}")
    return found()
