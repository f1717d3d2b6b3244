"""Explicit Q/DQ for any choice of int8 layers, from ranges that are already known.

The form is the one that every runtime reads: symmetric s8 activations per tensor, symmetric s8 weights per output
channel, bias in float. What a runtime fuses is quantized as a whole: a convolution with its ReLU, additions and pooling
whose inputs come from int8 layers. A runtime that runs a residual addition inside the convolution before it gets that
convolution's output without Q/DQ.
"""

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, helper

from evaluators.graph.stages import Stage
from evaluators.graph.template import DEQUANTIZED, LAYER_OPS, QUANTIZED, Arrays

Ranges = Mapping[str, tuple[float, float]]
"""The lowest and highest value seen of each activation tensor."""

ABSORBED = {"Relu", "Clip"}
"""Run inside the layer before them, so Q/DQ comes after."""
VALUE_PRESERVING = {"MaxPool", "Flatten", "Reshape", "Identity", "Transpose", "Slice", "Split"}
"""Move values without changing them, so input and output share a scale."""
FOLLOWING = frozenset({"Add", "Concat", "GlobalAveragePool", "AveragePool"})
"""Run in int8 when everything that feeds them does, on every target; some targets run more so."""
_POOLING = {"GlobalAveragePool", "AveragePool"}
"""Are slower in int8 than in float, unless what reads them would have to quantize their output."""
_JOINING = {"Add", "Concat", "Mul"}
"""Read several tensors."""

_TINY = 1e-8


