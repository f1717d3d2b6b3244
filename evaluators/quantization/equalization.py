"""Cross-layer equalization: an equivalent network whose channels have weights of similar magnitude.

Each channel between two layers with only ReLU or pooling between them may be divided by a positive number in the first
layer and multiplied by it in the second.
Source: Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, 2019, section 4.1.
"""

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from onnx import NodeProto
from torch import Tensor

from evaluators.graph.template import BatchNormFold, Template, bounds_of
from evaluators.quantization.int8 import output_axis
from spaces.dynamic.exit_network import ExitNetwork

_HOMOGENEOUS = {"Relu", "LeakyRelu", "Identity", "Dropout", "Flatten"}
_POOLING = {"MaxPool", "AveragePool", "GlobalAveragePool"}
_SHIFTING = {"Relu", "Identity", "Dropout", "Flatten", "MaxPool", "GlobalAveragePool"}
"""Operators that commute with adding a constant, as long as values stay above 0."""

_TOLERANCE = 1e-3
"""Sweeps end when no factor changes by more than this, in logarithms."""
_MAX_SWEEPS = 200

State = dict[str, Tensor]


@dataclass(frozen=True)
class ScalableLayer:
    """The tensors by which a layer's outputs and inputs are scaled.

    Args:
        weight: the name of the layer's weight in the state dict.
        bias: the name of its bias; empty without one.
        norm: the batch normalisation after it; None without one.
        groups: the number of groups of its input channels.
        padded: whether its input is padded with zeros.
    """

    weight: str
    bias: str
    norm: BatchNormFold | None
    groups: int
    padded: bool

    @property
    def outputs(self) -> tuple[str, ...]:
        """The tensors that scale the layer's output."""
        if self.norm is not None:
            return self.norm.norm[:2]
        return (self.weight, self.bias) if self.bias else (self.weight,)


@dataclass(frozen=True)
class Pair:
    """Two layers and the operators between them; the second is the only reader of the first one's output."""

    first: ScalableLayer
    second: ScalableLayer
    between: tuple[str, ...]


def equalized(network: ExitNetwork, image: Tensor) -> ExitNetwork:
    """Returns an equivalent network whose layers lose less accuracy when they are quantized.

    Channels are equalized, and high biases are absorbed into the next layer.

    Args:
        network: trained, in evaluation mode.
        image: one input, `(1, c, h, w)`.

    Raises:
        ExportError: torch cannot export the network.
    """
    template = Template(network, image)
    made = copy.deepcopy(network)
    made.load_state_dict(absorb(template, equalize(template, network.state_dict())))
    return made


def equalize(template: Template, state: Mapping[str, Tensor]) -> State:
    """Returns a state dict of the same function, in which paired channels have equal weight ranges.

    With `r1` the largest folded weight of an output channel and `r2` of the input channel that reads it, the first is
    divided by `sqrt(r1 / r2)` and the second multiplied by it, repeatedly until no pair changes. Batch
    normalisation stays: its gamma and beta are scaled in place of the weight before it.

    Not equalized are layers before a ReLU6, because its bound does not scale, tensors that an exit or a shortcut reads
    too, and matrix products other than convolutions and `Gemm`.
    """
    pairs, arrays = find_pairs(template), template.weights(state)
    weights = {layer.weight for pair in pairs for layer in (pair.first, pair.second)}
    folded = {name: torch.from_numpy(arrays[name].astype(np.float64)) for name in weights}
    factors = {pair: torch.ones(len(folded[pair.first.weight]), dtype=torch.float64) for pair in pairs}
    for _ in range(_MAX_SWEEPS):
        steps = {pair: _equalize_pair(pair, folded) for pair in pairs}
        factors = {pair: factors[pair] * step for pair, step in steps.items()}
        if all(step.log().abs().max() < _TOLERANCE for step in steps.values()):
            break
    return scaled(state, factors)


def scaled(state: Mapping[str, Tensor], factors: Mapping[Pair, Tensor]) -> State:
    """Returns a state dict of the same function, with each pair's first layer divided by factors `(channels,)`."""
    made = {name: tensor.clone() for name, tensor in state.items()}
    for pair, factor in factors.items():
        for name in pair.first.outputs:
            made[name] = _by_row(made[name], 1 / factor)
        weight = made[pair.second.weight]
        grouped = _by_group(weight, pair.second, len(factor)) * factor.reshape(pair.second.groups, 1, -1, 1)
        made[pair.second.weight] = grouped.reshape(weight.shape).to(weight.dtype)
    return made


def _by_row(tensor: Tensor, factor: Tensor) -> Tensor:
    return (tensor.double() * factor.reshape(-1, *[1] * (tensor.ndim - 1))).to(tensor.dtype)


def absorb(template: Template, state: Mapping[str, Tensor]) -> State:
    """Returns a state dict of almost the same function, in which high biases are absorbed into the next layer.

    If beta is more than three gamma above 0, ReLU clips almost nothing, so `c = beta - 3 gamma` can be added after the
    next layer instead, to its running mean or its bias. One value in 740 of such a channel is clipped differently.
    Layers that pad their input with zeros are excluded, because the padding lacks `c`.
    """
    made = {name: tensor.clone() for name, tensor in state.items()}
    for pair in find_pairs(template):
        if pair.first.norm is None or pair.second.padded or not set(pair.between) <= _SHIFTING:
            continue
        if "Relu" in pair.between and (pair.second.norm or pair.second.bias):
            _absorb_pair(pair, pair.first.norm, made)
    return made


