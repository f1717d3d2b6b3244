"""Makes int8 files fast on CPU runtimes: unsigned activations, and no clips in front of quantizers.

The onnx package is imported inside of functions, because boards only run files and do not have it.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

_ROUNDING = 1e-6
"""Tolerance for the rounding of a scale to float32, by which its range may exceed the bounds of a clip."""
_NON_NEGATIVE = {"Relu", "Sigmoid", "HardSigmoid", "Softmax", "Softplus", "Abs", "Exp", "Sqrt"}
"""Operators whose results are never negative."""
_SIGN_KEEPING = {
    *("QuantizeLinear", "DequantizeLinear", "Cast", "Identity", "Dropout"),
    *("Flatten", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Split", "Gather", "Expand", "DepthToSpace"),
    *("MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool", "LpPool", "GlobalLpPool"),
    *("ReduceMean", "ReduceMax", "ReduceMin", "ReduceSum", "CumSum"),
}
"""Operators whose results are not negative if their first input is not."""
_SIGN_KEEPING_TOGETHER = {"Add", "Mul", "Concat", "Sum", "Mean", "Min", "Div", "MatMul"}
"""Operators whose results are not negative if none of their inputs is."""


def unsigned_activations(model: bytes) -> bytes:
    """Returns the model with every s8 activation as u8; fp8 activations are unchanged.

    Tensors that are never negative get zero point 0 and all 255 steps instead of the 127 of s8. The range is the same,
    so values are clipped alike, and the runtime fuses the ReLU into the convolution. A `Clip` or `Relu` in front of a
    quantizer is removed, because ONNX Runtime fuses only a `Relu`; if the quantized range is wider than its bounds, the
    integers are clipped instead.
    """
    import onnx

    proto = onnx.load_from_string(model)
    return bytes(proto.SerializeToString(deterministic=True)) if make_unsigned(proto.graph) else model


def make_unsigned(graph: "GraphProto") -> bool:
    """Makes every s8 activation of a graph u8, in place, see `unsigned_activations`; returns whether there was any."""
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
    """Returns how many nodes read each tensor; an output of the graph counts as one more reader."""
    return Counter(name for node in graph.node for name in node.input) + Counter(out.name for out in graph.output)


def _move_zero_points(graph: "GraphProto", quantizers: "Sequence[NodeProto]") -> None:
    """Changes zero points and scales from s8 to u8, in place: 0 for tensors that are never negative, else 128."""
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
    """Which tensors of a graph are never negative, by the operators that compute them."""

    def __init__(self, graph: "GraphProto") -> None:
        from onnx import numpy_helper

        self._values = {tensor.name: tensor for tensor in graph.initializer}
        self._to_array = numpy_helper.to_array
        self._is_non_negative: dict[str, bool] = {}
        for node in graph.node:
            self._is_non_negative |= dict.fromkeys(node.output, self._has_non_negative_result(node))

    def is_non_negative(self, tensor: str) -> bool:
        """Returns whether a tensor is never negative; False if unknown."""
        if tensor in self._values:
            return bool((self._to_array(self._values[tensor]) >= 0).all())
        return self._is_non_negative.get(tensor, False)

    def _has_non_negative_result(self, node: "NodeProto") -> bool:
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
    """Removes each `Clip` and `Relu` that only a quantizer reads, and clips the integers instead where needed.

    Between a convolution and its quantizer, it would keep both in float.
    """
    from onnx import numpy_helper

    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}
    readers = count_readers(graph)
    removed: set[str] = set()
    clips_after: dict[str, list[NodeProto]] = {}
    for quantizer in quantizers:
        clip = producers.get(quantizer.input[0])
        bounds = _bounds(clip, values) if clip is not None and readers[clip.output[0]] == 1 else None
        if clip is None or bounds is None:
            continue
        removed.add(clip.output[0])
        quantizer.input[0] = clip.input[0]
        scale, zero_point = (values[name].astype(np.float64) for name in quantizer.input[1:3])
        steps = np.clip(np.rint(np.asarray(bounds) / scale * (1 + _ROUNDING) + zero_point), 0, 255).astype(np.uint8)
        if steps.tolist() != [0, 255]:
            clips_after[quantizer.name] = [_integer_clip(quantizer, steps, graph)]
    nodes = [
        node for kept in graph.node if kept.output[0] not in removed for node in (kept, *clips_after.get(kept.name, []))
    ]
    del graph.node[:]
    graph.node.extend(nodes)


def _integer_clip(quantizer: "NodeProto", steps: NDArray[np.uint8], graph: "GraphProto") -> "NodeProto":
    """Returns a node that clips a quantizer's result to `steps`, its lowest and highest integer."""
    from onnx import helper, numpy_helper

    result = quantizer.output[0]
    names = [f"{result}/least", f"{result}/most"]
    graph.initializer.extend(
        numpy_helper.from_array(np.array(step), name) for step, name in zip(steps, names, strict=True)
    )
    quantizer.output[0] = f"{result}/unclipped"
    return helper.make_node("Clip", [quantizer.output[0], *names], [result], f"{result}/Clip")


def _pad_integers(graph: "GraphProto") -> None:
    """Makes pads with zeros between equal scales pad the integers with the zero point."""
    from onnx import numpy_helper

    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}
    readers = count_readers(graph)
    removed: set[str] = set()
    for quantizer in (node for node in graph.node if node.op_type == "QuantizeLinear"):
        pad = producers.get(quantizer.input[0])
        source = producers.get(pad.input[0]) if pad is not None and pad.op_type == "Pad" else None
        if pad is None or source is None or source.op_type != "DequantizeLinear" or readers[pad.output[0]] > 1:
            continue
        mode = next((attribute.s for attribute in pad.attribute if attribute.name == "mode"), b"constant")
        scales_and_zero_points = zip(source.input[1:], quantizer.input[1:], strict=True)
        if (
            mode == b"constant"
            and not any(pad.input[2:])
            and all(np.array_equal(values[a], values[b]) for a, b in scales_and_zero_points)
        ):
            inputs = [source.input[0], pad.input[1], quantizer.input[2]]
            removed |= {quantizer.name} | ({source.name} if readers[source.output[0]] == 1 else set())
            del pad.input[:]
            pad.input.extend(inputs)
            pad.output[0] = quantizer.output[0]
    nodes = [node for node in graph.node if node.name not in removed]
    del graph.node[:]
    graph.node.extend(nodes)


def _read_shapes_of_integers(graph: "GraphProto") -> None:
    """Makes nodes that need only a shape read the integers, so that nothing is dequantized for them."""
    sources = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    for node in graph.node:
        if node.op_type in ("Shape", "Size"):
            node.input[0] = sources.get(node.input[0], node.input[0])


def _bounds(node: "NodeProto", values: "Mapping[str, NDArray[np.generic]]") -> tuple[float, float] | None:
    """Returns the bounds of a `Clip` or `Relu`; None for any other node, and if the bounds are not constant."""
    if node.op_type == "Relu":
        return 0.0, np.inf
    low, high = (*node.input[1:], "", "")[:2]
    if node.op_type != "Clip" or any(name and name not in values for name in (low, high)):
        return None
    return float(values[low]) if low else -np.inf, float(values[high]) if high else np.inf
