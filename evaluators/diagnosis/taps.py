"""Taps: inner tensors of a network's file that can be read, and the file that returns them beside its outputs.

Taps are at tensors that a runtime has in memory anyway: the output of a layer with the activation that is fused into
it, which is the tensor that carries Q/DQ. A dequantized tensor is returned through an additional DequantizeLinear, so
that the fusions around the original one are kept.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx.shape_inference
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from evaluators.graph.exporter import OUTPUT
from evaluators.graph.template import HALF, LAYER_OPS, QUANTIZED, TRANSPOSED
from evaluators.quantization.int8 import ABSORBED
from spaces.dynamic.exit_network import layer_name
from spaces.errors import UserError

_WATCHED = {"Add", "Concat", "BatchNormalization"}
"""Operators that are tapped besides layers, unless they only add a bias."""
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)
_OWN = "/tap"
"""The suffix of the name of an output that is added for a tap."""


class FileError(UserError):
    """A file that cannot be compared with a network."""


@dataclass(frozen=True)
class Tap:
    """A tensor that is read.

    Args:
        name: its name for users: the layer, or else the module and the operator.
        tensor: its name in the file.
        axis: the axis of its channels.
        sources: the nearest taps, or the stage's input, that it is computed from.
    """

    name: str
    tensor: str
    axis: int
    sources: tuple[str, ...]


def find_taps(stage: bytes) -> tuple[Tap, ...]:
    """Returns the taps of a stage of a float artifact, in the order in which they are computed."""
    return _Graph(parsed(stage)).taps()


class _Graph:
    """The producer and the readers of each tensor of a float file."""

    def __init__(self, model: ModelProto) -> None:
        self._model = model
        self._nodes = list(model.graph.node)
        self._initializers = {tensor.name for tensor in model.graph.initializer}
        self._fixed = self._initializers | {node.output[0] for node in self._nodes if node.op_type == "Constant"}
        self._outputs = dict.fromkeys(info.name for info in model.graph.output)
        self._producers = {name: node for node in self._nodes for name in node.output}
        self._readers: dict[str, list[NodeProto]] = {}
        for node in self._nodes:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        self._kinds = _kinds(model)

    def taps(self) -> tuple[Tap, ...]:
        ends = {self._end(node): node for node in self._nodes if self._is_watched(node)}
        ends |= {name: self._producers[name] for name in self._outputs if name not in ends and name in self._producers}
        ends = {tensor: node for tensor, node in ends.items() if self._has_channels(tensor)}
        limits = {*ends, self._model.graph.input[0].name}
        names = _unique_names([self._name(node) for node in ends.values()])
        return tuple(
            Tap(name, tensor, self._axis(tensor, node), self._sources(node, limits))
            for name, (tensor, node) in zip(names, ends.items(), strict=True)
        )

    def _is_layer(self, node: NodeProto) -> bool:
        return node.op_type in LAYER_OPS and node.input[1] in self._initializers

    def _is_watched(self, node: NodeProto) -> bool:
        if node.op_type == "Add":
            return not self._is_bias(node)
        moved = self._producers.get(node.input[0]) if node.op_type == "Reshape" else None
        shuffles = moved is not None and moved.op_type == "Transpose"
        return shuffles or node.op_type in _WATCHED or self._is_layer(node)

    def _is_bias(self, node: NodeProto) -> bool:
        return any(name in self._fixed for name in node.input)

    def _end(self, node: NodeProto) -> str:
        """Returns the tensor after a node, its bias and the activation that is fused into it."""
        tensor = str(node.output[0])
        while tensor not in self._outputs and len(readers := self._readers.get(tensor, [])) == 1:
            (reader,) = readers
            if reader.op_type not in ABSORBED and not (reader.op_type == "Add" and self._is_bias(reader)):
                break
            tensor = str(reader.output[0])
        return tensor

    def _has_channels(self, tensor: str) -> bool:
        """Returns whether a tensor is a float tensor with channels; tensors of unknown type count as such."""
        kind, rank = self._kinds.get(tensor, (TensorProto.FLOAT, 4))
        return kind in _FLOATS and rank >= 2

    def _axis(self, tensor: str, node: NodeProto) -> int:
        """Returns the channel axis: the last one after a matrix product and of tokens `(n, tokens, channels)`."""
        last = node.op_type in ("Gemm", "MatMul") or self._kinds.get(tensor, (0, 4))[1] == 3
        return -1 if last else 1

    def _name(self, node: NodeProto) -> str:
        if self._is_layer(node):
            weight = node.input[1].removesuffix(TRANSPOSED).removesuffix(".weight").removesuffix("_weight")
            return layer_name(weight)
        *scope, operator = canonical(node.name).strip("/").split("/")
        return f"{_module(scope)} {operator}".strip()

    def _sources(self, node: NodeProto, limits: set[str]) -> tuple[str, ...]:
        found: dict[str, None] = {}
        seen: set[str] = set()
        todo = list(node.input)
        while todo:
            name = todo.pop(0)
            if name in limits:
                found[name] = None
            elif name not in seen and name in self._producers:
                todo += self._producers[name].input
            seen.add(name)
        return tuple(found)


def _unique_names(names: list[str]) -> list[str]:
    """Returns the names, made unique by a number: a layer that runs twice gets a second name."""
    seen = Counter[str]()
    unique = []
    for name in names:
        seen[name] += 1
        unique.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return unique


def _module(scope: list[str]) -> str:
    """Returns a module's path from the scopes of its node: `layer1`, `layer1.0`, `conv1` make `layer1.0.conv1`."""
    path: list[str] = []
    for part in scope:
        if path and part.startswith(f"{path[-1]}."):
            path[-1] = part
        else:
            path.append(part)
    return ".".join(path)


