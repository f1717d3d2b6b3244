"""The form of an int8 file that runtimes on CPUs run fast: unsigned activations, and no clips in front of quantizers.

The onnx package is imported where it is needed: boards run files and make none.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

_ROUNDING = 1e-6
"""A scale is rounded to float32, so that the range that it spans may exceed what it was made for by this share."""
_NON_NEGATIVE = {"Relu", "Sigmoid", "HardSigmoid", "Softmax", "Softplus", "Abs", "Exp", "Sqrt"}
"""Give nothing below 0, whatever they read."""
_SIGN_KEEPING = {
    *("QuantizeLinear", "DequantizeLinear", "Cast", "Identity", "Dropout"),
    *("Flatten", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Split", "Gather", "Expand", "DepthToSpace"),
    *("MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool", "LpPool", "GlobalLpPool"),
    *("ReduceMean", "ReduceMax", "ReduceMin", "ReduceSum", "CumSum"),
}
"""Give nothing below 0 where their first input has nothing below 0."""
_SIGN_KEEPING_TOGETHER = {"Add", "Mul", "Concat", "Sum", "Mean", "Min", "Div", "MatMul"}
"""Give nothing below 0 where none of their inputs has anything below 0."""


def unsigned_activations(model: bytes) -> bytes:
    """Returns the model with every s8 activation made u8; fp8 ones, and a model without any, stay as they are.

    What is never negative gets zero point 0 and all 255 steps, where s8 has 127 for it: both forms clip alike, and the
    runtime takes the rectifier into the convolution. A `Clip` or `Relu` in front of a quantizer goes, because ONNX
    Runtime fuses none but a `Relu`; where the quantized range reaches further, integers are clipped.
    """
    import onnx

    proto = onnx.load_from_string(model)
    return bytes(proto.SerializeToString(deterministic=True)) if make_unsigned(proto.graph) else model


def make_unsigned(graph: "GraphProto") -> bool:
    """Makes every s8 activation of a graph u8, as `unsigned_activations` does; returns whether there was any."""
    from onnx import TensorProto

    values = {tensor.name: tensor for tensor in graph.initializer}
    quantizers = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    quantizers = [node for node in quantizers if values[node.input[2]].data_type == TensorProto.INT8]
    _move_zero_points(graph, quantizers)
    _move_clips(graph, quantizers)
    _pad_integers(graph)
    _read_shapes_of_integers(graph)
    return bool(quantizers)


def count_readers(graph: "GraphProto") -> Counter[str]:
    """Returns how many nodes read each tensor; whoever takes a graph's output counts as one more."""
    return Counter(name for node in graph.node for name in node.input) + Counter(out.name for out in graph.output)


def _move_zero_points(graph: "GraphProto", quantizers: "Sequence[NodeProto]") -> None:
    from onnx import numpy_helper

    values = {tensor.name: tensor for tensor in graph.initializer}
    signs = _Signs(graph)
    for node in quantizers:
        scale, zero_point = values[node.input[1]], values[node.input[2]]
        offset = 0 if signs.is_non_negative(node.input[0]) else 128
        if offset == 0:
            wider = numpy_helper.to_array(scale) * np.float32(127 / 255)
            scale.CopyFrom(numpy_helper.from_array(wider, scale.name))
        zero_point.CopyFrom(numpy_helper.from_array(np.array(offset, dtype=np.uint8), zero_point.name))


class _Signs:
    """Tells which tensors of a graph are never negative, from the operators that give them."""

    def __init__(self, graph: "GraphProto") -> None:
        from onnx import numpy_helper

        self._values = {tensor.name: tensor for tensor in graph.initializer}
        self._read = numpy_helper.to_array
        self._known: dict[str, bool] = {}
        for node in graph.node:
            found = self._gives_nothing_negative(node)
            self._known |= dict.fromkeys(node.output, found)

    def is_non_negative(self, tensor: str) -> bool:
        """Returns whether a tensor is never negative; False where nobody knows."""
        if tensor in self._values:
            return bool((self._read(self._values[tensor]) >= 0).all())
        return self._known.get(tensor, False)

    def _gives_nothing_negative(self, node: "NodeProto") -> bool:
        if node.op_type in _NON_NEGATIVE:
            return True
        if node.op_type == "Clip":
            low = node.input[1] if len(node.input) > 1 else ""
            return self.is_non_negative(node.input[0]) or (low in self._values and self.is_non_negative(low))
        if node.op_type == "Pad":
            return all(self.is_non_negative(name) for name in (node.input[0], *filter(None, node.input[2:3])))
        if node.op_type in _SIGN_KEEPING:
            return self.is_non_negative(node.input[0])
        if node.op_type == "Max":
            return any(self.is_non_negative(name) for name in node.input)
        if node.op_type in _SIGN_KEEPING_TOGETHER:
            return all(self.is_non_negative(name) for name in node.input)
        return node.op_type == "Where" and all(self.is_non_negative(name) for name in node.input[1:])


