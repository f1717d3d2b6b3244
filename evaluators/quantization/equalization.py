"""Cross-layer equalization: the same network, whose channels have weights of like size.

What one layer hands to the next through ReLU or pooling may be divided by any positive number, channel by channel, if
the next layer multiplies it again.
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
"""What is added in front of them comes out behind them, where it keeps the values above 0."""

_SETTLED = 1e-3
_SWEEPS = 200

State = dict[str, Tensor]


@dataclass(frozen=True)
class Knobs:
    """What turns a layer's outputs up and down.

    Args:
        weight: of the convolution or linear layer, by its name in the state dict.
        bias: of it; empty where it has none.
        norm: the batch normalisation behind it; None without.
        groups: of its input channels.
        padded: whether zeros are laid around its input.
    """

    weight: str
    bias: str
    norm: BatchNormFold | None
    groups: int
    padded: bool

    @property
    def outputs(self) -> tuple[str, ...]:
        """The tensors that grow with the output."""
        if self.norm is not None:
            return self.norm.norm[:2]
        return (self.weight, self.bias) if self.bias else (self.weight,)


@dataclass(frozen=True)
class Pair:
    """Two layers, of which the second alone reads what the first gives, and the operators between them."""

    first: Knobs
    second: Knobs
    between: tuple[str, ...]


def equalized(network: ExitNetwork, image: Tensor) -> ExitNetwork:
    """Returns a network with the same answers, whose layers lose less when they are rounded.

    Its channels are evened out, and high biases moved on.

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
    """Returns a state dict of the same function, in which paired channels have weights of one size.

    With `r1` the largest folded weight of an output channel and `r2` of the input channel that reads it, the first is
    divided by `sqrt(r1 / r2)` and the second multiplied by it, again and again until no pair changes. Batch
    normalisation stays: its gamma and beta are scaled in place of the weight before it.

    ReLU6 is no pair's: a bound does not scale, unless it is 0 or none. Nor are tensors that an exit or a shortcut reads
    too, nor products that are no convolution or `Gemm`.
    """
    pairs, arrays = find_pairs(template), template.weights(state)
    weights = {layer.weight for pair in pairs for layer in (pair.first, pair.second)}
    folded = {name: torch.from_numpy(arrays[name].astype(np.float64)) for name in weights}
    factors = {pair: torch.ones(len(folded[pair.first.weight]), dtype=torch.float64) for pair in pairs}
    for _ in range(_SWEEPS):
        steps = {pair: _even_out(pair, folded) for pair in pairs}
        factors = {pair: factors[pair] * step for pair, step in steps.items()}
        if all(step.log().abs().max() < _SETTLED for step in steps.values()):
            break
    return scaled(state, factors)


def scaled(state: Mapping[str, Tensor], factors: Mapping[Pair, Tensor]) -> State:
    """Returns a state dict of the same function: each pair's first layer divided by its factors, `(channels,)`."""
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
    """Returns a state dict in which high biases have moved into the next layer: almost the same function.

    Where beta lies more than three gamma above 0, ReLU cuts next to nothing, so `c = beta - 3 gamma` may as well be
    added behind the next layer, to its running mean or its bias. One value in 740 of such a channel is cut otherwise.
    Layers that lay zeros around their input are left alone: there is no `c` in the border.
    """
    made = {name: tensor.clone() for name, tensor in state.items()}
    for pair in find_pairs(template):
        if pair.first.norm is None or pair.second.padded or not set(pair.between) <= _SHIFTING:
            continue
        if "Relu" in pair.between and (pair.second.norm or pair.second.bias):
            _move_on(pair, pair.first.norm, made)
    return made


def _move_on(pair: Pair, norm: BatchNormFold, state: State) -> None:
    gamma, beta = (state[name].double() for name in norm.norm[:2])
    moved = torch.clamp(beta - 3 * gamma.abs(), min=0)
    grouped = _by_group(state[pair.second.weight], pair.second, len(moved))
    added = (grouped * moved.reshape(pair.second.groups, 1, -1, 1)).sum(dim=(2, 3)).flatten()
    behind = pair.second.norm.norm[2] if pair.second.norm else pair.second.bias
    sign = -1 if pair.second.norm else 1  # a mean is subtracted, a bias added
    state[behind] = (state[behind].double() + sign * added).to(state[behind].dtype)
    state[norm.norm[1]] = (beta - moved).to(state[norm.norm[1]].dtype)


def _even_out(pair: Pair, folded: dict[str, Tensor]) -> Tensor:
    """Returns what a pair's first layer is to be divided by, `(channels,)`, and does so in the folded weights."""
    first, second = folded[pair.first.weight], folded[pair.second.weight]
    grouped = _by_group(second, pair.second, len(first))
    r1, r2 = first.abs().flatten(1).amax(dim=1), grouped.abs().amax(dim=(1, 3)).flatten()
    alive = (r1 > 0) & (r2 > 0)
    factor = torch.where(alive, (r1 / torch.where(alive, r2, 1.0)).sqrt(), 1.0)
    folded[pair.first.weight] = _by_row(first, 1 / factor)
    folded[pair.second.weight] = (grouped * factor.reshape(pair.second.groups, 1, -1, 1)).reshape(second.shape)
    return factor


def _by_group(weight: Tensor, layer: Knobs, channels: int) -> Tensor:
    """Returns a weight as `(groups, outputs, inputs, the rest)` for `channels` inputs, in double precision.

    The rest is the kernel, or the positions of a flattened feature map.
    """
    return weight.double().reshape(layer.groups, len(weight) // layer.groups, channels // layer.groups, -1)


def find_pairs(template: Template) -> list[Pair]:
    """Returns every pair of layers between which channels can be scaled freely, in the order in which they run."""
    graph = _Graph(template)
    pairs = []
    for node in template.nodes:
        first = graph.knobs(node)
        found = graph.next_layer(node) if first is not None else None
        if first is not None and found is not None:
            pairs.append(Pair(first, *found))
    return pairs


class _Graph:
    """Who reads what in a network's graph."""

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

    def knobs(self, node: NodeProto) -> Knobs | None:
        """Returns what scales a layer's output and input; None where something else has a part in it."""
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
        return None if shared else Knobs(weight, bias, fold, groups, padded)

    def next_layer(self, node: NodeProto) -> tuple[Knobs, tuple[str, ...]] | None:
        """Returns the only layer that reads what another gives, and the operators on the way; None without one."""
        between: list[str] = []
        while True:
            tensor = node.output[0]
            readers = self._readers.get(tensor, [])
            if tensor in self._outputs or len(readers) != 1:
                return None
            (node,) = readers
            if (layer := self.knobs(node)) is not None:
                return layer, tuple(between)
            if not self._is_homogeneous(node):
                return None
            between.append("Relu" if node.op_type == "Clip" else node.op_type)

    def _is_homogeneous(self, node: NodeProto) -> bool:
        """Returns whether `f(s x) = s f(x)` for positive `s`, channel by channel."""
        if node.op_type != "Clip":
            return node.op_type in _HOMOGENEOUS | _POOLING
        return bounds_of(node, self._constants) == (0.0, np.inf)
