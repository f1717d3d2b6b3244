"""Bias correction: restores the mean outputs of layers after their weights are rounded."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from evaluators.graph.probe import Means
from evaluators.graph.template import DEQUANTIZED, Arrays


def corrected(nodes: Sequence[NodeProto], values: Arrays, means: Means) -> tuple[list[NodeProto], Arrays]:
    """Returns a stage whose int8 layers have the mean outputs of the float layers: the bias is `b - (W_q - W) E[x]`.

    Padding is treated like other inputs. A matrix product whose bias is a separate node is not corrected.
    Source: Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, 2019, section 4.2.

    Args:
        nodes: the stage's nodes with Q/DQ.
        values: the value of every initializer, including float weights.
        means: the means of the layers' inputs.
    """
    written, arrays = [], dict(values)
    for node in nodes:
        weight = node.input[1].removesuffix(DEQUANTIZED) if len(node.input) > 1 else ""
        if weight in means and node.input[1] == weight + DEQUANTIZED:
            node, bias = _with_bias(node, f"{weight}/bias")
            original = values[bias].astype(np.float64) if bias else 0.0
            arrays[node.input[2]] = (original - mean_error(node, weight, values, means)).astype(np.float32)
        written.append(node)
    return written, arrays


def mean_error(node: NodeProto, weight: str, values: Arrays, means: Means) -> NDArray[np.float64]:
    """Returns the mean error of each output channel of a layer due to the rounding of its weight, `(outputs,)`."""
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


def _with_bias(layer: NodeProto, name: str) -> tuple[NodeProto, str]:
    """Returns a copy of a layer with a bias of that name, and the name of its original bias; empty without one."""
    node = NodeProto()
    node.CopyFrom(layer)
    bias = node.input[2] if len(node.input) > 2 else ""
    del node.input[2:]
    node.input.append(name)
    return node, bias
