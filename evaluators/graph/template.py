"""A network's ONNX graph without weights: candidates' files are written from it, and it is cut into stages."""

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx
import onnx.shape_inference
from numpy.typing import NDArray
from onnx import NodeProto, helper, numpy_helper
from torch import Tensor

from evaluators.graph.exporter import (
    INPUT,
    OPSET,
    OUTPUT,
    ExportError,
    block_ends,
    cut_name,
    export_structure,
    gate_logits_name,
    logits_name,
)
from evaluators.graph.simplify import simplified, uncopied
from evaluators.graph.stages import Layout, Stage, lay_out
from spaces.dynamic.exit_network import ExitNetwork, layer_name
from spaces.errors import StructureError

Arrays = dict[str, NDArray[np.generic]]

LAYER_OPS = ("Conv", "Gemm", "MatMul")
"""The operators of convolutions and linear layers."""

DEQUANTIZED = "/dq"
"""The suffix of the name of a weight or an input after Q/DQ."""
QUANTIZED = "/q"
"""The suffix of the name of an int8 tensor."""
HALF = "/fp16"
"""The suffix of the name of an fp16 tensor."""
TRANSPOSED = "/transposed"
"""The suffix of the name of a linear layer's weight of shape `(inputs, outputs)`."""


@dataclass(frozen=True)
class BatchNormFold:
    """A batch normalisation that is folded into the convolution before it."""

    weight: str
    bias: str
    has_bias: bool
    norm: tuple[str, str, str, str]
    epsilon: float


