"""Passes features between stages as integers, in the memory layout of the runtime's int8 convolutions.

Where a network is cut at an exit, the features between two files have Q/DQ on both sides. Passed as floats, they would
be dequantized at the end of one file and quantized again at the start of the next, and a runtime whose int8
convolutions are channels-last would transpose them twice.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

CHANNELS_LAST = "/channels_last"
"""Suffix of the names of features whose channels are the last axis."""
_TO_LAST, _TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)


def integer_boundaries(
    stages: Sequence[bytes], deployable: Callable[[bytes], bytes], channels_last: bool
) -> tuple[bytes, ...]:
    """Returns deployed stages that pass u8 features on, with the same scale and zero point in both files.

    Features stay float if only one side quantizes them, or if they are not u8 in the deployed files.

    Args:
        stages: portable files, each of which reads the first output of the one before it.
        deployable: returns the deployed form of a portable file.
        channels_last: whether features between int8 convolutions are passed with the channels as the last axis.
    """
    import onnx

    if len(stages) == 1:
        return (deployable(stages[0]),)
    models = [onnx.load_from_string(deployable(stages[0]))]
    for stage in stages[1:]:
        after = onnx.load_from_string(stage)
        if _zero_point(models[-1].graph, after.graph.input[0].name) == 0:
            _mark_input_as_non_negative(after)
        models.append(onnx.load_from_string(deployable(bytes(after.SerializeToString()))))
    for before, after in pairwise(models):
        _join(before.graph, after.graph, channels_last)
    return tuple(bytes(model.SerializeToString(deterministic=True)) for model in models)


def _mark_input_as_non_negative(model: "ModelProto") -> None:
    """Adds a ReLU after the input, from which `deployable` sees that features are not negative; `_join` removes it."""
    from onnx import helper

    tensor = model.graph.input[0].name
    for node in _readers(model.graph, tensor):
        node.input[list(node.input).index(tensor)] = f"{tensor}/positive"
    model.graph.node.insert(0, helper.make_node("Relu", [tensor], [f"{tensor}/positive"], f"{tensor}/Relu"))


def _join(before: "GraphProto", after: "GraphProto", channels_last: bool) -> None:
    """Makes two neighbouring stages pass integers, where both of them quantize the features."""
    tensor = after.input[0].name
    producer = _quantized_producer(before, tensor)
    clamp = next((node for node in _readers(after, tensor) if node.name == f"{tensor}/Relu"), None)
    readers = _readers(after, clamp.output[0] if clamp is not None else tensor)
    if clamp is not None:
        for node in readers:
            node.input[list(node.input).index(clamp.output[0])] = tensor
        after.node.remove(clamp)
    if producer is None or [node.op_type for node in readers] != ["QuantizeLinear"]:
        return
    (reader,) = readers
    for ours, theirs in zip(producer.input[1:], reader.input[1:], strict=True):
        value = _initializer(after, theirs)
        value.CopyFrom(_initializer(before, ours))
        value.name = theirs
    last = channels_last and _is_between_int8(before, producer, after, reader)
    _return_integers(before, producer, last)
    _read_integers(after, reader, last)


def _return_integers(graph: "GraphProto", producer: "NodeProto", channels_last: bool) -> None:
    """Makes a stage return its features before they are dequantized."""
    from onnx import TensorProto, helper

    tensor, quantized = producer.output[0], producer.input[0]
    info = next(info for info in graph.output if info.name == tensor)
    dims = [dim.dim_param or dim.dim_value for dim in info.type.tensor_type.shape.dim]
    if not _readers(graph, tensor):
        graph.node.remove(producer)
    if channels_last:
        moved = quantized + CHANNELS_LAST
        graph.node.append(helper.make_node("Transpose", [quantized], [moved], f"{moved}/Transpose", perm=_TO_LAST))
        quantized = moved
        dims = [dims[axis] for axis in _TO_LAST]
    info.CopyFrom(helper.make_tensor_value_info(quantized, TensorProto.UINT8, dims))


def _read_integers(graph: "GraphProto", reader: "NodeProto", channels_last: bool) -> None:
    """Makes a stage read features that are quantized already."""
    from onnx import TensorProto, helper

    info, quantized = graph.input[0], reader.output[0]
    dims = [dim.dim_param or dim.dim_value for dim in info.type.tensor_type.shape.dim]
    graph.node.remove(reader)
    source = quantized
    if channels_last:
        source, dims = quantized + CHANNELS_LAST, [dims[axis] for axis in _TO_LAST]
        back = helper.make_node("Transpose", [source], [quantized], f"{source}/Transpose", perm=_TO_FIRST)
        graph.node.insert(0, back)
    info.CopyFrom(helper.make_tensor_value_info(source, TensorProto.UINT8, dims))


def _zero_point(graph: "GraphProto", tensor: str) -> int | None:
    """Returns the zero point of a tensor that is dequantized from u8; None for any other tensor."""
    from onnx import numpy_helper

    producer = _quantized_producer(graph, tensor)
    return None if producer is None else int(numpy_helper.to_array(_initializer(graph, producer.input[2])))


def _quantized_producer(graph: "GraphProto", tensor: str) -> "NodeProto | None":
    """Returns the node that dequantizes a tensor from u8, if it is quantized in the same file; else None."""
    from onnx import TensorProto

    producer = _producer(graph, tensor)
    if producer is None or producer.op_type != "DequantizeLinear":
        return None
    quantizer = _producer(graph, producer.input[0])
    is_u8 = quantizer is not None and _initializer(graph, producer.input[2]).data_type == TensorProto.UINT8
    return producer if is_u8 else None


def _is_between_int8(before: "GraphProto", producer: "NodeProto", after: "GraphProto", reader: "NodeProto") -> bool:
    """Returns whether feature maps come from int8 convolutions only, and are read by at least one."""
    info = next(info for info in before.output if info.name == producer.output[0])
    if len(info.type.tensor_type.shape.dim) != len(_TO_LAST):
        return False
    producers = list(_convolutions_before(before, producer.input[0]))
    floats = [node.output[0] for node in _readers(after, reader.output[0])]
    readers = [node for tensor in floats for node in _readers(after, tensor) if node.op_type == "Conv"]
    return (
        bool(producers)
        and all(_is_int8(before, node) for node in producers)
        and any(_is_int8(after, node) for node in readers)
    )


def _convolutions_before(graph: "GraphProto", tensor: str) -> Iterator["NodeProto"]:
    """Yields the last convolution on each path to a tensor."""
    pending: list[str] = [tensor]
    seen: set[str] = set()
    while pending:
        node = _producer(graph, pending.pop())
        if node is None or node.name in seen:
            continue
        seen.add(node.name)
        if node.op_type == "Conv":
            yield node
        else:
            pending += node.input


def _is_int8(graph: "GraphProto", convolution: "NodeProto") -> bool:
    weight = _producer(graph, convolution.input[1])
    return weight is not None and weight.op_type == "DequantizeLinear"


def _producer(graph: "GraphProto", tensor: str) -> "NodeProto | None":
    return next((node for node in graph.node if tensor in node.output), None)


def _readers(graph: "GraphProto", tensor: str) -> list["NodeProto"]:
    return [node for node in graph.node if tensor in node.input]


def _initializer(graph: "GraphProto", name: str) -> "TensorProto":
    value: TensorProto = next(tensor for tensor in graph.initializer if tensor.name == name)
    return value