def canonical(tensor: str) -> str:
    """Returns the name of a node or tensor without the scopes that our own export adds."""
    return tensor.removeprefix("/network").removeprefix("/trunk")


def _kinds(model: ModelProto) -> dict[str, tuple[int, int]]:
    """Returns the element type and the rank of each tensor, as far as they can be inferred."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    infos = [*graph.value_info, *graph.output, *graph.input]
    types = {info.name: info.type.tensor_type for info in infos}
    return {name: (kind.elem_type, len(kind.shape.dim)) for name, kind in types.items()}


def parsed(model: bytes) -> ModelProto:
    """Returns a parsed ONNX file with one input.

    Raises:
        FileError: it is no valid ONNX file, or has several inputs.
    """
    try:
        proto = onnx.load_from_string(model)
        onnx.checker.check_model(proto)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileError(f"a network is a valid ONNX file, got another: {reason}; export it again") from error
    initializers = {tensor.name for tensor in proto.graph.initializer}
    inputs = [info.name for info in proto.graph.input if info.name not in initializers]
    if len(inputs) != 1:
        raise FileError(f"a network has one input, its images, got {', '.join(inputs) or 'none'}; export it again")
    return proto


def with_taps(model: bytes, tensors: Iterable[str]) -> tuple[bytes, dict[str, str]]:
    """Returns a file with some tensors as additional outputs, and the name of the output of each tensor that it has.

    A tensor of our export is found in a file of another exporter by its name without our scopes, and in fp16 by its
    suffix. The logits are the file's last output, whatever their name.
    """
    proto = parsed(model)
    producers = {canonical(name): (name, node) for node in proto.graph.node for name in node.output}
    kinds = _kinds(proto)
    outputs = [info.name for info in proto.graph.output]
    output_of: dict[str, str] = {}
    for tensor in tensors:
        known = canonical(tensor)
        name, producer = (
            producers.get(known + HALF) or producers.get(known) or producers.get(known + QUANTIZED) or ("", None)
        )
        if tensor in outputs or (tensor == OUTPUT and producer is None):
            output_of[tensor] = tensor if tensor in outputs else outputs[-1]
        elif producer is not None:
            output_of[tensor] = _add_output(proto, name, producer, kinds)
    return proto.SerializeToString(deterministic=True), output_of


def _add_output(proto: ModelProto, name: str, producer: NodeProto, kinds: Mapping[str, tuple[int, int]]) -> str:
    """Makes a tensor an output if it is none yet, and returns the output's name."""
    kind, rank = kinds.get(name, (TensorProto.FLOAT, 0))
    if producer.op_type in ("DequantizeLinear", "QuantizeLinear"):
        quantized = producer.output[0] if producer.op_type == "QuantizeLinear" else producer.input[0]
        inputs, name = [quantized, *producer.input[1:]], name.removesuffix(QUANTIZED) + _OWN
        kind = TensorProto.FLOAT
        attributes = {each.name: helper.get_attribute_value(each) for each in producer.attribute if each.name == "axis"}
        proto.graph.node.append(
            helper.make_node("DequantizeLinear", inputs, [name], producer.name + _OWN, **attributes)
        )
    if name not in {info.name for info in proto.graph.output}:
        proto.graph.output.append(helper.make_tensor_value_info(name, kind, [None] * rank or None))
    return name


def norm_variances(model: bytes) -> dict[str, NDArray[np.generic]]:
    """Returns the running variances of the batch norms in a file that are not folded, by name."""
    proto = parsed(model)
    arrays = {tensor.name: tensor for tensor in proto.graph.initializer}
    names = [node.input[4] for node in proto.graph.node if node.op_type == "BatchNormalization"]
    return {name.removesuffix(HALF): numpy_helper.to_array(arrays[name]) for name in names if name in arrays}


def has_halves(model: bytes) -> bool:
    """Returns whether a file has fp16 tensors."""
    proto = parsed(model)
    return any(tensor.data_type == TensorProto.FLOAT16 for tensor in proto.graph.initializer)
