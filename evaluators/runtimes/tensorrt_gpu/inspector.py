"""The layers of an engine and their precisions, read from TensorRT's engine inspector."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evaluators.runtimes.base import Proof
from spaces.errors import UserError

_PRECISIONS = (
    ("bf16", re.compile(r"bf16|bfloat16", re.IGNORECASE)),
    ("fp8", re.compile(r"fp8|e4m3", re.IGNORECASE)),
    ("fp16", re.compile(r"fp16|half|float16", re.IGNORECASE)),
    ("int64", re.compile(r"int64", re.IGNORECASE)),
    ("int32", re.compile(r"int32", re.IGNORECASE)),
    ("int8", re.compile(r"int8", re.IGNORECASE)),
    ("fp32", re.compile(r"fp32|float", re.IGNORECASE)),
    ("bool", re.compile(r"bool", re.IGNORECASE)),
)
"""Patterns of datatypes, in the order in which they are tried: `bfloat16` also contains `float16`."""

_FUSED_REGION = ("ForeignNode", "__myl_")
"""Marks in the names of regions that TensorRT compiles as a whole; their inner precisions are not reported."""


class InspectionError(UserError):
    """The engine has no information on its layers."""


@dataclass(frozen=True)
class LayerRow:
    """One layer of an engine.

    Args:
        name: the names of the ONNX nodes that were fused into it, joined.
        kind: TensorRT's type of layer.
        inputs: datatype of each input, as `fp32`, `fp16`, `int8` and so on.
        outputs: datatype of each output.
        weights: datatype of the weights; None where there are none or the inspector does not report it.
        origin: the ONNX nodes that it came from, as the inspector writes them.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: str | None
    origin: str = ""


def layer_rows(information: str) -> list[LayerRow]:
    """Returns the layers from the inspector's JSON, as TensorRT 10 and 11 write it.

    TensorRT 10 writes layout and datatype into one field, `Format/Datatype`; 11 has `Format` and `DataType`.

    Raises:
        InspectionError: the engine was built without detailed profiling, so there are only names.
    """
    layers = json.loads(information).get("Layers", [])
    names_only = [layer for layer in layers if isinstance(layer, str)]
    if names_only:
        raise InspectionError(
            f"an engine tells its precisions when built with detailed profiling, got the bare name {names_only[0]!r};"
            " build it with ProfilingVerbosity.DETAILED"
        )
    return [_row(layer) for layer in layers]


def _row(layer: Mapping[str, Any]) -> LayerRow:
    weights = layer.get("Weights")
    return LayerRow(
        name=str(layer.get("Name", "")),
        kind=str(layer.get("LayerType", "")),
        inputs=_datatypes(layer.get("Inputs")),
        outputs=_datatypes(layer.get("Outputs")),
        weights=precision_of(str(weights.get("Type", ""))) if isinstance(weights, Mapping) else None,
        origin=str(layer.get("Metadata") or ""),
    )


def _datatypes(tensors: Sequence[Mapping[str, Any]] | None) -> tuple[str, ...]:
    fields = ("DataType", "Format/Datatype", "Format")
    names = [next((str(tensor[field]) for field in fields if tensor.get(field)), "") for tensor in tensors or ()]
    return tuple(precision_of(name) or name for name in names)


def precision_of(text: str) -> str | None:
    """Returns the precision in the name of a datatype or layout; None if there is none.

    precision_of("Thirty-two wide channel vectorized row major Int8 format")   # int8
    precision_of("Half")                                                       # fp16
    """
    return next((name for name, pattern in _PRECISIONS if pattern.search(text)), None)


def precision_proof(rows: Sequence[LayerRow], requested: Mapping[str, str]) -> Proof:
    """Returns the layers that run in another precision than requested, and those whose precision is not reported.

    Args:
        rows: the engine's layers.
        requested: the precision of each layer, by the name of its ONNX node.
    """
    rows_of = {layer: [row for row in rows if _computes(row, layer)] for layer in requested}
    unproven = tuple(layer for layer in requested if any(_is_region(row) for row in rows_of[layer]))
    mismatches = (
        line for layer, precision in requested.items() for line in _mismatches(rows_of[layer], layer, precision)
    )
    return Proof(tuple(mismatches), unproven)


def _is_region(row: LayerRow) -> bool:
    return any(mark in row.name for mark in _FUSED_REGION)


def _mismatches(rows: Sequence[LayerRow], layer: str, precision: str) -> Iterator[str]:
    """Yields what differs between a layer's requested precision and the engine's layers that compute it."""
    if not rows:
        yield f"{layer}: asked for {precision}, but no layer of the engine names it"
    for row in rows:
        if _is_region(row):
            continue  # its datatypes are those of the region's inputs and outputs
        where = f"in {row.name!r} ({row.kind})"
        source = row.inputs[0] if row.inputs else "unknown"
        if source != precision:
            yield f"{layer}: asked for {precision}, but reads {source} {where}"
        if row.weights is not None and row.weights != precision:
            yield f"{layer}: asked for {precision}, but has {row.weights} weights {where}"


def _computes(row: LayerRow, layer: str) -> bool:
    """Returns whether an engine's layer computes an ONNX layer, possibly fused with others."""
    if row.kind in ("Reformat", "Constant", "NoOp"):  # these have the name of the layer that reads them
        return False
    name = re.compile(rf"(?<![\w./]){re.escape(layer)}(?![\w./])")
    return bool(name.search(row.name) or name.search(row.origin))
