"""Simplifies the exported graph: folds constants, writes and moves pads into convolutions, removes identities.

Runtimes do some of this themselves, but not if Q/DQ is in between: pads in float before 17 convolutions of
EfficientNet-Lite0 took 40% of the time of its int8 file.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet

import numpy as np
import onnx
import onnx.shape_inference
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

Arrays = dict[str, NDArray[np.generic]]

_COPIES = {"Identity", "Dropout"}
"""Operators that return their input, in evaluation mode."""
_MAX_CONSTANT = 1_000_000
"""Constants with more values are not folded: the nodes that compute them may be smaller than their values."""


def simplified(model: ModelProto, parameters: AbstractSet[str]) -> ModelProto:
    """Returns an equivalent graph with constants and pads folded, copies removed and batch sizes kept dynamic.

    Args:
        model: the exported graph.
        parameters: the initializers whose values are not known yet and whose shapes may change.
    """
    graph, outputs = model.graph, {info.name for info in model.graph.output}
    nodes = _without_copies(map(_with_written_pads, graph.node), outputs)
    nodes = _with_copied_batch(nodes, _batched(model))
    constants = {each.name: numpy_helper.to_array(each) for each in graph.initializer if each.name not in parameters}
    nodes, constants = _folded_constants(nodes, constants, outputs)
    nodes = _folded_pads(nodes, constants, outputs)
    made = ModelProto()
    made.CopyFrom(model)
    del made.graph.node[:], made.graph.initializer[:]
    made.graph.node.extend(_needed(nodes, outputs))
    read = {name for node in made.graph.node for name in node.input}
    kept = [each for each in graph.initializer if each.name in parameters]
    folded = [numpy_helper.from_array(values, name) for name, values in constants.items() if name in read]
    made.graph.initializer.extend([*kept, *folded])
    return made


def uncopied(model: ModelProto, name: str) -> str:
    """Returns the tensor that a tensor is a copy of, or its own name: what is left of it in the simplified graph."""
    copied = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type in _COPIES}
    outputs = {info.name for info in model.graph.output}
    while name in copied and name not in outputs:
        name = copied[name]
    return name


def _with_written_pads(node: NodeProto) -> NodeProto:
    """Returns a node whose padding is numbers, which every reader of the graph understands, and no word for them."""
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    automatic = attributes.get("auto_pad", b"NOTSET")
    if automatic == b"NOTSET":
        return node
    kernel = attributes["kernel_shape"]
    dilations = attributes.get("dilations", [1] * len(kernel))
    # "same" is exported for strides of one alone: then it depends on the kernel, and on no size of images.
    sums = [0 if automatic == b"VALID" else (size - 1) * step for size, step in zip(kernel, dilations, strict=True)]
    smaller, larger = [total // 2 for total in sums], [total - total // 2 for total in sums]
    return _padded(node, [*larger, *smaller] if automatic == b"SAME_LOWER" else [*smaller, *larger])


def _without_copies(nodes: Iterable[NodeProto], outputs: AbstractSet[str]) -> list[NodeProto]:
    """Returns the nodes without those that return their input, except those that name an output of the graph."""
    names: dict[str, str] = {}
    left = []
    for original in nodes:
        node = _reading(original, names)
        if node.op_type in _COPIES and node.output[0] not in outputs:
            names[node.output[0]] = node.input[0]
        else:
            left.append(node)
    return left


def _reading(original: NodeProto, names: Mapping[str, str]) -> NodeProto:
    """Returns a copy of a node with renamed inputs.

    Args:
        original: the node.
        names: the new name of each renamed tensor, by its present name.
    """
    node = NodeProto()
    node.CopyFrom(original)
    for index, name in enumerate(node.input):
        node.input[index] = names.get(name, name)
    return node


def _batched(model: ModelProto) -> frozenset[str]:
    """Returns the tensors whose first axis is the batch axis, as far as shapes can be inferred."""
    batch = model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    infos = [*inferred.input, *inferred.value_info]
    return frozenset(
        info.name
        for info in infos
        if batch and info.type.tensor_type.shape.dim and info.type.tensor_type.shape.dim[0].dim_param == batch
    )


def _with_copied_batch(nodes: Sequence[NodeProto], batched: AbstractSet[str]) -> list[NodeProto]:
    """Returns the nodes with 0, "keep the size", for each batch size that a reshape takes from another tensor's shape.

    `x.view(images.size(0), -1)` reads the size from the images, so that all later stages would depend on the input.
    """
    producers = {output: node for node in nodes for output in node.output}
    constants = {
        node.output[0]: helper.get_attribute_value(node.attribute[0])
        for node in nodes
        if node.op_type == "Constant" and node.attribute[0].name == "value"
    }

    def is_batch_size(tensor: str) -> bool:
        """Returns whether a tensor is the size of the first axis of one whose first axis is the batch."""
        node = producers.get(tensor)
        while node is not None and node.op_type in ("Unsqueeze", "Cast"):
            node = producers.get(node.input[0])
        if node is None or node.op_type != "Gather" or node.input[1] not in constants:
            return False
        shape = producers.get(node.input[0])
        is_first = not np.any(numpy_helper.to_array(constants[node.input[1]]))
        return is_first and shape is not None and shape.op_type == "Shape" and shape.input[0] in batched

    made: list[NodeProto] = []
    for node in nodes:
        sizes = producers.get(node.input[1]) if node.op_type == "Reshape" and node.input[0] in batched else None
        if sizes is not None and sizes.op_type == "Concat" and is_batch_size(sizes.input[0]):
            same, shape = f"{node.output[0]}/same_batch", f"{node.output[0]}/sizes"
            zero = numpy_helper.from_array(np.zeros(1, dtype=np.int64))
            made.append(helper.make_node("Constant", [], [same], same, value=zero))
            made.append(helper.make_node("Concat", [same, *sizes.input[1:]], [shape], shape, axis=0))
            node = _reading(node, {node.input[1]: shape})
        made.append(node)
    return made


def _folded_constants(
    nodes: Sequence[NodeProto], constants: Mapping[str, NDArray[np.generic]], outputs: AbstractSet[str]
) -> tuple[list[NodeProto], Arrays]:
    """Returns the nodes that depend on an input or a parameter, and the values of all constants."""
    values, left = dict(constants), []
    for node in nodes:
        is_known = all(name in values for name in node.input if name) and outputs.isdisjoint(node.output)
        results = _evaluated(node, values) if is_known else None
        if results is None:
            left.append(node)
        else:
            values |= results
    return left, values


def _evaluated(node: NodeProto, values: Mapping[str, NDArray[np.generic]]) -> Arrays | None:
    """Returns a node's outputs for constant inputs; None if it is random, too large or cannot be evaluated."""
    if node.op_type.startswith("Random") or any(attribute.HasField("g") for attribute in node.attribute):
        return None
    try:
        outputs = ReferenceEvaluator(node).run(None, {name: values[name] for name in node.input if name})
    except Exception:  # operators that the reference implementation lacks stay in the graph
        return None
    named = {name: np.asarray(value) for name, value in zip(node.output, outputs, strict=True)}
    return named if sum(value.size for value in named.values()) <= _MAX_CONSTANT else None


