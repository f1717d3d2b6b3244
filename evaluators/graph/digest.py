"""A digest of ONNX files that does not depend on the names of tensors."""

import hashlib

import onnx


def nameless_digest(file: bytes) -> str:
    """Returns a SHA-256 of an ONNX file's nodes, weights and metadata, independent of the names of nodes and tensors.

    Files of the same network with and without an exit call the tensor that the exit reads by different names.
    """
    model = onnx.load_from_string(file)
    graph = model.graph
    names: dict[str, str] = {"": ""}
    for value in graph.input:
        names.setdefault(value.name, str(len(names)))
    for node in graph.node:
        node.name = ""
        for slots in (node.input, node.output):
            slots[:] = [names.setdefault(name, str(len(names))) for name in slots]
    for value in (*graph.input, *graph.output, *graph.initializer):
        value.name = names.setdefault(value.name, str(len(names)))
    weights = sorted(graph.initializer, key=lambda tensor: tensor.name)
    content = hashlib.sha256()
    for tensor in weights:
        content.update(tensor.SerializeToString(deterministic=True))
    del graph.initializer[:]
    del graph.value_info[:]
    content.update(model.SerializeToString(deterministic=True))
    return content.hexdigest()
