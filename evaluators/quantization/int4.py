"""4-bit weights for any choice of layers: packed INT4 initializers, dequantized per output channel.

Only storage is in 4 bits: activations and arithmetic stay float. Levels are symmetric, -7 to 7 times the channel's
scale, and include 0; values are rounded to the nearest level.
Source: ONNX operators, DequantizeLinear, from opset 21 on.
"""

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet

import ml_dtypes
import numpy as np
from onnx import NodeProto, helper

from evaluators.graph.template import DEQUANTIZED, Arrays
from evaluators.quantization.int8 import output_axis, quantize_weight

OPSET = 21
"""The first in which DequantizeLinear knows INT4."""
LARGEST = 7
"""The largest level; -8 is not used."""

_INT4 = np.dtype(ml_dtypes.int4)


class Int4Writer:
    """Writes the weights of one network's layers in 4 bits.

    Args:
        layers: the node of each layer that may be stored in 4 bits.
    """

    def __init__(self, layers: Mapping[str, str]) -> None:
        self._layers = dict(layers)

    def place(self, int4_layers: Iterable[str]) -> frozenset[str]:
        """Returns the nodes whose weights are stored in 4 bits: those of these layers."""
        return frozenset(self._layers[layer] for layer in int4_layers)

    def write(
        self, nodes: Sequence[NodeProto], placed: AbstractSet[str], arrays: Arrays
    ) -> tuple[list[NodeProto], Arrays]:
        """Returns a stage's nodes with 4-bit weights in place, and its initializers.

        Args:
            nodes: the stage's, with Q/DQ in place; those of `placed` are rewritten.
            placed: the nodes whose weights are stored in 4 bits.
            arrays: the value of every initializer.
        """
        values: Arrays = dict(arrays)
        written: list[NodeProto] = []
        for node in nodes:
            if node.name in placed:
                written.append(_dequantized_weight(node, values))
            written.append(node)
        return written, values


def _dequantized_weight(node: NodeProto, values: Arrays) -> NodeProto:
    name, axis = node.input[1], output_axis(node)
    grid = quantize_weight(values[name], axis, LARGEST)
    values[f"{name}/int4"], values[f"{name}/int4/scale"] = grid.values.astype(_INT4), grid.scale
    node.input[1] = name + DEQUANTIZED
    inputs = [f"{name}/int4", f"{name}/int4/scale"]
    return helper.make_node("DequantizeLinear", inputs, [name + DEQUANTIZED], f"{name}/DequantizeLinear", axis=axis)
