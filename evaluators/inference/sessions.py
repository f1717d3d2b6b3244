"""How the CPU runtimes are set up, alike where versions are measured and in the bundle that is shipped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


class BatchSizes:
    """The batch sizes that stages are compiled for: the first that is seen, and the powers of two below it."""

    def __init__(self) -> None:
        self._whole = 0

    def fitting(self, count: int) -> int:
        """Returns the smallest of them that holds `count` inputs; what exceeds the first is its own size."""
        self._whole = self._whole or count
        return count if count > self._whole else min(1 << (count - 1).bit_length(), self._whole)


class PaddedStage:
    """A stage of OpenVINO's that is compiled for a few shapes; other batches are padded with zeros.

    With the batch size left open its kernels are slower, and each change of it costs as much as a third of a batch.

    Args:
        compiled: returns the compiled model for inputs of one shape.
        sizes: of batches; shared by all stages, because the first one sees whole batches.
    """

    def __init__(self, compiled: Callable[[tuple[int, ...]], Any], sizes: BatchSizes) -> None:
        self._compiled = compiled
        self._sizes = sizes
        self.requests: dict[tuple[int, ...], Any] = {}

    def __call__(self, inputs: Floats) -> list[Floats]:
        """Returns `[features, logits]` for a batch, or `[logits]` for the last stage's."""
        count, size = len(inputs), self._sizes.fitting(len(inputs))
        shape = (size, *inputs.shape[1:])
        if shape not in self.requests:
            self.requests[shape] = self._compiled(shape).create_infer_request()
        if size > count:
            inputs = np.concatenate([inputs, np.zeros((size - count, *shape[1:]), inputs.dtype)])
        found = self.requests[shape].infer([inputs], share_inputs=True)
        return [found[index][:count] for index in range(len(found))]


def openvino_settings(threads: int, bf16: bool) -> dict[str, Any]:
    """Returns how OpenVINO compiles; left to itself it runs fp32 in bf16 where the CPU has it.

    Its threads are not pinned: a pinned one waits for whatever else its core is busy with.
    """
    return {
        "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,
    }


def openvino_has_bf16(core: Any) -> bool:
    """Returns whether the CPU multiplies bf16 itself."""
    return "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def harmful_optimizers(model: bytes) -> list[str]:
    """Returns the optimizations of ONNX Runtime that would change the answers of an ONNX file.

    It takes a ReLU into the quantization behind it, which for fp8 drops the ReLU (seen in 1.32). What tells fp8 is the
    name that our writer gives its zero points.
    """
    return ["ReluQuantRewrite"] if b"/fp8/zero_point" in model else []


def session_entries(model: bytes) -> dict[str, str]:
    """Returns what a session of ONNX Runtime is told about a file, by the key of its configuration.

    Where weights are only stored in few bits and nothing computes in int8, they become float once, when the file is
    loaded; else with every batch, at 1.7 times the time for a ResNet-20 (seen in 1.32).
    """
    stored_only = b"DequantizeLinear" in model and b"QuantizeLinear" not in model
    return {"session.disable_quant_qdq": "1"} if stored_only else {}