def _folded_pads(
    nodes: Sequence[NodeProto], constants: Mapping[str, NDArray[np.generic]], outputs: AbstractSet[str]
) -> list[NodeProto]:
    """Returns the nodes without zero pads that only convolutions read; the convolutions pad instead.

    Other zero pads lose their explicit value, because zero is the default.
    """
    readers: dict[str, list[NodeProto]] = {}
    for node in nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    names, added = dict[str, str](), dict[str, list[int]]()
    left = []
    for original in nodes:
        node = _reading(original, names)
        if node.op_type == "Pad" and len(node.input) > 2 and not np.any(constants.get(node.input[2], 1)):
            del node.input[2:]  # zero is the default
        pads = _zeros_around(node, constants)
        following = readers.get(original.output[0], [])
        if pads and original.output[0] not in outputs and all(_pads_itself(reader, original) for reader in following):
            names[original.output[0]] = node.input[0]
            added |= {reader.name: pads for reader in following}
        elif node.name in added:
            left.append(_padded(node, added[node.name]))
        else:
            left.append(node)
    return left


def _zeros_around(node: NodeProto, constants: Mapping[str, NDArray[np.generic]]) -> list[int] | None:
    """Returns the spatial pads of a `Pad` node with zeros, in ONNX's order; None for any other node."""
    mode = next((attribute.s for attribute in node.attribute if attribute.name == "mode"), b"constant")
    if node.op_type != "Pad" or mode != b"constant" or node.input[1] not in constants or len(node.input) > 3:
        return None
    pads = constants[node.input[1]].tolist()
    axes = len(pads) // 2
    ends = [*pads[:2], *pads[axes : axes + 2]]
    is_spatial = not any(node.input[2:]) and not any(ends) and min(pads) >= 0
    return [*pads[2:axes], *pads[axes + 2 :]] if is_spatial else None


def _pads_itself(reader: NodeProto, pad: NodeProto) -> bool:
    """Returns whether a node is a convolution of the padded tensor."""
    is_input = Counter(reader.input)[pad.output[0]] == 1 and reader.input[0] == pad.output[0]
    return reader.op_type == "Conv" and is_input


def _padded(node: NodeProto, pads: Sequence[int]) -> NodeProto:
    """Returns a convolution with pads added to its own."""
    made = NodeProto()
    made.CopyFrom(node)
    own = next((list(attribute.ints) for attribute in node.attribute if attribute.name == "pads"), [0] * len(pads))
    kept = [attribute for attribute in node.attribute if attribute.name not in ("pads", "auto_pad")]
    del made.attribute[:]
    made.attribute.extend(kept)
    made.attribute.append(
        helper.make_attribute("pads", [before + added for before, added in zip(own, pads, strict=True)])
    )
    return made


def _needed(nodes: Sequence[NodeProto], outputs: AbstractSet[str]) -> list[NodeProto]:
    """Returns the nodes that an output depends on, in order."""
    needed, left = set(outputs), []
    for node in reversed(nodes):
        if not needed.isdisjoint(node.output):
            needed.update(node.input)
            left.append(node)
    return left[::-1]
