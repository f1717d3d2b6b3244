"""Looking at what happens inside a file: the values of its tensors, and the means of its channels."""

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
"""So many images at a time keep the memory small."""


def observing(file: bytes, tensors: Sequence[str], reductions: Sequence[NodeProto] = ()) -> bytes:
    """Returns a file with other outputs, and without the nodes that they do not need.

    Args:
        file: a stage as ONNX.
        tensors: what it returns instead, in this order.
        reductions: nodes that are added and may be asked for.
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
    """Yields the values that one tensor takes for some images, a few at a time."""
    batches = [images[at : at + _BATCH] for at in range(0, len(images), _BATCH)]
    if tensor == onnx.load_from_string(file).graph.input[0].name:
        yield from batches
        return
    run = load(observing(file, [tensor]), 0)
    yield from (run(batch)[0] for batch in batches)


def input_means(file: bytes, nodes: Sequence[NodeProto], images: NDArray[np.float32]) -> dict[str, NDArray[np.float64]]:
    """Returns the mean of each input channel of each convolution and linear layer over `images`, `(inputs,)`.

    It is taken inside the graph, so that one number a channel leaves it, batch by batch.

    Args:
        file: the float network.
        nodes: its layers, among others.
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
    run = load(observing(file, [node.output[0] for node in reductions], reductions), 0)
    batches = [images[at : at + _BATCH] for at in range(0, len(images), _BATCH)]
    found = [run(batch) for batch in batches]
    sizes = [len(batch) for batch in batches]
    columns = zip(*found, strict=True)
    return {
        node.input[1]: np.average(np.array(column, dtype=np.float64), axis=0, weights=sizes)
        for node, column in zip(layers, columns, strict=True)
    }
