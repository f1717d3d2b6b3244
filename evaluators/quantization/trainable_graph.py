"""The exported graph as something that trains: its nodes run in torch, with tensors rounded where the file has Q/DQ.

What learns is what is deployed: where Q/DQ goes, which tensors share a scale and how batch normalisation is folded are
the file's, and no module of the network is touched. Gates decide as they were trained to.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from onnx import NodeProto
from torch import Tensor

from evaluators.graph.exporter import INPUT, OUTPUT, cut_name, logits_name
from evaluators.graph.template import LAYER_OPS, TRANSPOSED, BatchNormFold, Template
from evaluators.quantization.int8 import Placement, Quantizer, moves_values, output_axis
from evaluators.quantization.torch_operators import Attributes, Operation, as_tensor

State = Mapping[str, Tensor]
"""Parameters and batch statistics by their names in the network's state dict."""
Round = Callable[[Tensor], Tensor]
"""Puts a tensor on its grid."""
_NOTHING = torch.empty(0)
"""An input that a node leaves out."""


@dataclass(frozen=True)
class Rounding:
    """What is rounded on the way through the graph.

    Args:
        tensors: activations, by the name of the tensor.
        weights: folded weights, by the name of the initializer.
    """

    tensors: Mapping[str, Round] = field(default_factory=dict)
    weights: Mapping[str, Round] = field(default_factory=dict)


FLOAT = Rounding()
"""Nothing is rounded."""