def moves_values(node: NodeProto) -> bool:
    """Returns whether a node gives only values that it read, or zeros, so that input and output share a scale."""
    if node.op_type != "Pad":
        return node.op_type in VALUE_PRESERVING
    mode = next((attribute.s for attribute in node.attribute if attribute.name == "mode"), b"constant")
    return mode != b"constant" or not any(node.input[2:])


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight on its grid.

    Args:
        values: s8, in the weight's shape.
        scale: of each output channel, `(channels,)`, positive.
    """

    values: NDArray[np.int8]
    scale: NDArray[np.float32]


Grids = Mapping[str, QuantizedWeight]
"""Weights that something learned has put on their grids, by the name of the initializer."""
NO_GRIDS: Grids = MappingProxyType({})
"""Every weight is rounded to the nearest step."""


@dataclass(frozen=True)
class Placement:
    """Which nodes run in int8 and which tensors carry Q/DQ for it."""

    nodes: frozenset[str]
    tensors: frozenset[str]


class Quantizer:
    """Places Q/DQ in one network's graph.

    Args:
        nodes: the whole graph, in topological order.
        layers: the node of each layer that may be int8.
        outputs: the graph's outputs, which stay float.
        weight_bits: 8, or 7 where the target's accumulating instruction would overflow.
        per_channel: whether each output channel of a weight has a scale of its own.
        quantized_add: which inputs of an addition carry Q/DQ: `both`, or the `residual` one only where the other comes
            straight from an int8 convolution.
        following: the operators that run in int8 when everything that feeds them does.
    """

    def __init__(
        self,
        nodes: Sequence[NodeProto],
        layers: Mapping[str, str],
        outputs: Iterable[str],
        weight_bits: int,
        quantized_add: Literal["both", "residual"] = "both",
        per_channel: bool = True,
        following: Iterable[str] = FOLLOWING,
    ) -> None:
        self._following = frozenset(following)
        self._nodes = tuple(nodes)
        self._layers = dict(layers)
        self._outputs = frozenset(outputs)
        self.weight_limit = 2 ** (weight_bits - 1) - 1
        self.per_channel = per_channel
        self._producers = {output: node for node in nodes for output in node.output}
        self._consumers: dict[str, list[NodeProto]] = {}
        for node in nodes:
            for name in node.input:
                self._consumers.setdefault(name, []).append(node)
        self._fused = self._fused_inputs() if quantized_add == "residual" else set()

    def activations(self) -> list[str]:
        """Returns every tensor whose range a placement may ask for."""
        able = self._quantized(self._layers)
        wanted = self._spread({tensor for node in self._nodes if node.name in able for tensor in self._around(node)})
        names = dict.fromkeys(name for node in self._nodes for name in (*node.input, *node.output))
        return [name for name in names if name in wanted]

    def place(self, int8_layers: Iterable[str]) -> Placement:
        """Returns where Q/DQ goes when these layers are int8."""
        quantized = self._quantized(int8_layers)
        fused = {tensor for tensor in self._fused if self._producers[tensor].name in quantized}
        tensors = {tensor for node in self._nodes if node.name in quantized for tensor in self._around(node)}
        return Placement(frozenset(quantized), frozenset(self._spread(tensors - fused) - self._outputs))

    def _quantized(self, int8_layers: Iterable[str]) -> set[str]:
        """Returns the nodes that run in int8 when these layers do."""
        quantized = {self._layers[layer] for layer in int8_layers}
        for node in self._nodes:
            is_fed = node.op_type in self._following and self._is_fed_by(node, quantized)
            if is_fed and self._is_read_in_int8(node, quantized):
                quantized.add(node.name)
        return quantized

    def _is_read_in_int8(self, node: NodeProto, quantized: AbstractSet[str]) -> bool:
        """Returns whether what comes next may be int8 too: in front of a float node some operators gain nothing."""
        following = {reader.op_type for reader in self._consumers.get(node.output[0], [])}
        if node.op_type == "Concat":
            return not following.isdisjoint({*LAYER_OPS, *ABSORBED, *VALUE_PRESERVING, *self._following})
        readers = self._readers(node.output[0]) if node.op_type in _POOLING else []
        return not readers or any(reader.op_type in self._following or reader.name in quantized for reader in readers)

    def _readers(self, tensor: str) -> list[NodeProto]:
        """Returns the nodes that read a tensor, behind those that only move its values."""
        found: list[NodeProto] = []
        todo, seen = [tensor], {tensor}
        while todo:
            for reader in self._consumers.get(todo.pop(), []):
                if moves_values(reader):
                    todo += [name for name in reader.output if name not in seen]
                    seen.update(reader.output)
                else:
                    found.append(reader)
        return found

    def boundaries(self, precisions: Mapping[str, str], among: AbstractSet[str]) -> int:
        """Returns how many layers read from a node of another precision.

        Args:
            precisions: of each node that is not fp32.
            among: the nodes that are there.
        """
        layers = among & set(self._layers.values())
        return sum(self._is_boundary(node, precisions) for node in self._nodes if node.name in layers)

    def _source(self, tensor: str, between: AbstractSet[str] = ABSORBED) -> NodeProto | None:
        """Returns the node that a tensor comes from, behind those in between and those that only move values."""
        node = self._producers.get(tensor)
        while node is not None and (node.op_type in between or moves_values(node)):
            node = self._producers.get(node.input[0])
        return node

    def _is_fed_by(self, node: NodeProto, quantized: set[str]) -> bool:
        sources = [self._source(name) for name in self._data(node)]
        return all(source is not None and source.name in quantized for source in sources)

    def _is_boundary(self, node: NodeProto, precisions: Mapping[str, str]) -> bool:
        # Pooling runs in what comes before it or in float: either way the layer before it is what matters.
        source = self._source(node.input[0], ABSORBED | _POOLING)
        before = precisions.get(source.name, "fp32") if source is not None else "fp32"
        return before != precisions.get(node.name, "fp32")

    def _fused_inputs(self) -> set[str]:
        """Returns the input of each addition whose convolution takes it in: the longest branch that ends in one."""
        fused = set()
        for node in self._nodes:
            inputs = [tensor for tensor in node.input if self._is_convolution_for_one(tensor)]
            if node.op_type == "Add" and inputs:
                fused.add(max(inputs, key=partial(self._branch_length, node)))
        return fused

    def _is_convolution_for_one(self, tensor: str) -> bool:
        producer = self._producers.get(tensor)
        return producer is not None and producer.op_type == "Conv" and len(self._consumers[tensor]) == 1

    def _branch_length(self, addition: NodeProto, tensor: str) -> int:
        """Returns how many layers lead to one input of an addition and to none of its others."""
        others = [self._layers_before(other) for other in addition.input if other != tensor]
        return len(self._layers_before(tensor).difference(*others))

    def _layers_before(self, tensor: str) -> set[str]:
        seen = set()
        found = set()
        todo = [tensor]
        while todo:
            node = self._producers.get(todo.pop())
            if node is None or node.name in seen:
                continue
            seen.add(node.name)
            if node.op_type in LAYER_OPS:
                found.add(node.name)
            todo += list(node.input)
        return found

    def _around(self, node: NodeProto) -> list[str]:
        """Returns the tensors that carry Q/DQ when a node is int8."""
        if node.op_type == "MatMul":
            # Its bias is added by the next node: runtimes go on in float, at no loss.
            return [node.input[0]]
        output = node.output[0]
        while len(following := self._consumers.get(output, [])) == 1 and following[0].op_type in ABSORBED:
            output = following[0].output[0]
        return [*self._data(node), output]

    @staticmethod
    def _data(node: NodeProto) -> list[str]:
        """Returns the tensors that a node computes with, without its weights, slopes or bounds."""
        return list(node.input) if node.op_type in _JOINING else [node.input[0]]

    def _spread(self, tensors: set[str]) -> set[str]:
        spread = set(tensors)
        for node in reversed(self._nodes):
            if moves_values(node) and not spread.isdisjoint(node.output):
                spread.add(node.input[0])
        for node in self._nodes:
            if moves_values(node) and node.input[0] in spread:
                spread.update(node.output)
        return spread

    def origin(self, tensor: str) -> str:
        """Returns the tensor whose scale an activation has: values that only move share one."""
        node = self._producers.get(tensor)
        while node is not None and moves_values(node):
            tensor = node.input[0]
            node = self._producers.get(tensor)
        return tensor

    def _scale(self, tensor: str, ranges: Ranges) -> NDArray[np.float32]:
        low, high = ranges[self.origin(tensor)]
        return np.array(max(-low, high, _TINY * 127) / 127, dtype=np.float32)

    def write(
        self, stage: Stage, placement: Placement, arrays: Arrays, ranges: Ranges, grids: Grids = NO_GRIDS
    ) -> tuple[list[NodeProto], Arrays]:
        """Returns a stage's nodes with Q/DQ in place, and its initializers.

        Args:
            stage: which part of the graph.
            placement: where Q/DQ goes.
            arrays: the value of every initializer.
            ranges: of the activations.
            grids: weights that are on their grids already; any other is rounded to the nearest step.
        """
        nodes: list[NodeProto] = []
        values: Arrays = dict(arrays)
        renamed: dict[str, str] = {}
        if stage.input in placement.tensors:
            # An input keeps its name, so its readers move; elsewhere the writer moves and the readers keep theirs.
            renamed[stage.input] = stage.input + DEQUANTIZED
            nodes += self._pair(stage.input, stage.input, renamed[stage.input], ranges, values)
        for original in stage.nodes:
            node = NodeProto()
            node.CopyFrom(original)
            for index, name in enumerate(node.input):
                node.input[index] = renamed.get(name, name)
            if node.name in placement.nodes and node.op_type in LAYER_OPS:
                nodes.append(self._quantize_weight(node, values, grids))
            pairs = []
            for index, name in enumerate(node.output):
                if name in placement.tensors:
                    node.output[index] = name + "/float"
                    pairs += self._pair(name, name + "/float", name, ranges, values)
            nodes += [node, *pairs]
        return nodes, values

    def _pair(self, tensor: str, source: str, result: str, ranges: Ranges, values: Arrays) -> list[NodeProto]:
        scale = f"{tensor}/scale"
        zero_point = f"{tensor}/zero_point"
        quantized = tensor + QUANTIZED
        values[scale] = self._scale(tensor, ranges)
        values[zero_point] = np.array(0, dtype=np.int8)
        return [
            helper.make_node("QuantizeLinear", [source, scale, zero_point], [quantized], f"{tensor}/QuantizeLinear"),
            helper.make_node(
                "DequantizeLinear", [quantized, scale, zero_point], [result], f"{tensor}/DequantizeLinear"
            ),
        ]

    def _quantize_weight(self, node: NodeProto, values: Arrays, grids: Grids) -> NodeProto:
        name = node.input[1]
        axis = output_axis(node)
        grid = grids.get(name) or self.nearest(values[name], axis)
        values[name + QUANTIZED], values[f"{name}/scale"] = grid.values, grid.scale
        values[f"{name}/zero_point"] = np.zeros(len(grid.scale), dtype=np.int8)
        node.input[1] = name + DEQUANTIZED
        inputs = [name + QUANTIZED, f"{name}/scale", f"{name}/zero_point"]
        return helper.make_node("DequantizeLinear", inputs, [name + DEQUANTIZED], f"{name}/DequantizeLinear", axis=axis)

    def nearest(self, weight: NDArray[np.generic], axis: int) -> QuantizedWeight:
        """Returns a weight rounded to the nearest steps of its grid, whose output channels lie along `axis`."""
        return quantize_weight(weight, axis, self.weight_limit, self.per_channel)


def output_axis(node: NodeProto) -> int:
    """Returns the axis of the output channels in the weight of a convolution or linear layer."""
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return 1 if node.op_type == "MatMul" or (node.op_type == "Gemm" and not transposed) else 0


def quantize_weight(weight: NDArray[np.generic], axis: int, limit: int, per_channel: bool = True) -> QuantizedWeight:
    """Returns a weight in s8 and its scale per channel along `axis`: symmetric, `|q| <= limit`.

    Where channels share a scale it is that of the largest, written once for each of them.
    """
    values = weight.astype(np.float32)
    others = tuple(index for index in range(values.ndim) if index != axis)
    largest = np.abs(values).max(axis=others)
    if not per_channel:
        largest = np.full_like(largest, largest.max(initial=0))
    scale = np.maximum(largest / limit, _TINY).astype(np.float32)
    shape = [-1 if index == axis else 1 for index in range(values.ndim)]
    return QuantizedWeight(np.clip(np.rint(values / scale.reshape(shape)), -limit, limit).astype(np.int8), scale)
