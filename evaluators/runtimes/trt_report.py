"""What an engine became and what state the GPU is in: read from TensorRT's inspector and the system's own tools."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluators.target import Proof
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
_SMI_FIELDS = "clocks.sm,clocks.mem,temperature.gpu,power.draw,pstate"
_NO_TOOL_AFTER_S = 10


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


@dataclass(frozen=True)
class DeviceState:
    """How fast the GPU may run just now; None or "" where nothing tells.

    Args:
        clock_hz: of the multiprocessors.
        memory_clock_hz: of the memory.
        temperature_c: of the GPU, in degrees Celsius.
        power_w: drawn just now.
        power_mode: a Jetson's power mode, or a discrete GPU's performance state.
    """

    clock_hz: float | None = None
    memory_clock_hz: float | None = None
    temperature_c: float | None = None
    power_w: float | None = None
    power_mode: str = ""


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


def state(system: Path = Path("/sys")) -> DeviceState:
    """Returns the GPU's state from nvidia-smi, or on a Jetson from nvpmodel and the kernel's files.

    Args:
        system: where the kernel's files are.
    """
    smi = _said("nvidia-smi", f"--query-gpu={_SMI_FIELDS}", "--format=csv,noheader,nounits", "--id=0")
    fields = [field.strip() for field in smi.splitlines()[0].split(",")] if smi.strip() else []
    fields += [""] * (5 - len(fields))
    clock, memory_clock, temperature, power = (_number(field) for field in fields[:4])
    return DeviceState(
        clock_hz=clock * 1e6 if clock is not None else _kernel_clock(system),
        memory_clock_hz=None if memory_clock is None else memory_clock * 1e6,
        temperature_c=temperature if temperature is not None else _kernel_temperature(system),
        power_w=power,
        power_mode=_power_mode() or (fields[4] if re.fullmatch(r"P\d+", fields[4]) else ""),
    )


def state_moved(before: DeviceState, after: DeviceState) -> list[str]:
    """Returns, in words, what changed enough to change a latency: 5% of a clock, 10 degrees, the power mode."""
    lines = []
    for name, old, new in (
        ("clock", before.clock_hz, after.clock_hz),
        ("memory clock", before.memory_clock_hz, after.memory_clock_hz),
    ):
        if old and new and abs(new / old - 1) > 0.05:
            lines.append(f"the GPU's {name} moved from {old / 1e6:.0f} to {new / 1e6:.0f} MHz")
    if before.temperature_c and after.temperature_c and abs(after.temperature_c - before.temperature_c) > 10:
        lines.append(f"the GPU went from {before.temperature_c:.0f} to {after.temperature_c:.0f} degrees Celsius")
    if before.power_mode != after.power_mode:
        lines.append(f"the power mode went from {before.power_mode!r} to {after.power_mode!r}")
    return lines


def _power_mode() -> str:
    found = re.search(r"Power Mode:\s*(\S.*)", _said("nvpmodel", "-q"))
    return found.group(1).strip() if found else ""


def _kernel_clock(system: Path) -> float | None:
    for folder in sorted(system.glob("class/devfreq/*")):
        if re.search(r"gpu|gv11b|ga10b|gp10b|gb10b", folder.name):
            return _number(_text(folder / "cur_freq"))
    return None


def _kernel_temperature(system: Path) -> float | None:
    for kind in sorted(system.glob("class/thermal/thermal_zone*/type")):
        if "gpu" in _text(kind).lower():
            found = _number(_text(kind.with_name("temp")))
            return None if found is None else found / 1e3
    return None


def _said(tool: str, *arguments: str) -> str:
    """Returns what a tool prints; nothing where it is missing, fails or does not come back."""
    path = shutil.which(tool)
    if path is None:
        return ""
    try:
        done = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=_NO_TOOL_AFTER_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
