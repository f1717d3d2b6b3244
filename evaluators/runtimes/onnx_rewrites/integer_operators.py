"""Rewrites operators between int8 layers so that ONNX Runtime uses its integer kernels instead of float ones.

Without them, in version 1.32 with one thread and batch 1, a linear layer with a float bias runs in float (a tenth of
MobileNetV2's int8 time), and so do hard sigmoids and hard swishes (a sixth of MobileNetV3-Small's).
"""

from typing import TYPE_CHECKING

import numpy as np

from evaluators.runtimes.onnx_rewrites.unsigned_activations import count_readers, make_unsigned

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

_INT32 = 2**31 - 1


def integer_form(model: bytes) -> bytes:
    """Returns an int8 model with u8 activations and integer operators; any other model unchanged."""
    import onnx  # imported here, because boards only run files and have no onnx

    proto = onnx.load_from_string(model)
    if not make_unsigned(proto.graph):
        return model
    _quantize_biases(proto.graph)
    _share_slopes(proto.graph)
    _compute_hard_gates(proto.graph)
    return bytes(proto.SerializeToString(deterministic=True))


def _quantize_biases(graph: "GraphProto") -> None:
    """Quantizes the bias of each `Gemm` of int8 tensors to int32, with the scale of its products.

    ONNX Runtime does so itself for convolutions. A bias that exceeds 32 bits stays in float.
    """
    from onnx import helper, numpy_helper

    values = {tensor.name: tensor for tensor in graph.initializer}
    scales = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "DequantizeLinear"}
    nodes: list[NodeProto] = []
    for node in graph.node:
        bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else ""
        if bias in values and all(name in scales for name in node.input[:2]) and _is_plain(node):
            left, right = (numpy_helper.to_array(values[scales[name]]) for name in node.input[:2])
            steps = np.rint(numpy_helper.to_array(values[bias]).astype(np.float64) / (left * right))
            if np.abs(steps).max(initial=0) <= _INT32:
                names = [f"{bias}/int32", f"{bias}/int32/scale"]
                arrays = (steps.astype(np.int32), (left * right).astype(np.float32))
                graph.initializer.extend(numpy_helper.from_array(*pair) for pair in zip(arrays, names, strict=True))
                node.input[2] = f"{bias}/dq"
                node_name = f"{bias}/DequantizeLinear"
                nodes.append(helper.make_node("DequantizeLinear", names, [node.input[2]], node_name, axis=0))
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _is_plain(node: "NodeProto") -> bool:
    """Returns whether a `Gemm` has no scaling factors: alpha and beta are 1."""
    return all(attribute.f == 1 for attribute in node.attribute if attribute.name in ("alpha", "beta"))


def _share_slopes(graph: "GraphProto") -> None:
    """Turns each `PRelu` that has one slope for all channels into a `LeakyRelu`, which has an integer kernel."""
    from onnx import helper, numpy_helper

    values = {tensor.name: tensor for tensor in graph.initializer}
    values |= {
        node.output[0]: values[node.input[0]]
        for node in graph.node
        if node.op_type in ("Unsqueeze", "Reshape") and node.input[0] in values
    }
    for node in graph.node:
        slope = values.get(node.input[1]) if node.op_type == "PRelu" else None
        if slope is not None and int(np.prod(slope.dims)) == 1:
            node.op_type = "LeakyRelu"
            node.attribute.append(helper.make_attribute("alpha", float(numpy_helper.to_array(slope).ravel()[0])))
            del node.input[1:]


def _compute_hard_gates(graph: "GraphProto") -> None:
    """Replaces each `HardSigmoid` and `HardSwish` between int8 tensors by operators with int8 kernels.

    `alpha * x` is `x` with another scale, so `alpha * x + beta` is an `Add`, and quantizing its result with the range
    0 to 1 clips it. A `HardSwish` multiplies that by `x`.
    """
    sources = {node.output[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
    quantized = {node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    readers = count_readers(graph)
    unused: set[str] = set()
    nodes: list[NodeProto] = []
    for node in graph.node:
        is_gate = node.op_type in ("HardSigmoid", "HardSwish") and node.input[0] in sources
        if is_gate and node.output[0] in quantized and readers[node.output[0]] == 1:
            nodes += _hard_gate(node, sources[node.input[0]], graph)
            unused |= {node.input[0]} if node.op_type == "HardSigmoid" and readers[node.input[0]] == 1 else set()
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(node for node in nodes if node.output[0] not in unused)


def _hard_gate(node: "NodeProto", source: "NodeProto", graph: "GraphProto") -> "list[NodeProto]":
    """Returns int8 operators for a `HardSigmoid` or `HardSwish` of a tensor that `source` dequantizes.

    Source: ONNX operator schemas, opset 17: HardSwish is x * HardSigmoid(x, alpha = 1/6, beta = 0.5).
    """
    from onnx import numpy_helper

    is_swish = node.op_type == "HardSwish"
    result = node.output[0]
    attributes = {attribute.name: attribute.f for attribute in node.attribute}
    alpha = 1 / 6 if is_swish else attributes.get("alpha", 0.2)
    beta = 0.5 if is_swish else attributes.get("beta", 0.5)
    scale = next(numpy_helper.to_array(tensor) for tensor in graph.initializer if tensor.name == source.input[1])
    unit, zero = f"{result}/unit", f"{result}/zero"
    values = {
        f"{result}/alpha/scale": np.float32(scale * alpha),
        f"{result}/beta/q": np.uint8(255),
        f"{result}/beta/scale": np.float32(beta / 255),
        unit: np.float32(1 / 255),
        zero: np.uint8(0),
    }
    graph.initializer.extend(numpy_helper.from_array(np.asarray(value), name) for name, value in values.items())
    nodes = [
        _node("DequantizeLinear", [source.input[0], f"{result}/alpha/scale", source.input[2]], f"{result}/alpha"),
        _node("DequantizeLinear", [f"{result}/beta/q", f"{result}/beta/scale", zero], f"{result}/beta"),
        _node("Add", [f"{result}/alpha", f"{result}/beta"], f"{result}/gate/float" if is_swish else result),
    ]
    if is_swish:
        nodes += [
            _node("QuantizeLinear", [f"{result}/gate/float", unit, zero], f"{result}/gate/q"),
            _node("DequantizeLinear", [f"{result}/gate/q", unit, zero], f"{result}/gate"),
            _node("Mul", [node.input[0], f"{result}/gate"], result),
        ]
    return nodes


def _node(operator: str, inputs: list[str], output: str) -> "NodeProto":
    from onnx import helper

    return helper.make_node(operator, inputs, [output], output)