class Template:
    """The dense network's graph without its weights.

    A candidate's file is this graph with the compressed network's weights, so nothing is exported again.

    Args:
        network: the network with all its exits, in evaluation mode.
        image: one input, `(1, c, h, w)`.
        removable: paths of the blocks that may be left out.

    Raises:
        ExportError: torch cannot export the network.
        StructureError: an exit sits where the graph cannot be cut in two.
    """

    def __init__(self, network: ExitNetwork, image: Tensor, removable: Sequence[str] = ()) -> None:
        parameters = set(network.state_dict())
        exported, ends = export_structure(network, image, removable)
        model = simplified(exported, parameters)
        self._removable = {
            block: (uncopied(exported, source), uncopied(exported, result)) for block, (source, result) in ends.items()
        }
        self._shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
        self._constants = {
            tensor.name: numpy_helper.to_array(tensor)
            for tensor in model.graph.initializer
            if tensor.name not in parameters
        }
        self._infos: dict[str, onnx.ValueInfoProto] = {
            info.name: info for info in [*model.graph.input, *model.graph.output]
        }
        named, self.blocks = _without_aliases(
            model.graph.node, {block: block_ends(block) for block in network.skip_blocks}
        )
        nodes, self._transposed = _transpose_weights(named, parameters)
        self.nodes, self.folds = _fold_batch_norms(nodes, {info.name for info in model.graph.output}, parameters)
        layer_nodes = _layers(self.nodes, parameters)
        self.layers = {layer: node.name for layer, node in layer_nodes.items()}
        self.layer_weights = {layer: _weight(node) for layer, node in layer_nodes.items()}
        self.grouped = frozenset(node.input[1] for node in layer_nodes.values() if _groups(node) > 1)
        self.exit_names = network.exit_names
        exit_logits = {logits_name(name) for name in network.exit_names}
        self.exit_classifiers = frozenset(layer for layer, node in layer_nodes.items() if node.output[0] in exit_logits)
        self._position = {output: index for index, node in enumerate(self.nodes) for output in node.output}
        self._layouts: dict[tuple[tuple[str, ...], tuple[str, ...]], Layout] = {}
        self.layout(self.exit_names, network.skip_blocks)

    def without(self, removed: Sequence[str]) -> "Template":
        """Returns the graph without some of the blocks that may be left out: their readers read what they read.

        Raises:
            ExportError: a block is none of those, or its ends are no tensors of this graph.
        """
        if unknown := set(removed) - set(self._removable):
            raise ExportError(f"a block that is left out is one that may be left out, got {min(unknown)!r}")
        shorter = copy.copy(self)
        before = dict(self._removable[block][::-1] for block in removed)
        if lost := set(before) - set(self._position):
            raise ExportError(f"a block that is left out ends in a tensor of the graph, got {min(lost)!r}")
        shorter.blocks = {
            block: (_followed(source, before), result)
            for block, (source, result) in self.blocks.items()
            if block not in removed
        }
        answers = {OUTPUT, *map(logits_name, self.exit_names), *map(gate_logits_name, shorter.blocks)}
        shorter.nodes = _alive([_reading(node, before) for node in self.nodes], answers)
        alive = {node.name for node in shorter.nodes}
        shorter.layers = {layer: node for layer, node in self.layers.items() if node in alive}
        shorter.layer_weights = {layer: self.layer_weights[layer] for layer in shorter.layers}
        weights = {name for node in shorter.nodes for name in node.input}
        shorter.folds = tuple(fold for fold in self.folds if fold.weight in weights)
        shorter._transposed = frozenset(name for name in self._transposed if name + TRANSPOSED in weights)
        shorter._position = {output: index for index, node in enumerate(shorter.nodes) for output in node.output}
        shorter._layouts = {}
        shorter.__dict__.pop("constants", None)
        return shorter

    @cached_property
    def constants(self) -> Arrays:
        """The values of the graph's constants, by the name of the tensor."""
        values: Arrays = dict(self._constants)
        for node in self.nodes:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                values[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
            elif node.op_type == "Cast" and node.input[0] in values:
                values[node.output[0]] = values[node.input[0]]
        return values

    def weights(self, state: Mapping[str, Tensor]) -> Arrays:
        """Returns the value of every initializer for a network's state dict, with batch normalisation folded in."""
        arrays: Arrays = {name: tensor.detach().numpy() for name, tensor in state.items() if name in self._shapes}
        for fold in self.folds:
            arrays |= _folded(fold, arrays)
        arrays |= {name + TRANSPOSED: np.ascontiguousarray(arrays[name].T) for name in self._transposed}
        return self._constants | arrays

    def layout(self, exits: Sequence[str], skips: Sequence[str] = ()) -> Layout:
        """Returns the stages of the graph if only these exits are active and only these blocks may be skipped."""
        key = tuple(exits), tuple(block for block in self.blocks if block in skips)
        if key not in self._layouts:
            cuts = {name: cut_name(name) for name in key[0]}
            ends = {block: self.blocks[block] for block in key[1]}
            self._layouts[key] = lay_out(cuts, ends, self._position.__getitem__, self._between)
        return self._layouts[key]

    @property
    def flows(self) -> tuple[tuple[NodeProto, ...], ...]:
        """The graph in which every block is run and, if there are gates, the graph in which they decide."""
        return (self.nodes, self._with_gates()) if self.blocks else (self.nodes,)

    def _with_gates(self) -> tuple[NodeProto, ...]:
        nodes: dict[str, NodeProto] = {}
        ends = {result: (block, source) for block, (source, result) in self.blocks.items()}
        for node in self.nodes:
            block, source = ends.get(node.output[0], ("", ""))
            if block:
                logits = gate_logits_name(block)
                gate = self._between(source, [logits], block)
                nodes |= {each.name: each for each in [*gate, *_choice(logits, source, node)]}
            else:
                nodes.setdefault(node.name, node)
        return tuple(nodes.values())

    def _between(self, start: str, ends: Sequence[str], owner: str) -> tuple[NodeProto, ...]:
        producers = {output: node for node in self.nodes for output in node.output}
        needed, todo = set(), list(ends)
        while todo:
            tensor = todo.pop()
            if tensor == start:
                continue
            if tensor == INPUT:
                raise StructureError(
                    f"an exit sits where one tensor separates the network in two, got {owner!r}, which is bypassed;"
                    " move it behind the block"
                )
            node = producers.get(tensor)
            if node is not None and node.name not in needed:
                needed.add(node.name)
                todo += list(node.input)
        return tuple(node for node in self.nodes if node.name in needed)

    def file(
        self,
        stage: Stage,
        nodes: Sequence[NodeProto],
        arrays: Arrays,
        channels: Mapping[str, int] | None = None,
        opset: int = OPSET,
        properties: Mapping[str, str] | None = None,
    ) -> bytes:
        """Returns one stage as an ONNX file.

        Args:
            stage: the part of the graph.
            nodes: the nodes to write.
            arrays: the value of every initializer.
            channels: the number of channels of features between stages; dynamic by default.
            opset: the opset of the nodes.
            properties: metadata for the runtime.
        """
        names = {name for node in nodes for name in node.input}
        graph = helper.make_graph(
            [self._fit_groups(node, arrays) for node in nodes],
            "stage",
            [self._info(stage.input, channels or {})],
            [self._info(name, channels or {}) for name in stage.outputs],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=_ir_version(opset))
        helper.set_model_props(model, dict(properties or {}))
        for name, array in arrays.items():
            if name in names:
                model.graph.initializer.append(numpy_helper.from_array(array, name))
        return bytes(model.SerializeToString(deterministic=True))

    def _info(self, name: str, channels: Mapping[str, int]) -> onnx.ValueInfoProto:
        if name in (INPUT, OUTPUT) or name.endswith("_logits"):
            return self._infos[name]
        # The channels of features between stages depend on the candidate, so only their rank is fixed.
        rank = len(self._infos[name].type.tensor_type.shape.dim)
        dims: list[str | int] = ["batch", *(f"{name}_{axis}" for axis in range(1, rank))]
        dims[1] = channels.get(name, dims[1])
        return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, dims)

    def _fit_groups(self, node: NodeProto, arrays: Arrays) -> NodeProto:
        """Returns a grouped convolution with the number of groups that its weight still has; other nodes unchanged."""
        weight = node.input[1].removesuffix(DEQUANTIZED).removesuffix(HALF) if node.op_type == "Conv" else ""
        if weight not in self._shapes or _groups(node) == 1:
            return node
        fitted = NodeProto()
        fitted.CopyFrom(node)
        for attribute in fitted.attribute:
            if attribute.name == "group":
                attribute.i = len(arrays[weight]) * attribute.i // self._shapes[weight][0]
        return fitted


