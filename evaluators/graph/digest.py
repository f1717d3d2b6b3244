"""Whether two ONNX files compute the same thing in the same way, whatever their tensors are called."""

import hashlib

import onnx


def form_of(file: bytes) -> str:
    """Returns a digest over an ONNX file's nodes, weights and metadata, and not over the names that it gives to them.

    A tensor that an exit reads has another name in the file than the same tensor where there is no exit.
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
