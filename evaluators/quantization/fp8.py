"""FP8 (E4M3) for any choice of layers: Q/DQ around what a layer reads, symmetric, in FLOAT8E4M3FN.

Only a layer's input and weight are quantized, the input per tensor and the weight per output channel; the output and
the bias are float. A runtime fuses the next layer's Q into the layer before it, if that has no other reader.
Source: TensorRT documentation, Quantization schemes: `cast_to_fp8(clip(x / scale, -448, 448))`, ties to even.
"""

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, helper

from evaluators.graph.template import DEQUANTIZED, Arrays
from evaluators.quantization.int8 import Ranges, output_axis

OPSET = 19
"""The first opset in which QuantizeLinear supports FLOAT8E4M3FN."""
LARGEST = 448.0
"""The largest number in E4M3."""

_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
_TINY = 1e-8


class Float8Writer:
    """Writes layers of one network's graph in fp8.

    Args:
        layers: the name of the node of each layer that may be fp8.
    """

    def __init__(self, layers: Mapping[str, str]) -> None:
        self._layers = dict(layers)

    def place(self, fp8_layers: Iterable[str]) -> frozenset[str]:
        """Returns the names of the nodes of some layers, which then run in fp8."""
        return frozenset(self._layers[layer] for layer in fp8_layers)

    def write(
        self, nodes: Sequence[NodeProto], placed: AbstractSet[str], arrays: Arrays, ranges: Ranges
    ) -> tuple[list[NodeProto], Arrays]:
        """Returns a stage's nodes with fp8 Q/DQ in place, and its initializers.

        Args:
            nodes: the stage's nodes, with int8 Q/DQ in place; those in `placed` are changed in place.
            placed: the names of the nodes that run in fp8.
            arrays: the value of every initializer.
            ranges: of the activations.
        """
        values: Arrays = dict(arrays)
        written: list[NodeProto] = []
        quantized: set[str] = set()
        for node in nodes:
            if node.name in placed:
                tensor = node.input[0]
                if tensor not in quantized:  # its readers share one Q/DQ pair
                    written += _quantize_and_dequantize(tensor, ranges, values)
                    quantized.add(tensor)
                node.input[0] = f"{tensor}/fp8{DEQUANTIZED}"
                written.append(_dequantized_weight(node, values))
            written.append(node)
        return written, values


def _quantize_and_dequantize(tensor: str, ranges: Ranges, values: Arrays) -> list[NodeProto]:
    """Returns the Q/DQ pair of a tensor; scale and zero point are added to `values`."""
    low, high = ranges[tensor.removesuffix(DEQUANTIZED)]
    name = f"{tensor}/fp8"
    scale = f"{name}/scale"
    zero_point = f"{name}/zero_point"
    quantized = f"{name}/q"
    result = name + DEQUANTIZED
    values[scale] = np.array(max(-low, high, _TINY) / LARGEST, dtype=np.float32)
    values[zero_point] = np.zeros((), dtype=_E4M3)
    return [
        helper.make_node("QuantizeLinear", [tensor, scale, zero_point], [quantized], f"{name}/QuantizeLinear"),
        helper.make_node("DequantizeLinear", [quantized, scale, zero_point], [result], f"{name}/DequantizeLinear"),
    ]


def _dequantized_weight(node: NodeProto, values: Arrays) -> NodeProto:
    """Returns the DequantizeLinear of a node's weight; the fp8 weight and its scales are added to `values`."""
    name = node.input[1]
    axis = output_axis(node)
    values[f"{name}/fp8"], values[f"{name}/fp8/scale"] = fp8_weight(values[name], axis)
    values[f"{name}/fp8/zero_point"] = np.zeros(values[name].shape[axis], dtype=_E4M3)
    node.input[1] = name + DEQUANTIZED
    inputs = [f"{name}/fp8", f"{name}/fp8/scale", f"{name}/fp8/zero_point"]
    return helper.make_node("DequantizeLinear", inputs, [name + DEQUANTIZED], f"{name}/DequantizeLinear", axis=axis)


def fp8_weight(weight: NDArray[np.generic], axis: int) -> tuple[NDArray[np.generic], NDArray[np.float32]]:
    """Returns a weight in E4M3 and its scales `(channels,)` along `axis`: the channel's largest magnitude over 448."""
    values = weight.astype(np.float32)
    others = tuple(index for index in range(values.ndim) if index != axis)
    scale = np.maximum(np.abs(values).max(axis=others) / LARGEST, _TINY).astype(np.float32)
    shape = [-1 if index == axis else 1 for index in range(values.ndim)]
    return np.clip(values / scale.reshape(shape), -LARGEST, LARGEST).astype(_E4M3), scale


def in_opset(nodes: Sequence[NodeProto], values: Arrays) -> list[NodeProto]:
    """Returns nodes of opset 17 in the form of opsets 19 and 21: the axes of a reduction are an input.

    Args:
        nodes: of a stage.
        values: of its initializers; the axes are added.
    """
    return [_with_axes_as_input(node, values) if node.op_type.startswith("Reduce") else node for node in nodes]


def _with_axes_as_input(node: NodeProto, values: Arrays) -> NodeProto:
    axes = [list(attribute.ints) for attribute in node.attribute if attribute.name == "axes"]
    if not axes:
        return node
    converted = NodeProto()
    converted.CopyFrom(node)
    other_attributes = [attribute for attribute in converted.attribute if attribute.name != "axes"]
    del converted.attribute[:]
    converted.attribute.extend(other_attributes)
    converted.input.append(f"{node.name}/axes")
    values[f"{node.name}/axes"] = np.array(axes[0], dtype=np.int64)
    return converted