def _followed(name: str, before: Mapping[str, str]) -> str:
    """Returns the tensor that is read in place of another one: what went into blocks that are left out."""
    while name in before:
        name = before[name]
    return name


def _reading(node: NodeProto, before: Mapping[str, str]) -> NodeProto:
    if not any(name in before for name in node.input):
        return node
    moved = NodeProto()
    moved.CopyFrom(node)
    moved.input[:] = [_followed(name, before) for name in node.input]
    return moved


def _alive(nodes: Sequence[NodeProto], outputs: AbstractSet[str]) -> tuple[NodeProto, ...]:
    """Returns the nodes that any of the graph's outputs depends on."""
    needed = set(outputs)
    kept: list[NodeProto] = []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(node.input)
    return tuple(reversed(kept))


def _without_aliases(
    nodes: Sequence[NodeProto], blocks: Mapping[str, tuple[str, str]]
) -> tuple[list[NodeProto], dict[str, tuple[str, str]]]:
    """Returns the nodes without identities that rename the ends of blocks, and the names of the blocks' ends."""
    names = {name for ends in blocks.values() for name in ends}
    aliases = {
        node.output[0]: node.input[0] for node in nodes if node.op_type == "Identity" and node.output[0] in names
    }
    left = [node for node in nodes if node.output[0] not in aliases]
    return left, {
        block: (aliases.get(source, source), aliases.get(result, result)) for block, (source, result) in blocks.items()
    }


def _choice(logits: str, source: str, last: NodeProto) -> list[NodeProto]:
    """Returns the last node of a block, and nodes that return the block's input if the gate's logit is below 0."""
    ran = NodeProto()
    ran.CopyFrom(last)
    result = ran.output[0]
    ran.output[0] = f"{result}/ran"
    runs = f"{result}/runs"
    axes = f"{result}/axes"
    zero, yes = f"{result}/zero", f"{result}/yes"
    return [
        ran,
        helper.make_node("Constant", [], [zero], zero, value=numpy_helper.from_array(np.zeros(1, np.float32))),
        helper.make_node("Constant", [], [axes], axes, value=numpy_helper.from_array(np.array([2, 3]))),
        helper.make_node("GreaterOrEqual", [logits, zero], [yes], yes),
        helper.make_node("Unsqueeze", [yes, axes], [runs], runs),
        helper.make_node("Where", [runs, ran.output[0], source], [result], f"{result}/choice"),
    ]


def _ir_version(opset: int) -> int:
    """Returns the file format that came with an opset: 9 with the float8 types of opset 19, 10 with INT4 of 21."""
    return 10 if opset >= 21 else 9 if opset >= 19 else 8


def output_channels(file: bytes) -> dict[str, int]:
    """Returns the number of channels of each output of a stage, if that of its input is known."""
    inferred = onnx.shape_inference.infer_shapes(onnx.load_from_string(file))
    shapes = {info.name: info.type.tensor_type.shape.dim for info in inferred.graph.output}
    return {name: dims[1].dim_value for name, dims in shapes.items() if len(dims) > 1 and dims[1].dim_value}


