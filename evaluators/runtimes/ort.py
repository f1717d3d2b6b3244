"""ONNX Runtime on the CPU: the embedded default target."""

import platform
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from evaluators.device_state import DeviceState, cpu_state
from evaluators.runtimes.local import LoadedStage, LocallyOpened
from evaluators.runtimes.run_bundle import Steps, harmful_optimizers
from evaluators.target import Capabilities, Images

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

_CALIBRATION_BATCH = 4
"""So many images at a time keep the memory of calibration small."""


class OnnxRuntime:
    """Sessions of ONNX Runtime's CPU provider."""

    name = "onnxruntime"

    @staticmethod
    def missing() -> str | None:
        """Returns None: importing this module has shown that it is there."""
        return None

    def version(self) -> str:
        """Returns the library's name and version."""
        return f"onnxruntime {onnxruntime.__version__}"

    def device(self) -> str:
        """Returns the CPU's model name."""
        return cpu_name()

    def capabilities(self) -> Capabilities:
        """Returns fp32 and int8, channels in eights, and 7-bit weights on x86 without VNNI.

        There, products of u8 and s8 are summed in 16 bits, which eight-bit weights can overflow.
        Source: ONNX Runtime documentation, Quantize ONNX models, "When to use reduce-range".
        """
        overflows = platform.machine().lower() in ("x86_64", "amd64") and not has_vnni()
        steps = {"fp32": 8, "int8": 8}
        bits = 7 if overflows else 8
        return Capabilities(("fp32", "int8"), steps, weight_bits=bits, dynamic_batch=True, skips=True)

    def state(self) -> DeviceState:
        """Returns the CPU's frequency, governor and temperature, where the system tells."""
        return cpu_state()

    def deployable(self, model: bytes) -> bytes:
        """Returns the model with u8 activations, the only form that this runtime fuses on a CPU.

        The grid stays the same: scale unchanged, zero point 0 behind a ReLU and 128 elsewhere.
        """
        return unsigned_activations(model)

    def open(self, stages: Sequence[bytes], plan: Steps, threads: int) -> LocallyOpened:
        """Returns one session per stage, with `threads` threads inside an operator and one operator at a time."""
        return LocallyOpened([load(stage, threads) for stage in stages], plan, threads)

    def extras(self, stages: Sequence[bytes], images: Images) -> dict[str, bytes]:  # noqa: ARG002
        """Returns nothing: sessions load from the files themselves."""
        return {}

    def remarks(self) -> list[str]:
        """Returns nothing: paired turns have taken care of a CPU whose speed moved."""
        return []


def load(model: bytes, threads: int) -> LoadedStage:
    """Returns a file as a function from its input to its outputs."""
    session = open_session(model, threads)
    name = session.get_inputs()[0].name

    def run(inputs: NDArray[np.float32]) -> Sequence[NDArray[np.float32]]:
        outputs: Sequence[NDArray[np.float32]] = session.run(None, {name: inputs})
        return outputs

    return run


def open_session(model: bytes, threads: int, optimize: bool = True) -> onnxruntime.InferenceSession:
    """Returns a session on the CPU provider."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_ENABLE_BASIC
    return onnxruntime.InferenceSession(
        model, options, providers=["CPUExecutionProvider"], disabled_optimizers=harmful_optimizers(model)
    )


def activation_ranges(
    model: bytes, tensors: Sequence[str], images: NDArray[np.float32]
) -> dict[str, tuple[float, float]]:
    """Returns the lowest and highest value of each of a float model's tensors over `images`, 0 included.

    The extremes are taken inside the graph, so that only two numbers per tensor leave it, batch by batch.
    """
    import onnx  # a board runs files and makes none, so it has no onnx
    from onnx import TensorProto, helper

    proto = onnx.load_from_string(model)
    graph = proto.graph
    source = graph.input[0].name
    names = [tensor for tensor in tensors if tensor != source]
    del graph.output[:]
    for index, tensor in enumerate(names):
        for operator in ("ReduceMin", "ReduceMax"):
            output = f"range/{operator}/{index}"
            graph.node.append(helper.make_node(operator, [tensor], [output], keepdims=0))
            graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, []))
    session = open_session(proto.SerializeToString(), threads=0, optimize=False)
    batches = range(0, len(images), _CALIBRATION_BATCH)
    found = np.array([session.run(None, {source: images[at : at + _CALIBRATION_BATCH]}) for at in batches])
    lows, highs = found[:, 0::2].min(axis=0), found[:, 1::2].max(axis=0)
    ranges = {name: _with_zero(lows[index], highs[index]) for index, name in enumerate(names)}
    return ranges | {source: _with_zero(images.min(), images.max())}


def _with_zero(low: float, high: float) -> tuple[float, float]:
    return min(float(low), 0.0), max(float(high), 0.0)


def unsigned_activations(model: bytes) -> bytes:
    """Returns the model with every s8 activation made u8; fp8 ones, and a model without any, stay as they are."""
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
