"""Settings of the CPU runtimes, shared by measurements and bundles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


class BatchSizes:
    """The batch sizes that stages are compiled for: the first that is run, and the powers of two below it."""

    def __init__(self) -> None:
        self._first = 0

    def fitting(self, count: int) -> int:
        """Returns the smallest batch size that holds `count` inputs; `count` itself if it exceeds the first size."""
        self._first = self._first or count
        return count if count > self._first else min(1 << (count - 1).bit_length(), self._first)


class PaddedStage:
    """A stage that OpenVINO compiles for a few batch sizes; other batches are padded with zeros.

    With a dynamic batch size kernels are slower, and each change of the size costs a third of a batch's time.

    Args:
        compiled: returns the compiled model for inputs of one shape.
        sizes: the batch sizes; shared by all stages, because only the first stage sees full batches.
    """

    def __init__(self, compiled: Callable[[tuple[int, ...]], Any], sizes: BatchSizes) -> None:
        self._compiled = compiled
        self._sizes = sizes
        self.requests: dict[tuple[int, ...], Any] = {}

    def __call__(self, inputs: Floats) -> list[Floats]:
        """Returns `[features, logits]` for a batch, or `[logits]` for the last stage."""
        count, size = len(inputs), self._sizes.fitting(len(inputs))
        shape = (size, *inputs.shape[1:])
        if shape not in self.requests:
            self.requests[shape] = self._compiled(shape).create_infer_request()
        if size > count:
            inputs = np.concatenate([inputs, np.zeros((size - count, *shape[1:]), inputs.dtype)])
        outputs = self.requests[shape].infer([inputs], share_inputs=True)
        return [outputs[index][:count] for index in range(len(outputs))]


def openvino_settings(threads: int, bf16: bool) -> dict[str, Any]:
    """Returns the settings with which OpenVINO compiles; by default it would run fp32 in bf16 if the CPU has it.

    Threads are not pinned: a pinned thread waits for other programs on its core.
    """
    return {
        "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,
    }


def openvino_has_bf16(core: Any) -> bool:
    """Returns whether the CPU multiplies bf16 in hardware."""
    return "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def harmful_optimizers(model: bytes) -> list[str]:
    """Returns the optimizers of ONNX Runtime that would change the outputs of an ONNX file.

    One fuses a ReLU into the quantization after it, which drops the ReLU if that is fp8 (seen in 1.32). Files with fp8
    are recognized by the name that our writer gives zero points.
    """
    return ["ReluQuantRewrite"] if b"/fp8/zero_point" in model else []


def session_entries(model: bytes) -> dict[str, str]:
    """Returns the entries of an ONNX Runtime session's configuration that suit a file, by key.

    If weights are only stored in few bits and nothing computes in int8, they are dequantized once, when the file is
    loaded; otherwise they would be dequantized for each batch, which takes 1.7 times the time for a ResNet-20 (seen in
    1.32).
    """
    stored_only = b"DequantizeLinear" in model and b"QuantizeLinear" not in model
    return {"session.disable_quant_qdq": "1"} if stored_only else {}