def _absorb_pair(pair: Pair, norm: BatchNormFold, state: State) -> None:
    gamma, beta = (state[name].double() for name in norm.norm[:2])
    moved = torch.clamp(beta - 3 * gamma.abs(), min=0)
    grouped = _by_group(state[pair.second.weight], pair.second, len(moved))
    added = (grouped * moved.reshape(pair.second.groups, 1, -1, 1)).sum(dim=(2, 3)).flatten()
    behind = pair.second.norm.norm[2] if pair.second.norm else pair.second.bias
    sign = -1 if pair.second.norm else 1  # a mean is subtracted, a bias added
    state[behind] = (state[behind].double() + sign * added).to(state[behind].dtype)
    state[norm.norm[1]] = (beta - moved).to(state[norm.norm[1]].dtype)


def _equalize_pair(pair: Pair, folded: dict[str, Tensor]) -> Tensor:
    """Returns the factors by which a pair's first layer is divided, `(channels,)`, and scales the folded weights."""
    first, second = folded[pair.first.weight], folded[pair.second.weight]
    grouped = _by_group(second, pair.second, len(first))
    r1, r2 = first.abs().flatten(1).amax(dim=1), grouped.abs().amax(dim=(1, 3)).flatten()
    alive = (r1 > 0) & (r2 > 0)
    factor = torch.where(alive, (r1 / torch.where(alive, r2, 1.0)).sqrt(), 1.0)
    folded[pair.first.weight] = _by_row(first, 1 / factor)
    folded[pair.second.weight] = (grouped * factor.reshape(pair.second.groups, 1, -1, 1)).reshape(second.shape)
    return factor


def _by_group(weight: Tensor, layer: ScalableLayer, channels: int) -> Tensor:
    """Returns a weight as `(groups, outputs, inputs, the rest)` for `channels` inputs, in double precision.

    The rest is the kernel, or the positions of a flattened feature map.
    """
    return weight.double().reshape(layer.groups, len(weight) // layer.groups, channels // layer.groups, -1)


def find_pairs(template: Template) -> list[Pair]:
    """Returns every pair of layers that can be equalized, in the order in which they run."""
    graph = _Graph(template)
    pairs = []
    for node in template.nodes:
        first = graph.scalable_layer(node)
        second = graph.next_layer(node) if first is not None else None
        if first is not None and second is not None:
            pairs.append(Pair(first, *second))
    return pairs


class _Graph:
    """The readers of each tensor of a network's graph."""

    def __init__(self, template: Template) -> None:
        self._layers = set(template.layers.values())
        self._folds = {fold.weight: fold for fold in template.folds}
        layout = template.layout(template.exit_names, tuple(template.blocks))
        self._outputs = {name for stage in layout.stages for name in stage.outputs}
        self._readers: dict[str, list[NodeProto]] = {}
        for node in template.nodes:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        self._owners = Counter(name for fold in template.folds for name in fold.norm)
        self._constants = template.constants

    def scalable_layer(self, node: NodeProto) -> ScalableLayer | None:
        """Returns the tensors that scale a layer; None for other nodes and if other nodes use these tensors too."""
        if node.name not in self._layers or node.op_type == "MatMul" or output_axis(node) != 0:
            return None
        weight, fold = node.input[1], self._folds.get(node.input[1])
        bias = node.input[2] if len(node.input) > 2 else ""
        if fold is not None:
            bias = bias if fold.has_bias else ""
            shared = any(self._owners[name] > 1 or name in self._readers for name in fold.norm)
        else:
            shared = bool(bias) and len(self._readers[bias]) > 1
        attributes = {attribute.name: attribute for attribute in node.attribute}
        groups = attributes["group"].i if "group" in attributes else 1
        padded = "pads" in attributes and any(attributes["pads"].ints)
        return None if shared else ScalableLayer(weight, bias, fold, groups, padded)

    def next_layer(self, node: NodeProto) -> tuple[ScalableLayer, tuple[str, ...]] | None:
        """Returns the only layer that reads a layer's output, and the operators between; None if there is none."""
        between: list[str] = []
        while True:
            tensor = node.output[0]
            readers = self._readers.get(tensor, [])
            if tensor in self._outputs or len(readers) != 1:
                return None
            (node,) = readers
            if (layer := self.scalable_layer(node)) is not None:
                return layer, tuple(between)
            if not self._is_homogeneous(node):
                return None
            between.append("Relu" if node.op_type == "Clip" else node.op_type)

    def _is_homogeneous(self, node: NodeProto) -> bool:
        """Returns whether `f(s x) = s f(x)` for positive `s`, channel by channel."""
        if node.op_type != "Clip":
            return node.op_type in _HOMOGENEOUS | _POOLING
        return bounds_of(node, self._constants) == (0.0, np.inf)
