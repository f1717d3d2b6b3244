"""Stages that hand their features on as integers, in the order of axes in which int8 convolutions compute.

Where a network is cut at an exit, the features that leave one file and enter the next carry Q/DQ on both sides. In
float they are dequantized at the end of one file and quantized at the start of the next, and a runtime that computes
int8 convolutions channels-last turns them around twice.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

CHANNELS_LAST = "/channels_last"
"""The end of the name of features whose channels are the last axis."""
_TO_LAST, _TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)


def integer_seams(
    stages: Sequence[bytes], deployable: Callable[[bytes], bytes], channels_last: bool
) -> tuple[bytes, ...]:
    """Returns deployed stages that hand u8 features on, with one scale and zero point at both ends.

    Features that only one side quantizes stay float, and so do those that are not u8 once they are deployed.

    Args:
        stages: portable files, each of which reads the first output of the one before it.
        deployable: makes a portable file what is deployed.
        channels_last: whether features between int8 convolutions are handed on with the channels as the last axis.
    """
    import onnx

    if len(stages) == 1:
        return (deployable(stages[0]),)
    made = [onnx.load_from_string(deployable(stages[0]))]
    for stage in stages[1:]:
        after = onnx.load_from_string(stage)
        if _zero_point(made[-1].graph, after.graph.input[0].name) == 0:
            _clamp_input(after)
        made.append(onnx.load_from_string(deployable(bytes(after.SerializeToString()))))
    for before, after in pairwise(made):
        _join(before.graph, after.graph, channels_last)
    return tuple(bytes(model.SerializeToString(deterministic=True)) for model in made)


def _clamp_input(model: "ModelProto") -> None:
    """Puts a ReLU behind the input: it tells that features are never negative, and `_join` takes it out again."""
    from onnx import helper

    tensor = model.graph.input[0].name
    for node in _readers(model.graph, tensor):
        node.input[list(node.input).index(tensor)] = f"{tensor}/positive"
    model.graph.node.insert(0, helper.make_node("Relu", [tensor], [f"{tensor}/positive"], f"{tensor}/Relu"))


def _join(before: "GraphProto", after: "GraphProto", channels_last: bool) -> None:
    tensor = after.input[0].name
    maker = _quantized_maker(before, tensor)
    clamp = next((node for node in _readers(after, tensor) if node.name == f"{tensor}/Relu"), None)
    readers = _readers(after, clamp.output[0] if clamp is not None else tensor)
    if clamp is not None:
        for node in readers:
            node.input[list(node.input).index(clamp.output[0])] = tensor
        after.node.remove(clamp)
    if maker is None or [node.op_type for node in readers] != ["QuantizeLinear"]:
        return
    (reader,) = readers
    for ours, theirs in zip(maker.input[1:], reader.input[1:], strict=True):
        value = _initializer(after, theirs)
        value.CopyFrom(_initializer(before, ours))
        value.name = theirs
    last = channels_last and _is_between_int8(before, maker, after, reader)
    _return_integers(before, maker, last)
    _read_integers(after, reader, last)


def _return_integers(graph: "GraphProto", maker: "NodeProto", channels_last: bool) -> None:
    """Makes a stage return features as they are before they are dequantized."""
    from onnx import TensorProto, helper

    tensor, quantized = maker.output[0], maker.input[0]
    info = next(info for info in graph.output if info.name == tensor)
    dims = [dim.dim_param or dim.dim_value for dim in info.type.tensor_type.shape.dim]
    if not _readers(graph, tensor):
        graph.node.remove(maker)
    if channels_last:
        turned = quantized + CHANNELS_LAST
        graph.node.append(helper.make_node("Transpose", [quantized], [turned], f"{turned}/Transpose", perm=_TO_LAST))
        quantized, dims = turned, [dims[axis] for axis in _TO_LAST]
    info.CopyFrom(helper.make_tensor_value_info(quantized, TensorProto.UINT8, dims))


def _read_integers(graph: "GraphProto", reader: "NodeProto", channels_last: bool) -> None:
    """Makes a stage read features as they are once they are quantized."""
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
    """Returns the zero point of a tensor that comes out of u8; None where it does not."""
    from onnx import numpy_helper

    maker = _quantized_maker(graph, tensor)
    return None if maker is None else int(numpy_helper.to_array(_initializer(graph, maker.input[2])))


def _quantized_maker(graph: "GraphProto", tensor: str) -> "NodeProto | None":
    """Returns the node that dequantizes a tensor from u8 which was quantized in the same file; None without one."""
    from onnx import TensorProto

    maker = _maker(graph, tensor)
    if maker is None or maker.op_type != "DequantizeLinear":
        return None
    quantizer = _maker(graph, maker.input[0])
    is_u8 = quantizer is not None and _initializer(graph, maker.input[2]).data_type == TensorProto.UINT8
    return maker if is_u8 else None


def _is_between_int8(before: "GraphProto", maker: "NodeProto", after: "GraphProto", reader: "NodeProto") -> bool:
    """Returns whether feature maps come from int8 convolutions alone and are read by one."""
    info = next(info for info in before.output if info.name == maker.output[0])
    if len(info.type.tensor_type.shape.dim) != len(_TO_LAST):
        return False
    makers = list(_convolutions_before(before, maker.input[0]))
    floats = [node.output[0] for node in _readers(after, reader.output[0])]
    readers = [node for tensor in floats for node in _readers(after, tensor) if node.op_type == "Conv"]
    return (
        bool(makers)
        and all(_is_int8(before, node) for node in makers)
        and any(_is_int8(after, node) for node in readers)
    )


def _convolutions_before(graph: "GraphProto", tensor: str) -> Iterator["NodeProto"]:
    """Yields the last convolutions on every way to a tensor."""
    todo: list[str] = [tensor]
    seen: set[str] = set()
    while todo:
        node = _maker(graph, todo.pop())
        if node is None or node.name in seen:
            continue
        seen.add(node.name)
        if node.op_type == "Conv":
            yield node
        else:
            todo += node.input


def _is_int8(graph: "GraphProto", convolution: "NodeProto") -> bool:
    weight = _maker(graph, convolution.input[1])
    return weight is not None and weight.op_type == "DequantizeLinear"


def _maker(graph: "GraphProto", tensor: str) -> "NodeProto | None":
    return next((node for node in graph.node if tensor in node.output), None)


def _readers(graph: "GraphProto", tensor: str) -> list["NodeProto"]:
    return [node for node in graph.node if tensor in node.input]


def _initializer(graph: "GraphProto", name: str) -> "TensorProto":
    found: TensorProto = next(tensor for tensor in graph.initializer if tensor.name == name)
    return found
