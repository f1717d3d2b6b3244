"""Which targets exist on this machine, what each can do, and why one is missing."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from evaluators.runtimes.base import TargetError
from evaluators.runtimes.registry import RUNTIMES, runtime
from search.config.cache import cache_folder
from search.config.environment import environment
from search.report.output import Output, write_json, write_lines


def examine(target: str | None, output: Output) -> None:
    """Writes a table of targets, here or on a board, and what this machine is."""
    found = {name: _told(name) for name in ([target] if target else RUNTIMES)}
    if output.as_json:
        content = {"targets": found, "environment": environment(""), "cache": str(cache_folder())}
        write_json(content)
        return
    console = output.console()
    table = Table(title="targets", title_justify="left")
    for heading in ("target", "here", "device", "precisions", "channels in", "notes"):
        table.add_column(heading)
    for name, told in found.items():
        if "missing" in told:
            table.add_row(name, "no", "", "", "", "see below")
        else:
            able = (told["device"], ", ".join(told["precisions"]), _steps(told["channel_steps"]))
            table.add_row(name, "yes", *able, "; ".join(told["notes"]))
    console.print(table)
    lines = [f"{name} is not here: {told['missing']}" for name, told in found.items() if "missing" in told]
    lines += [f"{name}: {value}" for name, value in environment("").items() if value]
    lines.append(f"trained networks, measured latencies and timing caches are kept in {cache_folder()}")
    write_lines(console, lines)  # below the table, where a command can be copied whole


def _told(name: str) -> dict[str, Any]:
    """Returns what a target can do, or under `missing` why it is not here."""
    try:
        found = runtime(name)
    except (TargetError, ImportError) as error:
        return {"missing": str(error).removeprefix(f"target {name!r} is not available here: ")}
    able = found.capabilities()
    notes = [found.version()]
    if able.sparse_2_4:
        notes.append("2:4 sparsity")
    if able.int8_channels > 1:
        notes.append(f"8 bits from {able.int8_channels} channels on")
    for kind in able.fp32_in:
        notes.append(f'all fp32 layers in {kind} with target.fp32_in = "{kind}" in the study')
    for kind in able.storage:
        notes.append(f"weights in {kind} with space.storage in the study")
    if able.weight_bits < 8:
        notes.append(f"int8 weights in {able.weight_bits} bits, because this CPU has no VNNI")
    return {
        "device": found.device(),
        "precisions": list(able.precisions),
        "channel_steps": dict(able.channel_steps),
        "notes": notes,
    }


def _steps(channel_steps: Mapping[str, int]) -> str:
    """Returns the multiples that channels come in: `steps of 8`, or `8 (fp32, fp16), 32 (int8)`."""
    names: dict[int, list[str]] = {}
    for precision, step in channel_steps.items():
        names.setdefault(step, []).append(precision)
    if len(names) == 1:
        return f"steps of {next(iter(names))}"
    return ", ".join(f"{step} ({', '.join(names[step])})" for step in sorted(names))
