"""ONNX Runtime on the CPU: the embedded default target."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from evaluators.inference.sessions import harmful_optimizers, session_entries
from evaluators.runtimes.base import Capabilities, Images, TensorReader
from evaluators.runtimes.cpu import weight_bits
from evaluators.runtimes.local import LoadedStage, LocalRuntime
from evaluators.runtimes.onnx_rewrites.integer_operators import integer_form

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto


_INT8_OPERATORS = ("Mul", "Sigmoid", "LeakyRelu", "PRelu", "HardSwish", "HardSigmoid")
"""What stands between int8 layers and is no slower between Q/DQ than in float; `integer_form` writes some anew."""
_CALIBRATION_BATCH = 4
"""So many images at a time keep the memory of calibration small."""
_INPUT_TYPES: Mapping[str, type[np.generic]] = {"tensor(float16)": np.float16, "tensor(uint8)": np.uint8}
"""What a file may read beside float32, by the name that ONNX Runtime has for it."""


class OnnxRuntime(LocalRuntime):
    """Sessions of ONNX Runtime's CPU provider."""

    name = "onnxruntime"

    def version(self) -> str:
        """Returns the library's name and version."""
        return f"onnxruntime {onnxruntime.__version__}"

    def capabilities(self) -> Capabilities:
        """Returns fp32 and int8, channels in eights, and 4-bit weights as storage.

        An int8 ResNet-20 with one exit that nobody takes, batch 1, takes 1.088 times as long as the whole with float
        features, 1.058 with u8 ones, channels last, and 1.040 where the exit answers in float too (x86 with VNNI).
        """
        steps = {"fp32": 8, "int8": 8}
        return Capabilities(
            ("fp32", "int8"),
            steps,
            weight_bits(),
            dynamic_batch=True,
            int8_operators=_INT8_OPERATORS,
            storage=("int4",),
            skips=True,
            int8_heads=False,
            features="u8 channels-last",
        )

    def deployable(self, model: bytes) -> bytes:
        """Returns the model with u8 activations, the only form that this runtime fuses on a CPU.

        The range stays the same: zero point 0 and 255 steps where nothing is negative, elsewhere 128 and 127 steps.
        What it would compute in float between int8 layers is written for its integer kernels.
        """
        return integer_form(model)

    def load(self, model: bytes, threads: int) -> LoadedStage:
        """Returns a session with `threads` threads inside an operator and one operator at a time."""
        return load(model, threads)

    def tensors(self, model: bytes) -> TensorReader:
        """Returns a function from a batch to all outputs of a file, as float32; its input may be half precision or u8.

        Half precision is rounded, and overflows, as the file says: see `rounded_halves`.
        """
        with suppress(ImportError):  # a board has no onnx; what it is sent has been through this
            model = rounded_halves(model)
        session = open_session(model, threads=1)
        source, names = session.get_inputs()[0], [output.name for output in session.get_outputs()]
        dtype = _INPUT_TYPES.get(source.type, np.float32)

        def watch(images: Images) -> dict[str, Images]:
            with np.errstate(over="ignore"):
                given = images.astype(dtype, copy=False)
            found = session.run(names, {source.name: given})
            return {name: tensor.astype(np.float32) for name, tensor in zip(names, found, strict=True)}

        return watch


def load(model: bytes, threads: int) -> LoadedStage:
    """Returns a file as a function from its input to its outputs."""
    session = open_session(model, threads)
    name, names = session.get_inputs()[0].name, [output.name for output in session.get_outputs()]

    def run(inputs: NDArray[np.float32]) -> Sequence[NDArray[np.float32]]:
        outputs: Sequence[NDArray[np.float32]] = session.run(names, {name: inputs})
        return outputs

    return run


def open_session(model: bytes, threads: int, optimize: bool = True) -> onnxruntime.InferenceSession:
    """Returns a session on the CPU provider."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what is wrong is in the exception, too
    for key, value in session_entries(model).items():
        options.add_session_config_entry(key, value)
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
    found = np.array([outputs for _, outputs in _calibration_runs(proto, images)])
    lows, highs = found[:, 0::2].min(axis=0), found[:, 1::2].max(axis=0)
    ranges = {name: _with_zero(lows[index], highs[index]) for index, name in enumerate(names)}
    return ranges | {source: _with_zero(images.min(), images.max())}


def activations(
    model: bytes, tensors: Sequence[str], images: NDArray[np.float32]
) -> Iterator[dict[str, NDArray[np.float32]]]:
    """Yields the value of each of a float model's tensors and of its input, a few of the `images` at a time."""
    import onnx
    from onnx import TensorProto, helper

    proto = onnx.load_from_string(model)
    source = proto.graph.input[0].name
    names = [tensor for tensor in tensors if tensor != source]
    del proto.graph.output[:]
    proto.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    for batch, outputs in _calibration_runs(proto, images):
        yield dict(zip(names, outputs, strict=True)) | {source: batch}


def _calibration_runs(
    proto: "ModelProto", images: NDArray[np.float32]
) -> Iterator[tuple[NDArray[np.float32], Sequence[NDArray[np.float32]]]]:
    """Yields some images and a model's outputs for them, from a session that keeps every tensor as it is."""
    session = open_session(proto.SerializeToString(), threads=0, optimize=False)
    source = proto.graph.input[0].name
    for start in range(0, len(images), _CALIBRATION_BATCH):
        batch = images[start : start + _CALIBRATION_BATCH]
        yield batch, session.run(None, {source: batch})


def rounded_halves(model: bytes) -> bytes:
    """Returns the model with each fp16 tensor that is computed cast to float and back; one without any as it is.

    A CPU computes fp16 nodes in float, and ONNX Runtime 1.32 then leaves out the casts between them, so that nothing is
    rounded and nothing overflows. It keeps casts that the file itself has.
    """
    import onnx
    from onnx import TensorProto, helper

    proto = onnx.load_from_string(model)
    inferred = onnx.shape_inference.infer_shapes(proto).graph
    infos = [*inferred.value_info, *inferred.output]
    halves = {info.name for info in infos if info.type.tensor_type.elem_type == TensorProto.FLOAT16}
    nodes: list[NodeProto] = []
    for node in proto.graph.node:
        nodes.append(node)
        for index, name in enumerate(node.output):
            if name in halves:
                node.output[index] = f"{name}/computed"
                nodes.append(helper.make_node("Cast", [f"{name}/computed"], [f"{name}/float"], to=TensorProto.FLOAT))
                nodes.append(helper.make_node("Cast", [f"{name}/float"], [name], to=TensorProto.FLOAT16))
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return bytes(proto.SerializeToString(deterministic=True)) if halves else model


def _with_zero(low: float, high: float) -> tuple[float, float]:
    return min(float(low), 0.0), max(float(high), 0.0)
