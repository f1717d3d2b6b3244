"""Where a network's file can be watched, and the file that returns what is there beside its answer.

Watched is what a runtime has in memory anyway: the tensor behind a layer and the activation that is fused into it,
which is the one that carries Q/DQ. A dequantized tensor is returned through a DequantizeLinear of its own, so that what
is fused around the one in the file stays fused.
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
"""Are watched beside the layers, where they compute something from several tensors or from statistics."""
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)
_OWN = "/tap"
"""The end of the name of an output that has been made for watching."""


class FileError(UserError):
    """A file that cannot be compared with a network."""


@dataclass(frozen=True)
class Tap:
    """A tensor that is watched.

    Args:
        name: what users know it by: the layer, or else the module and the operator.
        tensor: its name in the file.
        axis: of its channels.
        sources: the watched tensors, or the stage's input, that it is computed from.
    """

    name: str
    tensor: str
    axis: int
    sources: tuple[str, ...]


def find_taps(stage: bytes) -> tuple[Tap, ...]:
    """Returns the tensors to watch in a stage of a float artifact, in the order in which they are computed."""
    return _Graph(parsed(stage)).taps()


class _Graph:
    """Who makes and who reads each tensor of a float file."""

    def __init__(self, model: ModelProto) -> None:
        self._model = model
        self._nodes = list(model.graph.node)
        self._initializers = {tensor.name for tensor in model.graph.initializer}
        self._fixed = self._initializers | {node.output[0] for node in self._nodes if node.op_type == "Constant"}
        self._outputs = dict.fromkeys(info.name for info in model.graph.output)
        self._makers = {name: node for node in self._nodes for name in node.output}
        self._readers: dict[str, list[NodeProto]] = {}
        for node in self._nodes:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        self._kinds = _kinds(model)

    def taps(self) -> tuple[Tap, ...]:
        ends = {self._end(node): node for node in self._nodes if self._is_watched(node)}
        ends |= {name: self._makers[name] for name in self._outputs if name not in ends and name in self._makers}
        ends = {tensor: node for tensor, node in ends.items() if self._has_channels(tensor)}
        limits = {*ends, self._model.graph.input[0].name}
        names = _told_apart([self._name(node) for node in ends.values()])
        return tuple(
            Tap(name, tensor, self._axis(tensor, node), self._sources(node, limits))
            for name, (tensor, node) in zip(names, ends.items(), strict=True)
        )

    def _is_layer(self, node: NodeProto) -> bool:
        return node.op_type in LAYER_OPS and node.input[1] in self._initializers

    def _is_watched(self, node: NodeProto) -> bool:
        if node.op_type == "Add":
            return not self._is_bias(node)
        moved = self._makers.get(node.input[0]) if node.op_type == "Reshape" else None
        shuffles = moved is not None and moved.op_type == "Transpose"
        return shuffles or node.op_type in _WATCHED or self._is_layer(node)

    def _is_bias(self, node: NodeProto) -> bool:
        return any(name in self._fixed for name in node.input)

    def _end(self, node: NodeProto) -> str:
        """Returns the tensor behind a node, its bias and the activation that runs inside it."""
        tensor = str(node.output[0])
        while tensor not in self._outputs and len(readers := self._readers.get(tensor, [])) == 1:
            (reader,) = readers
            if reader.op_type not in ABSORBED and not (reader.op_type == "Add" and self._is_bias(reader)):
                break
            tensor = str(reader.output[0])
        return tensor

    def _has_channels(self, tensor: str) -> bool:
        """Returns whether a tensor has numbers in it, image by image; one that inference knows nothing of may have."""
        kind, rank = self._kinds.get(tensor, (TensorProto.FLOAT, 4))
        return kind in _FLOATS and rank >= 2

    def _axis(self, tensor: str, node: NodeProto) -> int:
        """Returns the axis of the channels: the last one behind a product and of tokens `(n, tokens, channels)`."""
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
            elif name not in seen and name in self._makers:
                todo += self._makers[name].input
            seen.add(name)
        return tuple(found)


def _told_apart(names: list[str]) -> list[str]:
    """Returns names of which each is there once: a layer that runs again is its own second."""
    seen = Counter[str]()
    found = []
    for name in names:
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return found


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
    """Returns the name of a node or tensor without the scope of what our own export puts around a network."""
    return tensor.removeprefix("/network").removeprefix("/trunk")


def _kinds(model: ModelProto) -> dict[str, tuple[int, int]]:
    """Returns the element type and the rank of each tensor, as far as they can be inferred."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    infos = [*graph.value_info, *graph.output, *graph.input]
    types = {info.name: info.type.tensor_type for info in infos}
    return {name: (kind.elem_type, len(kind.shape.dim)) for name, kind in types.items()}


def parsed(model: bytes) -> ModelProto:
    """Returns an ONNX file with one input.

    Raises:
        FileError: it is something else.
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


def watched(model: bytes, tensors: Iterable[str]) -> tuple[bytes, dict[str, str]]:
    """Returns a file that returns some tensors beside its answer, and the output of each that it has.

    A tensor of our export is found in a file of another exporter by its name without our scope, and in half precision
    behind its own ending. The logits are the file's last output, whatever their name.
    """
    proto = parsed(model)
    makers = {canonical(name): (name, node) for node in proto.graph.node for name in node.output}
    kinds = _kinds(proto)
    answers = [info.name for info in proto.graph.output]
    found: dict[str, str] = {}
    for tensor in tensors:
        known = canonical(tensor)
        name, maker = makers.get(known + HALF) or makers.get(known) or makers.get(known + QUANTIZED) or ("", None)
        if tensor in answers or (tensor == OUTPUT and maker is None):
            found[tensor] = tensor if tensor in answers else answers[-1]
        elif maker is not None:
            found[tensor] = _returned(proto, name, maker, kinds)
    return proto.SerializeToString(deterministic=True), found


def _returned(proto: ModelProto, name: str, maker: NodeProto, kinds: Mapping[str, tuple[int, int]]) -> str:
    """Returns the output that a tensor has been made, or already was."""
    kind, rank = kinds.get(name, (TensorProto.FLOAT, 0))
    if maker.op_type in ("DequantizeLinear", "QuantizeLinear"):
        quantized = maker.output[0] if maker.op_type == "QuantizeLinear" else maker.input[0]
        inputs, name = [quantized, *maker.input[1:]], name.removesuffix(QUANTIZED) + _OWN
        kind = TensorProto.FLOAT
        attributes = {each.name: helper.get_attribute_value(each) for each in maker.attribute if each.name == "axis"}
        proto.graph.node.append(helper.make_node("DequantizeLinear", inputs, [name], maker.name + _OWN, **attributes))
    if name not in {info.name for info in proto.graph.output}:
        proto.graph.output.append(helper.make_tensor_value_info(name, kind, [None] * rank or None))
    return name


def norm_variances(model: bytes) -> dict[str, NDArray[np.generic]]:
    """Returns the running variances in a file, by name: those of batch normalisation that is no part of a layer."""
    proto = parsed(model)
    arrays = {tensor.name: tensor for tensor in proto.graph.initializer}
    names = [node.input[4] for node in proto.graph.node if node.op_type == "BatchNormalization"]
    return {name.removesuffix(HALF): numpy_helper.to_array(arrays[name]) for name in names if name in arrays}


def has_halves(model: bytes) -> bool:
    """Returns whether anything in a file is in half precision."""
    proto = parsed(model)
    return any(tensor.data_type == TensorProto.FLOAT16 for tensor in proto.graph.initializer)
