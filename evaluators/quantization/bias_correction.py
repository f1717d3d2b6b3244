"""Biases that make up for what the rounding of weights does to a layer's mean output."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from evaluators.graph.probe import Means
from evaluators.graph.template import DEQUANTIZED, Arrays


def corrected(nodes: Sequence[NodeProto], values: Arrays, means: Means) -> tuple[list[NodeProto], Arrays]:
    """Returns a stage whose int8 layers have the mean output of the float ones: `b - (W_q - W) E[x]`.

    Borders are left out of account: padding is taken for a usual input. A product whose bias is a node of its own
    stays as it is.
    Source: Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, 2019, section 4.2.

    Args:
        nodes: with Q/DQ.
        values: of every initializer, float weights among them.
        means: of the layers' inputs.
    """
    written, arrays = [], dict(values)
    for node in nodes:
        weight = node.input[1].removesuffix(DEQUANTIZED) if len(node.input) > 1 else ""
        if weight in means and node.input[1] == weight + DEQUANTIZED:
            node, bias = _with_bias(node, f"{weight}/bias")
            given = values[bias].astype(np.float64) if bias else 0.0
            arrays[node.input[2]] = (given - mean_error(node, weight, values, means)).astype(np.float32)
        written.append(node)
    return written, arrays


def mean_error(node: NodeProto, weight: str, values: Arrays, means: Means) -> NDArray[np.float64]:
    """Returns what rounding adds to the mean of each output channel of a convolution or linear layer, `(outputs,)`."""
    axis = 0 if node.op_type == "Conv" or _is_transposed(node) else 1
    scale = values[f"{weight}/scale"].astype(np.float64)
    error = np.moveaxis(values[f"{weight}/q"].astype(np.float64), axis, 0)
    error = error * scale.reshape(-1, *[1] * (error.ndim - 1)) - np.moveaxis(values[weight].astype(np.float64), axis, 0)
    summed = error.reshape(*error.shape[:2], -1).sum(axis=2)
    # Each output channel of a grouped convolution reads the channels of its group.
    groups = len(means[weight]) // summed.shape[1]
    inputs = np.repeat(means[weight].reshape(groups, -1), len(summed) // groups, axis=0)
    return np.asarray((summed * inputs).sum(axis=1))


def _is_transposed(node: NodeProto) -> bool:
    return any(attribute.name == "transB" and attribute.i for attribute in node.attribute)


def _with_bias(given: NodeProto, name: str) -> tuple[NodeProto, str]:
    """Returns a layer with a bias of that name, and the name that its bias had; empty where it had none."""
    node = NodeProto()
    node.CopyFrom(given)
    bias = node.input[2] if len(node.input) > 2 else ""
    del node.input[2:]
    node.input.append(name)
    return node, bias
