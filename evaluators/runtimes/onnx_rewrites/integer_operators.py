"""What ONNX Runtime computes in float between int8 layers though it has integer kernels for it, written for these.

Seen in 1.32, one thread, batch 1: a linear layer whose bias is float runs in float (a tenth of MobileNetV2's int8
time), and so do hard gates (a sixth of MobileNetV3-Small's).
"""

from typing import TYPE_CHECKING

import numpy as np

from evaluators.runtimes.onnx_rewrites.unsigned_activations import count_readers, make_unsigned

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

_INT32 = 2**31 - 1


def integer_form(model: bytes) -> bytes:
    """Returns an int8 model in whose u8 form all that has integer kernels runs in them; any other model as it is."""
    import onnx  # a board runs files and makes none, so it has no onnx

    proto = onnx.load_from_string(model)
    if not make_unsigned(proto.graph):
        return model
    _quantize_biases(proto.graph)
    _share_slopes(proto.graph)
    _compute_hard_gates(proto.graph)
    return bytes(proto.SerializeToString(deterministic=True))


def _quantize_biases(graph: "GraphProto") -> None:
    """Puts the bias of each `Gemm` of int8 tensors on the grid of its products, in int32.

    Of convolutions ONNX Runtime does so by itself. A bias that has no place in 32 bits stays as it is.
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
                stored = (steps.astype(np.int32), (left * right).astype(np.float32))
                graph.initializer.extend(numpy_helper.from_array(*each) for each in zip(stored, names, strict=True))
                node.input[2] = f"{bias}/dq"
                place = f"{bias}/DequantizeLinear"
                nodes.append(helper.make_node("DequantizeLinear", names, [node.input[2]], place, axis=0))
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _is_plain(node: "NodeProto") -> bool:
    """Returns whether a `Gemm` multiplies nothing by a factor."""
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
    """Computes each `HardSigmoid` and `HardSwish` between int8 tensors in int8.

    `alpha * x + beta` is an addition to the same integers under another scale; the range of its result, 0 to 1, clips
    it. A `HardSwish` is the product of that with `x`.
    """
    sources = {node.output[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
    quantized = {node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    readers = count_readers(graph)
    idle: set[str] = set()
    nodes: list[NodeProto] = []
    for node in graph.node:
        is_gate = node.op_type in ("HardSigmoid", "HardSwish") and node.input[0] in sources
        if is_gate and node.output[0] in quantized and readers[node.output[0]] == 1:
            nodes += _hard_gate(node, sources[node.input[0]], graph)
            idle |= {node.input[0]} if node.op_type == "HardSigmoid" and readers[node.input[0]] == 1 else set()
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(node for node in nodes if node.output[0] not in idle)


def _hard_gate(node: "NodeProto", source: "NodeProto", graph: "GraphProto") -> "list[NodeProto]":
    """Returns what computes a `HardSigmoid` or `HardSwish` of a tensor that `source` dequantizes in int8.

    Source: ONNX operator schemas, opset 17: HardSwish is x * HardSigmoid(x, alpha = 1/6, beta = 0.5).
    """
    from onnx import numpy_helper

    is_swish, place = node.op_type == "HardSwish", node.output[0]
    given = {attribute.name: attribute.f for attribute in node.attribute}
    alpha = 1 / 6 if is_swish else given.get("alpha", 0.2)
    beta = 0.5 if is_swish else given.get("beta", 0.5)
    scale = next(numpy_helper.to_array(each) for each in graph.initializer if each.name == source.input[1])
    unit, zero = f"{place}/unit", f"{place}/zero"
    stored = {
        f"{place}/alpha/scale": np.float32(scale * alpha),
        f"{place}/beta/q": np.uint8(255),
        f"{place}/beta/scale": np.float32(beta / 255),
        unit: np.float32(1 / 255),
        zero: np.uint8(0),
    }
    graph.initializer.extend(numpy_helper.from_array(np.asarray(value), name) for name, value in stored.items())
    made = [
        _step("DequantizeLinear", [source.input[0], f"{place}/alpha/scale", source.input[2]], f"{place}/alpha"),
        _step("DequantizeLinear", [f"{place}/beta/q", f"{place}/beta/scale", zero], f"{place}/beta"),
        _step("Add", [f"{place}/alpha", f"{place}/beta"], f"{place}/gate/float" if is_swish else place),
    ]
    if is_swish:
        made += [
            _step("QuantizeLinear", [f"{place}/gate/float", unit, zero], f"{place}/gate/q"),
            _step("DequantizeLinear", [f"{place}/gate/q", unit, zero], f"{place}/gate"),
            _step("Mul", [node.input[0], f"{place}/gate"], place),
        ]
    return made


def _step(operator: str, inputs: list[str], output: str) -> "NodeProto":
    from onnx import helper

    return helper.make_node(operator, inputs, [output], output)
