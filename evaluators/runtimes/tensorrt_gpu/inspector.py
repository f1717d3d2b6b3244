"""What an engine became, read from TensorRT's inspector."""

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
"""In this order: the name of one may contain another's."""

_FUSED_REGION = ("ForeignNode", "__myl_")


class InspectionError(UserError):
    """An engine that does not tell what it became."""


@dataclass(frozen=True)
class LayerRow:
    """One layer of an engine.

    Args:
        name: joins the names of the ONNX nodes that were fused into it.
        kind: TensorRT's own type of layer.
        inputs: datatype of each input, as `fp32`, `fp16`, `int8` and so on.
        outputs: datatype of each output.
        weights: datatype of the weights; None where there are none or the inspector is silent.
        origin: the ONNX nodes it came from, in the inspector's words.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: str | None
    origin: str = ""


def layer_rows(information: str) -> list[LayerRow]:
    """Returns the layers in the inspector's JSON, as TensorRT 10 and 11 write it.

    TensorRT 10 writes layout and datatype into one field, `Format/Datatype`; 11 has `Format` and `DataType`.

    Raises:
        InspectionError: the engine was built without detailed profiling, so that there are only names.
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
    told = [next((str(tensor[field]) for field in fields if tensor.get(field)), "") for tensor in tensors or ()]
    return tuple(precision_of(text) or text for text in told)


def precision_of(text: str) -> str | None:
    """Returns the precision that a datatype or a layout names; None where it names none.

    precision_of("Thirty-two wide channel vectorized row major Int8 format")   # int8
    precision_of("Half")                                                       # fp16
    """
    return next((name for name, pattern in _PRECISIONS if pattern.search(text)), None)


def precision_proof(rows: Sequence[LayerRow], asked: Mapping[str, str]) -> Proof:
    """Returns every layer that does not run in the precision that was asked for, or does not tell; none is the proof.

    Args:
        rows: of the engine.
        asked: the precision of each layer, by the name of its ONNX node.
    """
    found = {layer: [row for row in rows if _computes(row, layer)] for layer in asked}
    unproven = tuple(layer for layer in asked if any(_is_region(row) for row in found[layer]))
    differences = (line for layer, precision in asked.items() for line in _mismatches(found[layer], layer, precision))
    return Proof(tuple(differences), unproven)


def _is_region(row: LayerRow) -> bool:
    return any(mark in row.name for mark in _FUSED_REGION)


def _mismatches(found: Sequence[LayerRow], layer: str, precision: str) -> Iterator[str]:
    if not found:
        yield f"{layer}: asked for {precision}, but no layer of the engine names it"
    for row in found:
        if _is_region(row):
            continue  # its types are those at its rim
        where = f"in {row.name!r} ({row.kind})"
        source = row.inputs[0] if row.inputs else "unknown"
        if source != precision:
            yield f"{layer}: asked for {precision}, but reads {source} {where}"
        if row.weights is not None and row.weights != precision:
            yield f"{layer}: asked for {precision}, but has {row.weights} weights {where}"


def _computes(row: LayerRow, layer: str) -> bool:
    if row.kind in ("Reformat", "Constant", "NoOp"):  # named after the layer that they feed
        return False
    name = re.compile(rf"(?<![\w./]){re.escape(layer)}(?![\w./])")
    return bool(name.search(row.name) or name.search(row.origin))
