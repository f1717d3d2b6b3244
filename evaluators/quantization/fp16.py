"""Half precision for any choice of layers: fp16 initializers, and Cast nodes where fp16 meets float.

Precisions are written into the file, so that a strongly typed runtime runs each layer in its precision. Operators after
a layer (activations, additions, pooling) run in fp16 if all of their inputs are fp16. A stage's inputs and outputs stay
float, and so does every tensor that carries Q/DQ.
"""

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from evaluators.graph.template import HALF, Arrays
from evaluators.quantization.int8 import ABSORBED, FOLLOWING, VALUE_PRESERVING
from spaces.errors import QuantizationError

_BETWEEN = ABSORBED | VALUE_PRESERVING | FOLLOWING | {"Mul", "Sigmoid", "HardSigmoid", "HardSwish"}
"""Operators that run in fp16 if all of their inputs are fp16."""
_LARGEST = float(np.finfo(np.float16).max)


class HalfWriter:
    """Writes layers of one network's graph in fp16.

    Args:
        nodes: the whole graph, in topological order.
        layers: the node of each layer that may be fp16.
    """

    def __init__(self, nodes: Sequence[NodeProto], layers: Mapping[str, str]) -> None:
        self._nodes = tuple(nodes)
        self._layers = dict(layers)
        self._names = {node: layer for layer, node in layers.items()}
        self._constants = _constants(nodes)
        self._computed = {output for node in nodes for output in node.output} - set(self._constants)

    def place(self, fp16_layers: Iterable[str], quantized: AbstractSet[str]) -> frozenset[str]:
        """Returns the nodes that run in fp16 if these layers do.

        Args:
            fp16_layers: the layers' names.
            quantized: the tensors that carry Q/DQ, which stay float.
        """
        placed = {self._layers[layer] for layer in fp16_layers}
        halves: set[str] = set()
        for node in self._nodes:
            if node.name in placed or self._is_fed_by(node, halves):
                placed.add(node.name)
                halves |= set(node.output) - quantized
        return frozenset(placed)

    def _is_fed_by(self, node: NodeProto, halves: set[str]) -> bool:
        computed = [name for name in _float_inputs(node) if name in self._computed]
        return node.op_type in _BETWEEN and bool(computed) and halves.issuperset(computed)

    def write(
        self, nodes: Sequence[NodeProto], placed: AbstractSet[str], arrays: Arrays, outputs: Iterable[str]
    ) -> tuple[list[NodeProto], Arrays]:
        """Returns a stage's nodes with fp16 and Cast in place, and its initializers.

        Args:
            nodes: the stage's, with Q/DQ in place; those of `placed` are rewritten.
            placed: the nodes that run in fp16.
            arrays: the value of every initializer.
            outputs: the stage's outputs.

        Raises:
            QuantizationError: a layer's weight or bias exceeds fp16's range.
        """
        floats = {name for node in nodes if node.name not in placed for name in node.input} | set(outputs)
        values: Arrays = dict(arrays)
        halves: set[str] = set()
        written: list[NodeProto] = []
        for node in nodes:
            if node.name not in placed:
                written.append(node)
                continue
            written += self._casts_before(node, values, halves)
            halves |= set(node.output)
            _rename(node, halves)
            written.append(node)
            written += [_cast(name, TensorProto.FLOAT) for name in _originals(node) if name in floats]
        return _without_idle_constants(written) if placed else written, values

    def _casts_before(self, node: NodeProto, values: Arrays, halves: set[str]) -> list[NodeProto]:
        """Returns the casts that a node's inputs need; adds fp16 constants to `values` and all names to `halves`."""
        casts = []
        for name in _float_inputs(node):
            if not name or name in halves:
                continue
            value = values.get(name, self._constants.get(name))
            if value is None:
                casts.append(_cast(name, TensorProto.FLOAT16))
            else:
                values[name + HALF] = self._half(value, node)
            halves.add(name)
        return casts

    def _half(self, value: NDArray[np.generic], node: NodeProto) -> NDArray[np.float16]:
        """Returns a constant in fp16; those that are not of a layer, such as a Clip's bound, may become infinite."""
        largest = float(np.abs(value).max(initial=0))
        if node.name in self._names and not largest <= _LARGEST:
            raise QuantizationError(
                f"the weights of an fp16 layer are numbers between -{_LARGEST:g} and {_LARGEST:g},"
                f" got {largest:g} in {self._names[node.name]!r}; give it another precision"
            )
        with np.errstate(over="ignore"):
            return value.astype(np.float16)


def _constants(nodes: Sequence[NodeProto]) -> Arrays:
    return {
        node.output[0]: numpy_helper.to_array(node.attribute[0].t)
        for node in nodes
        if node.op_type == "Constant" and node.attribute[0].name == "value"
    }


def _float_inputs(node: NodeProto) -> list[str]:
    """Returns a node's inputs that have its precision: all except shapes and indices."""
    return list(node.input[:1] if node.op_type in ("Reshape", "Slice", "Split") else node.input)


def _rename(node: NodeProto, halves: AbstractSet[str]) -> None:
    for index, name in enumerate(node.input):
        if name in halves:
            node.input[index] = name + HALF
    for index, name in enumerate(node.output):
        node.output[index] = name + HALF


def _originals(node: NodeProto) -> list[str]:
    return [name.removesuffix(HALF) for name in node.output]


def _cast(name: str, to: int) -> NodeProto:
    """Returns the node that casts a float tensor to fp16, or back."""
    source, result = (name, name + HALF) if to == TensorProto.FLOAT16 else (name + HALF, name)
    return helper.make_node("Cast", [source], [result], f"{name}/Cast", to=to)


def _without_idle_constants(nodes: Sequence[NodeProto]) -> list[NodeProto]:
    """Returns the nodes without constants that are no longer read, because their readers have fp16 copies."""
    read = {name for node in nodes for name in node.input}
    return [node for node in nodes if node.op_type != "Constant" or node.output[0] in read]
