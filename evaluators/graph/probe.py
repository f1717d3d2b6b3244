"""Reads tensors inside an ONNX file: their values, and the means of channels."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, helper

from evaluators.graph.template import LAYER_OPS
from evaluators.runtimes.onnxruntime_cpu import load

Means = Mapping[str, NDArray[np.float64]]
"""The mean of each input channel of a layer, `(inputs,)`, by the name of the layer's weight."""

_BATCH = 8
"""The batch size, small to save memory."""


def with_outputs(file: bytes, tensors: Sequence[str], reductions: Sequence[NodeProto] = ()) -> bytes:
    """Returns a file with other outputs, without the nodes that they do not need.

    Args:
        file: a stage as ONNX.
        tensors: the names of the new outputs, in order.
        reductions: nodes to add, whose outputs may be among `tensors`.
    """
    model = onnx.load_from_string(file)
    nodes = [*model.graph.node, *reductions]
    needed, kept = set(tensors), []
    for node in reversed(nodes):
        if not needed.isdisjoint(node.output):
            needed.update(node.input)
            kept.append(node)
    del model.graph.node[:], model.graph.output[:]
    model.graph.node.extend(reversed(kept))
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors)
    return bytes(model.SerializeToString())


def observe(file: bytes, tensor: str, images: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    """Yields the values of one tensor for images `(n, c, h, w)`, a few images at a time."""
    batches = [images[start : start + _BATCH] for start in range(0, len(images), _BATCH)]
    if tensor == onnx.load_from_string(file).graph.input[0].name:
        yield from batches
        return
    run = load(with_outputs(file, [tensor]), 0)
    yield from (run(batch)[0] for batch in batches)


def input_means(file: bytes, nodes: Sequence[NodeProto], images: NDArray[np.float32]) -> dict[str, NDArray[np.float64]]:
    """Returns the mean of each input channel of each convolution and linear layer over `images`, `(inputs,)`.

    Means are computed inside the graph, which returns one number per channel and batch.

    Args:
        file: the float network.
        nodes: its nodes.
        images: `(n, c, h, w)`.
    """
    layers = [node for node in nodes if node.op_type in LAYER_OPS[:2]]
    reductions = [
        helper.make_node(
            "ReduceMean",
            [node.input[0]],
            [f"{node.input[1]}/mean"],
            axes=[0, 2, 3] if node.op_type == "Conv" else [0],
            keepdims=0,
        )
        for node in layers
    ]
    run = load(with_outputs(file, [node.output[0] for node in reductions], reductions), 0)
    batches = [images[start : start + _BATCH] for start in range(0, len(images), _BATCH)]
    means = [run(batch) for batch in batches]
    sizes = [len(batch) for batch in batches]
    columns = zip(*means, strict=True)
    return {
        node.input[1]: np.average(np.array(column, dtype=np.float64), axis=0, weights=sizes)
        for node, column in zip(layers, columns, strict=True)
    }