class TrainableGraph:
    """Runs a network's exported graph in torch.

    Args:
        template: the graph.
        quantizer: knows where Q/DQ goes in it.

    Raises:
        QuantizationError: it has an operator that cannot be trained through.
    """

    def __init__(self, template: Template, quantizer: Quantizer) -> None:
        self.weight_limit = quantizer.weight_limit
        self.per_channel = quantizer.per_channel
        self._template = template
        self._quantizer = quantizer
        self._nodes = template.flows[-1]
        operations = [Operation.of(node) for node in self._nodes]
        fixed = [operation for operation in operations if operation.node.op_type == "Constant"]
        self._operations = [operation for operation in operations if operation.node.op_type != "Constant"]
        self._constants = {name: torch.from_numpy(value.copy()) for name, value in template.constants.items()}
        self._constants |= {found.node.output[0]: as_tensor(found.attributes["value"]) for found in fixed}
        self._folds = {fold.weight: fold for fold in template.folds}
        self._heads = self._head_nodes()

    def logits(
        self, state: State, images: Tensor, rounding: Rounding = FLOAT, batch_statistics: bool = False
    ) -> list[Tensor]:
        """Returns the logits of each exit and, last, of the trunk, in fp32; the exits' gradients end at their heads.

        Args:
            state: of a network of this structure, pruned or not.
            images: `(n, c, h, w)`.
            rounding: what is rounded.
            batch_statistics: whether batch normalisation uses the batch's statistics, instead of the running ones
                folded into the weights.
        """
        values: dict[str, Tensor] = {**self._constants, **state, "": _NOTHING}
        values[INPUT] = _rounded(images, INPUT, rounding.tensors)
        for operation in self._operations:
            node = operation.node
            if node.op_type in LAYER_OPS:
                found = self._layer(operation, values, rounding, batch_statistics)
            elif node.op_type == "BatchNormalization" and batch_statistics:
                found = _batch_norm(values[node.input[0]], values[node.input[1]], values[node.input[2]], operation)
            else:
                found = operation.run(self._inputs(node, values), operation.attributes)
            values[node.output[0]] = _rounded(found, node.output[0], rounding.tensors)
        ends = [*(logits_name(name) for name in self._template.exit_names), OUTPUT]
        return [values[name].float() for name in ends]

    def weight(self, name: str, state: State) -> Tensor:
        """Returns the weight of an initializer in the shape that it is deployed in, as it is in the network."""
        weight = state[name.removesuffix(TRANSPOSED)]
        return weight.T if name.endswith(TRANSPOSED) else weight

    def folded_weight(self, name: str, state: State) -> Tensor:
        """Returns the weight of an initializer as it is deployed, batch normalisation folded in, before rounding."""
        weight = self.weight(name, state)
        fold = self._folds.get(name)
        return weight if fold is None else weight * _per_channel(_factor(fold, state), weight)

    def rounded_tensors(self, placement: Placement) -> dict[str, str]:
        """Returns each activation that is rounded in a placement, with the tensor whose scale it has.

        What only moves values that are on their grid already is not rounded again.
        """
        moved = {
            name
            for node in self._template.nodes
            if moves_values(node) and node.input[0] in placement.tensors
            for name in node.output
        }
        return {name: self._quantizer.origin(name) for name in sorted(placement.tensors - moved)}

    def scales(self) -> list[str]:
        """Returns the tensors that have a scale of their own in any placement."""
        return list(dict.fromkeys(self._quantizer.origin(name) for name in self._quantizer.activations()))

    def rounded_weights(self, placement: Placement) -> dict[str, int]:
        """Returns the initializer of each weight that is rounded in a placement, with the axis of its channels."""
        return {
            node.input[1]: output_axis(node)
            for node in self._template.nodes
            if node.name in placement.nodes and node.op_type in LAYER_OPS
        }

    def _layer(
        self, operation: Operation, values: dict[str, Tensor], rounding: Rounding, batch_statistics: bool
    ) -> Tensor:
        """Returns what a convolution or linear layer gives, with the batch normalisation that was folded into it."""
        node, name = operation.node, operation.node.input[1]
        fold = self._folds.get(name)
        inputs = self._inputs(node, values)
        if fold is None or not batch_statistics:
            inputs[1] = _rounded(self._weight(name, values), name, rounding.weights)
            if fold is not None:
                inputs = [*inputs[:2], _folded_bias(fold, values)]
            return operation.run(inputs, operation.attributes)
        # A symmetric grid per output channel is the same grid before and after a factor per channel.
        inputs[1] = _rounded(values[name], name, rounding.weights)
        features = operation.run(inputs if fold.has_bias else inputs[:2], operation.attributes)
        return _batch_norm(features, values[fold.norm[0]], values[fold.norm[1]], fold)

    def _weight(self, name: str, values: dict[str, Tensor]) -> Tensor:
        """Returns the second input of a layer; a product of two activations has no weight."""
        return values[name] if name in values and name not in self._folds else self.folded_weight(name, values)

    def _inputs(self, node: NodeProto, values: Mapping[str, Tensor]) -> list[Tensor]:
        """Returns what a node reads; a head reads the trunk without a way back."""
        cut = self._heads.get(node.name)
        found = [values.get(name, _NOTHING) for name in node.input]
        return [value.detach() if name == cut else value for name, value in zip(node.input, found, strict=True)]

    def _head_nodes(self) -> dict[str, str]:
        """Returns the nodes that belong to an exit's head only, with the tensor at which it reads the trunk."""
        trunk = self._before([OUTPUT], "")
        heads: dict[str, str] = {}
        for exit_name in self._template.exit_names:
            cut = cut_name(exit_name)
            heads |= dict.fromkeys(self._before([logits_name(exit_name)], cut) - trunk, cut)
        return heads

    def _before(self, ends: Iterable[str], start: str) -> set[str]:
        """Returns the nodes that `ends` depend on, up to the tensor `start`."""
        producers = {output: node for node in self._nodes for output in node.output}
        found, todo = set(), list(ends)
        while todo:
            node = producers.get(name) if (name := todo.pop()) != start else None
            if node is not None and node.name not in found:
                found.add(node.name)
                todo += list(node.input)
        return found


def _rounded(value: Tensor, name: str, rounds: Mapping[str, Round]) -> Tensor:
    """Returns a tensor on its grid, where it has one; in fp32, because bf16 has too few digits for 255 steps."""
    if name not in rounds:
        return value
    with torch.autocast("cpu", enabled=False):
        return rounds[name](value.float())


def _factor(fold: BatchNormFold, state: State) -> Tensor:
    scale, _, _, variance = fold.norm
    return state[scale] / torch.sqrt(state[variance] + fold.epsilon)


def _folded_bias(fold: BatchNormFold, state: State) -> Tensor:
    _, shift, mean, _ = fold.norm
    bias = state[fold.bias] if fold.has_bias else 0.0
    return (bias - state[mean]) * _factor(fold, state) + state[shift]


def _per_channel(factor: Tensor, weight: Tensor) -> Tensor:
    return factor.view(-1, *[1] * (weight.ndim - 1))


def _batch_norm(features: Tensor, scale: Tensor, shift: Tensor, norm: BatchNormFold | Operation) -> Tensor:
    """Returns features normalised by their own mean and variance."""
    attributes: Attributes = norm.attributes if isinstance(norm, Operation) else {"epsilon": norm.epsilon}
    return F.batch_norm(features, None, None, scale, shift, True, 0.0, attributes.get("epsilon", 1e-5))
