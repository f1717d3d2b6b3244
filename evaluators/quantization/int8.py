"""Writes explicit Q/DQ for any choice of int8 layers, from given activation ranges.

The form is one that every runtime reads: symmetric s8 activations per tensor, symmetric s8 weights per output channel,
bias in float. Operators that a runtime fuses are quantized together: a convolution with its ReLU, additions and pooling
whose inputs come from int8 layers. For a runtime that fuses a residual addition into the convolution before it, that
convolution's output has no Q/DQ.
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
"""The lowest and highest value of each activation tensor."""

ABSORBED = {"Relu", "Clip"}
"""Operators that are fused into the layer before them, so that Q/DQ comes after them."""
VALUE_PRESERVING = {"MaxPool", "Flatten", "Reshape", "Identity", "Transpose", "Slice", "Split"}
"""Operators that move values without changing them, so that input and output share a scale."""
FOLLOWING = frozenset({"Add", "Concat", "GlobalAveragePool", "AveragePool"})
"""Operators that run in int8 if all of their inputs are int8, on every target; some targets have more."""
_POOLING = {"GlobalAveragePool", "AveragePool"}
"""Operators that are slower in int8 than in float, unless the next operator would quantize their output."""
_JOINING = {"Add", "Concat", "Mul"}
"""Operators with several data inputs."""

_TINY = 1e-8
_LARGEST_BIAS = 2.0**28
"""The largest bias in integers: an eighth of what 32 bits hold. Sums of products need room too, and a target that reads
activations as u8 halves their scale."""


def moves_values(node: NodeProto) -> bool:
    """Returns whether a node's outputs are only input values or zeros, so that input and output share a scale."""
    if node.op_type != "Pad":
        return node.op_type in VALUE_PRESERVING
    mode = next((attribute.s for attribute in node.attribute if attribute.name == "mode"), b"constant")
    return mode != b"constant" or not any(node.input[2:])


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantized weight.

    Args:
        values: s8, in the weight's shape.
        scale: the positive scale of each output channel, `(channels,)`.
    """

    values: NDArray[np.int8]
    scale: NDArray[np.float32]


Grids = Mapping[str, QuantizedWeight]
"""Weights that are quantized already, by AdaRound or QAT, by the name of the initializer."""
NO_GRIDS: Grids = MappingProxyType({})
"""Every weight is rounded to the nearest level."""


@dataclass(frozen=True)
class Placement:
    """The nodes that run in int8, and the tensors that carry Q/DQ."""

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
        quantized_add: which inputs of an addition carry Q/DQ: `both`, or the `residual` one only if the other comes
            directly from an int8 convolution.
        following: the operators that run in int8 if all of their inputs are int8.
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
        """Returns every tensor whose range some placement needs."""
        nodes = self._quantized(self._layers)
        needed = self._spread({tensor for node in self._nodes if node.name in nodes for tensor in self._around(node)})
        names = dict.fromkeys(name for node in self._nodes for name in (*node.input, *node.output))
        return [name for name in names if name in needed]

    def place(self, int8_layers: Iterable[str]) -> Placement:
        """Returns the placement of Q/DQ if these layers are int8."""
        quantized = self._quantized(int8_layers)
        fused = {tensor for tensor in self._fused if self._producers[tensor].name in quantized}
        tensors = {tensor for node in self._nodes if node.name in quantized for tensor in self._around(node)}
        return Placement(frozenset(quantized), frozenset(self._spread(tensors - fused) - self._outputs))

    def _quantized(self, int8_layers: Iterable[str]) -> set[str]:
        """Returns the nodes that run in int8 if these layers do."""
        quantized = {self._layers[layer] for layer in int8_layers}
        for node in self._nodes:
            is_fed = node.op_type in self._following and self._is_fed_by(node, quantized)
            if is_fed and self._is_read_in_int8(node, quantized):
                quantized.add(node.name)
        return quantized

    def _is_read_in_int8(self, node: NodeProto, quantized: AbstractSet[str]) -> bool:
        """Returns whether the next node may be int8: before a float node some operators are not worth quantizing."""
        following = {reader.op_type for reader in self._consumers.get(node.output[0], [])}
        if node.op_type == "Concat":
            return not following.isdisjoint({*LAYER_OPS, *ABSORBED, *VALUE_PRESERVING, *self._following})
        readers = self._readers(node.output[0]) if node.op_type in _POOLING else []
        return not readers or any(reader.op_type in self._following or reader.name in quantized for reader in readers)

    def _readers(self, tensor: str) -> list[NodeProto]:
        """Returns the nodes that read a tensor, directly or after nodes that only move its values."""
        readers: list[NodeProto] = []
        todo, seen = [tensor], {tensor}
        while todo:
            for reader in self._consumers.get(todo.pop(), []):
                if moves_values(reader):
                    todo += [name for name in reader.output if name not in seen]
                    seen.update(reader.output)
                else:
                    readers.append(reader)
        return readers

    def boundaries(self, precisions: Mapping[str, str], among: AbstractSet[str]) -> int:
        """Returns the number of layers that read from a node in another precision.

        Args:
            precisions: the precision of each node that is not fp32.
            among: the deployed nodes.
        """
        layers = among & set(self._layers.values())
        return sum(self._is_boundary(node, precisions) for node in self._nodes if node.name in layers)

    def _source(self, tensor: str, between: AbstractSet[str] = ABSORBED) -> NodeProto | None:
        """Returns the node that computes a tensor, before operators in `between` and those that only move values."""
        node = self._producers.get(tensor)
        while node is not None and (node.op_type in between or moves_values(node)):
            node = self._producers.get(node.input[0])
        return node

    def _is_fed_by(self, node: NodeProto, quantized: set[str]) -> bool:
        sources = [self._source(name) for name in self._data(node)]
        return all(source is not None and source.name in quantized for source in sources)

    def _is_boundary(self, node: NodeProto, precisions: Mapping[str, str]) -> bool:
        # Pooling runs in the precision before it or in float; in both cases the layer before it decides.
        source = self._source(node.input[0], ABSORBED | _POOLING)
        before = precisions.get(source.name, "fp32") if source is not None else "fp32"
        return before != precisions.get(node.name, "fp32")

    def _fused_inputs(self) -> set[str]:
        """Returns the input of each addition whose convolution fuses it: the longest branch that ends in one."""
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
        """Returns the number of layers before one input of an addition that are not before its other inputs."""
        others = [self._layers_before(other) for other in addition.input if other != tensor]
        return len(self._layers_before(tensor).difference(*others))

    def _layers_before(self, tensor: str) -> set[str]:
        seen = set()
        layers = set()
        todo = [tensor]
        while todo:
            node = self._producers.get(todo.pop())
            if node is None or node.name in seen:
                continue
            seen.add(node.name)
            if node.op_type in LAYER_OPS:
                layers.add(node.name)
            todo += list(node.input)
        return layers

    def _around(self, node: NodeProto) -> list[str]:
        """Returns the tensors that carry Q/DQ if a node is int8."""
        if node.op_type == "MatMul":
            # Its bias is added by the next node, which runtimes compute in float at no extra cost.
            return [node.input[0]]
        output = node.output[0]
        while len(following := self._consumers.get(output, [])) == 1 and following[0].op_type in ABSORBED:
            output = following[0].output[0]
        return [*self._data(node), output]

    @staticmethod
    def _data(node: NodeProto) -> list[str]:
        """Returns a node's data inputs, without weights, slopes or bounds."""
        return list(node.input) if node.op_type in _JOINING else [node.input[0]]

    def _spread(self, tensors: set[str]) -> set[str]:
        """Returns the tensors, and those with the same values before and after nodes that only move them."""
        spread = set(tensors)
        for node in reversed(self._nodes):
            if moves_values(node) and not spread.isdisjoint(node.output):
                spread.add(node.input[0])
        for node in self._nodes:
            if moves_values(node) and node.input[0] in spread:
                spread.update(node.output)
        return spread

    def origin(self, tensor: str) -> str:
        """Returns the tensor whose scale an activation shares, before nodes that only move values."""
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
            stage: the part of the graph.
            placement: the placement of Q/DQ.
            arrays: the value of every initializer.
            ranges: of the activations.
            grids: weights that are quantized already; all others are rounded to the nearest level.
        """
        nodes: list[NodeProto] = []
        values: Arrays = dict(arrays)
        renamed: dict[str, str] = {}
        if stage.input in placement.tensors:
            # The stage's input keeps its name, so its readers are renamed; other tensors are renamed at their writer.
            renamed[stage.input] = stage.input + DEQUANTIZED
            nodes += self._pair(stage.input, stage.input, renamed[stage.input], ranges, values)
        for original in stage.nodes:
            node = NodeProto()
            node.CopyFrom(original)
            for index, name in enumerate(node.input):
                node.input[index] = renamed.get(name, name)
            if node.name in placement.nodes and node.op_type in LAYER_OPS:
                input_scale = self._scale(original.input[0], ranges)
                nodes.append(self._quantize_weight(node, values, grids, float(input_scale)))
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

    def _quantize_weight(self, node: NodeProto, values: Arrays, grids: Grids, input_scale: float) -> NodeProto:
        name = node.input[1]
        axis = output_axis(node)
        grid = grids.get(name) or self.nearest(values[name], axis)
        bias = values.get(node.input[2]) if len(node.input) > 2 else None
        if bias is not None:  # neither left out nor computed
            grid = with_room_for_bias(grid, bias, input_scale, axis, self.per_channel)
        values[name + QUANTIZED], values[f"{name}/scale"] = grid.values, grid.scale
        values[f"{name}/zero_point"] = np.zeros(len(grid.scale), dtype=np.int8)
        node.input[1] = name + DEQUANTIZED
        inputs = [name + QUANTIZED, f"{name}/scale", f"{name}/zero_point"]
        return helper.make_node("DequantizeLinear", inputs, [name + DEQUANTIZED], f"{name}/DequantizeLinear", axis=axis)

    def nearest(self, weight: NDArray[np.generic], axis: int) -> QuantizedWeight:
        """Returns a weight rounded to the nearest levels, with output channels along `axis`."""
        return quantize_weight(weight, axis, self.weight_limit, self.per_channel)


def with_room_for_bias(
    grid: QuantizedWeight, bias: NDArray[np.generic], input_scale: float, axis: int, per_channel: bool = True
) -> QuantizedWeight:
    """Returns a weight whose scales are so large that its bias fits into 32 bits.

    Runtimes turn a float bias into integers of `input_scale * scale`. A channel that has died has next to no weights
    but still a bias: its integer would be larger than 32 bits hold, and ONNX Runtime lets it wrap. With a larger scale
    its weights round to fewer levels, and what they add is as small as before.

    Args:
        grid: of the weight.
        bias: of each output channel, `(channels,)`.
        input_scale: of the layer's input.
        axis: of the weight's output channels.
        per_channel: whether each channel has a scale of its own.
    """
    needed = np.abs(bias.astype(np.float64)).reshape(-1) / (_LARGEST_BIAS * input_scale)
    if not per_channel:
        needed = np.full_like(needed, needed.max(initial=0))
    scale = np.maximum(grid.scale, needed).astype(np.float32)
    if (scale == grid.scale).all():
        return grid
    shape = [-1 if index == axis else 1 for index in range(grid.values.ndim)]
    return QuantizedWeight(np.rint(grid.values * (grid.scale / scale).reshape(shape)).astype(np.int8), scale)


def output_axis(node: NodeProto) -> int:
    """Returns the axis of the output channels in the weight of a convolution or linear layer."""
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return 1 if node.op_type == "MatMul" or (node.op_type == "Gemm" and not transposed) else 0


def quantize_weight(weight: NDArray[np.generic], axis: int, limit: int, per_channel: bool = True) -> QuantizedWeight:
    """Returns a weight in s8 and its scale per channel along `axis`: symmetric, `|q| <= limit`.

    Channels that share a scale have that of the largest weight, repeated for each channel.
    """
    values = weight.astype(np.float32)
    others = tuple(index for index in range(values.ndim) if index != axis)
    largest = np.abs(values).max(axis=others)
    if not per_channel:
        largest = np.full_like(largest, largest.max(initial=0))
    scale = np.maximum(largest / limit, _TINY).astype(np.float32)
    shape = [-1 if index == axis else 1 for index in range(values.ndim)]
    return QuantizedWeight(np.clip(np.rint(values / scale.reshape(shape)), -limit, limit).astype(np.int8), scale)
