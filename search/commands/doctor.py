"""`python -m search doctor`: the available targets, their capabilities, and why others are missing."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from evaluators.runtimes.base import TargetError
from evaluators.runtimes.registry import RUNTIMES
from evaluators.runtimes.registry import runtime as open_runtime
from search.config.cache import cache_folder
from search.config.environment import environment
from search.report.output import Output, write_json, write_lines


def examine(target: str | None, output: Output) -> None:
    """Prints a table of targets, here or on a board, and the environment."""
    targets = {name: _describe(name) for name in ([target] if target else RUNTIMES)}
    if output.as_json:
        content = {"targets": targets, "environment": environment(""), "cache": str(cache_folder())}
        write_json(content)
        return
    console = output.console()
    table = Table(title="targets", title_justify="left")
    for heading in ("target", "here", "device", "precisions", "channels in", "notes"):
        table.add_column(heading)
    for name, description in targets.items():
        if "missing" in description:
            table.add_row(name, "no", "", "", "", "see below")
        else:
            cells = (description["device"], ", ".join(description["precisions"]), _steps(description["channel_steps"]))
            table.add_row(name, "yes", *cells, "; ".join(description["notes"]))
    console.print(table)
    lines = [
        f"{name} is not here: {description['missing']}"
        for name, description in targets.items()
        if "missing" in description
    ]
    lines += [f"{name}: {value}" for name, value in environment("").items() if value]
    lines.append(f"trained networks, measured latencies and timing caches are kept in {cache_folder()}")
    write_lines(console, lines)  # below the table, so that commands can be copied


def _describe(name: str) -> dict[str, Any]:
    """Returns the capabilities of a target, or under `missing` why it is not available."""
    try:
        runtime = open_runtime(name)
    except (TargetError, ImportError) as error:
        return {"missing": str(error).removeprefix(f"target {name!r} is not available here: ")}
    capabilities = runtime.capabilities()
    notes = [runtime.version()]
    if capabilities.sparse_2_4:
        notes.append("2:4 sparsity")
    if capabilities.int8_channels > 1:
        notes.append(f"8 bits from {capabilities.int8_channels} channels on")
    for kind in capabilities.fp32_in:
        notes.append(f'all fp32 layers in {kind} with target.fp32_in = "{kind}" in the study')
    for kind in capabilities.storage:
        notes.append(f"weights in {kind} with space.storage in the study")
    if capabilities.weight_bits < 8:
        notes.append(f"int8 weights in {capabilities.weight_bits} bits, because this CPU has no VNNI")
    return {
        "device": runtime.device(),
        "precisions": list(capabilities.precisions),
        "channel_steps": dict(capabilities.channel_steps),
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