def bounds_of(node: NodeProto, constants: Arrays) -> tuple[float, float]:
    """Returns the lower and upper bound of a `Relu` or `Clip`; infinite if it has none."""
    if node.op_type == "Relu":
        return 0.0, np.inf
    low, high = (*node.input[1:], "", "")[:2]
    return float(constants.get(low, np.float32(-np.inf))), float(constants.get(high, np.float32(np.inf)))


def _groups(node: NodeProto) -> int:
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == "group"), 1)


def _weight(node: NodeProto) -> str:
    return str(node.input[1]).removesuffix(TRANSPOSED)


def _layers(nodes: Sequence[NodeProto], parameters: AbstractSet[str]) -> dict[str, NodeProto]:
    """Returns the node of each convolution and linear layer whose weight is a parameter that no other node reads."""
    readers = Counter(name for node in nodes for name in node.input)
    return {
        layer_name(_weight(node).removesuffix(".weight").removesuffix("_weight")): node
        for node in nodes
        if node.op_type in LAYER_OPS and _weight(node) in parameters and readers[node.input[1]] == 1
    }


def _transpose_weights(
    nodes: Sequence[NodeProto], parameters: AbstractSet[str]
) -> tuple[list[NodeProto], frozenset[str]]:
    """Returns the nodes without transpositions of weights for matrix products, and the names of these weights."""
    readers: dict[str, list[NodeProto]] = {}
    for node in nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    left, transposed = [], set()
    for node in nodes:
        following = readers.get(node.output[0], [])
        if (
            node.op_type == "Transpose"
            and node.input[0] in parameters
            and list(node.attribute[0].ints) == [1, 0]
            and all(reader.op_type == "MatMul" and reader.input[1] == node.output[0] for reader in following)
        ):
            transposed.add(node.input[0])
            for reader in following:
                reader.input[1] = node.input[0] + TRANSPOSED
        else:
            left.append(node)
    return left, frozenset(transposed)


def _fold_batch_norms(
    original: Sequence[NodeProto], outputs: AbstractSet[str], parameters: AbstractSet[str]
) -> tuple[tuple[NodeProto, ...], tuple[BatchNormFold, ...]]:
    """Returns the nodes without the batch normalisations that can be folded into a convolution, and the folds."""
    readers = Counter(name for node in original for name in node.input)
    convolutions = {node.output[0]: node for node in original if node.op_type == "Conv"}
    nodes: list[NodeProto] = []
    folds = []
    for node in original:
        source = node.input[0] if node.input else ""
        convolution = convolutions.get(source)
        if (
            node.op_type == "BatchNormalization"
            and convolution is not None
            and readers[source] == 1
            and source not in outputs
            # Nothing can be folded into a convolution that runs twice or whose weight is computed.
            and all(readers[name] == 1 for name in convolution.input[1:])
            and {*convolution.input[1:], *node.input[1:]} <= parameters
        ):
            folds.append(_fold_into(convolution, node))
            convolution.output[0] = node.output[0]
        else:
            nodes.append(node)
    return tuple(nodes), tuple(folds)


def _fold_into(convolution: NodeProto, norm: NodeProto) -> BatchNormFold:
    weight = convolution.input[1]
    has_bias = len(convolution.input) > 2
    if not has_bias:
        convolution.input.append(weight.removesuffix(".weight") + ".bias")
    epsilon = next((attribute.f for attribute in norm.attribute if attribute.name == "epsilon"), 1e-5)
    scale, shift, mean, variance = norm.input[1:5]
    return BatchNormFold(weight, convolution.input[2], has_bias, (scale, shift, mean, variance), epsilon)


def _folded(fold: BatchNormFold, arrays: Arrays) -> Arrays:
    scale, shift, mean, variance = (arrays[name].astype(np.float64) for name in fold.norm)
    factor = scale / np.sqrt(variance + fold.epsilon)
    weight = arrays[fold.weight].astype(np.float64)
    bias = arrays[fold.bias].astype(np.float64) if fold.has_bias else 0.0
    return {
        fold.weight: (weight * factor.reshape(-1, *[1] * (weight.ndim - 1))).astype(np.float32),
        fold.bias: ((bias - mean) * factor + shift).astype(np.float32),
    }
