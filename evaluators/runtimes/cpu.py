"""What the runtimes on CPUs share: the device's name, what its int8 instructions hold, and the form of a fast file."""

import platform
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from onnx import NodeProto

_NON_NEGATIVE = {"Relu"}
_SIGN_KEEPING = {
    "MaxPool",
    "GlobalAveragePool",
    "AveragePool",
    "Flatten",
    "Reshape",
    "QuantizeLinear",
    "DequantizeLinear",
}


def unsigned_activations(model: bytes) -> bytes:
    """Returns the model with every s8 activation made u8; fp8 ones, and a model without any, stay as they are.

    Behind a ReLU all 255 steps are positive, where s8 has 127: they are half as large, so that both forms clip alike.
    """
    import onnx
    from onnx import numpy_helper

    proto = onnx.load_from_string(model)
    initializers = {tensor.name: tensor for tensor in proto.graph.initializer}
    producers = {output: node for node in proto.graph.node for output in node.output}
    quantizers = [node for node in proto.graph.node if node.op_type == "QuantizeLinear"]
    quantizers = [node for node in quantizers if initializers[node.input[2]].data_type == onnx.TensorProto.INT8]
    for node in quantizers:
        zero_point = initializers[node.input[2]]
        offset = 0 if _is_non_negative(node.input[0], producers) else 128
        if offset == 0:
            scale = initializers[node.input[1]]
            scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) / np.float32(2), scale.name))
        zero_point.CopyFrom(numpy_helper.from_array(np.array(offset, dtype=np.uint8), zero_point.name))
    return bytes(proto.SerializeToString(deterministic=True)) if quantizers else model


def _is_non_negative(tensor: str, producers: "dict[str, NodeProto]") -> bool:
    node = producers.get(tensor)
    while node is not None and node.op_type in _SIGN_KEEPING:
        node = producers.get(node.input[0])
    return node is not None and node.op_type in _NON_NEGATIVE


@cache
def cpu_flags() -> frozenset[str]:
    """Returns the instruction sets that Linux reports; none elsewhere."""
    return frozenset(_cpu_field("flags").split())


def has_vnni() -> bool:
    """Returns whether the CPU adds u8 x s8 products without overflow."""
    return any(flag in cpu_flags() for flag in ("avx512_vnni", "avx_vnni", "amx_int8"))


def weight_bits() -> int:
    """Returns how many bits an int8 weight may have: 7 on x86 without VNNI, else 8.

    There, products of u8 and s8 are summed in 16 bits, which eight-bit weights can overflow.
    Source: ONNX Runtime documentation, Quantize ONNX models, "When to use reduce-range"; OpenVINO documentation,
    `OverflowFix` of NNCF, for the same instruction.
    """
    return 7 if platform.machine().lower() in ("x86_64", "amd64") and not has_vnni() else 8


@cache
def cpu_name() -> str:
    """Returns the CPU's model name, or its architecture where the system does not tell."""
    return _cpu_field("model name") or platform.processor() or platform.machine()


def _cpu_field(field: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")