def _move_clips(graph: "GraphProto", quantizers: "Sequence[NodeProto]") -> None:
    """Takes out each `Clip` and `Relu` that only a quantizer reads: integers are clipped instead where that is needed.

    Between a convolution and its quantizer it would keep both in float.
    """
    from onnx import numpy_helper

    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}
    readers = count_readers(graph)
    gone: set[str] = set()
    behind: dict[str, list[NodeProto]] = {}
    for quantizer in quantizers:
        clip = producers.get(quantizer.input[0])
        bounds = _bounds(clip, values) if clip is not None and readers[clip.output[0]] == 1 else None
        if clip is None or bounds is None:
            continue
        gone.add(clip.output[0])
        quantizer.input[0] = clip.input[0]
        scale, zero_point = (values[name].astype(np.float64) for name in quantizer.input[1:3])
        steps = np.clip(np.rint(np.asarray(bounds) / scale * (1 + _ROUNDING) + zero_point), 0, 255).astype(np.uint8)
        if steps.tolist() != [0, 255]:
            behind[quantizer.name] = [_integer_clip(quantizer, steps, graph)]
    nodes = [each for node in graph.node if node.output[0] not in gone for each in (node, *behind.get(node.name, []))]
    del graph.node[:]
    graph.node.extend(nodes)


def _integer_clip(quantizer: "NodeProto", steps: NDArray[np.uint8], graph: "GraphProto") -> "NodeProto":
    """Returns the clip of what a quantizer gives to the least and the largest of `steps`."""
    from onnx import helper, numpy_helper

    result = quantizer.output[0]
    names = [f"{result}/least", f"{result}/most"]
    graph.initializer.extend(
        numpy_helper.from_array(np.array(step), name) for step, name in zip(steps, names, strict=True)
    )
    quantizer.output[0] = f"{result}/unclipped"
    return helper.make_node("Clip", [quantizer.output[0], *names], [result], f"{result}/Clip")


def _pad_integers(graph: "GraphProto") -> None:
    """Lets pads of zeros between equal scales pad the integers, by their zero point."""
    from onnx import numpy_helper

    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}
    readers = count_readers(graph)
    gone: set[str] = set()
    for quantizer in (node for node in graph.node if node.op_type == "QuantizeLinear"):
        pad = producers.get(quantizer.input[0])
        source = producers.get(pad.input[0]) if pad is not None and pad.op_type == "Pad" else None
        if pad is None or source is None or source.op_type != "DequantizeLinear" or readers[pad.output[0]] > 1:
            continue
        mode = next((attribute.s for attribute in pad.attribute if attribute.name == "mode"), b"constant")
        grids = zip(source.input[1:], quantizer.input[1:], strict=True)
        if (
            mode == b"constant"
            and not any(pad.input[2:])
            and all(np.array_equal(values[a], values[b]) for a, b in grids)
        ):
            inputs = [source.input[0], pad.input[1], quantizer.input[2]]
            gone |= {quantizer.name} | ({source.name} if readers[source.output[0]] == 1 else set())
            del pad.input[:]
            pad.input.extend(inputs)
            pad.output[0] = quantizer.output[0]
    nodes = [node for node in graph.node if node.name not in gone]
    del graph.node[:]
    graph.node.extend(nodes)


def _read_shapes_of_integers(graph: "GraphProto") -> None:
    """Lets nodes that want a shape only read the integers, so that nothing is dequantized for them."""
    sources = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    for node in graph.node:
        if node.op_type in ("Shape", "Size"):
            node.input[0] = sources.get(node.input[0], node.input[0])


def _bounds(node: "NodeProto", values: "Mapping[str, NDArray[np.generic]]") -> tuple[float, float] | None:
    """Returns what a `Clip` or `Relu` lets through; None of any other node, and where the bounds are computed."""
    if node.op_type == "Relu":
        return 0.0, np.inf
    low, high = (*node.input[1:], "", "")[:2]
    if node.op_type != "Clip" or any(name and name not in values for name in (low, high)):
        return None
    return float(values[low]) if low else -np.inf, float(values[high]) if high else np.inf
