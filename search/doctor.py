"""Which targets exist on this machine, what each can do, and why one is missing."""

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from evaluators.target import RUNTIMES, TargetError, runtime
from search.cache import cache_folder
from search.environment import environment


def examine(console: Console, target: str | None) -> None:
    """Writes a table of targets, here or on a board, and what this machine is."""
    table = Table(title="targets", title_justify="left")
    for heading in ("target", "here", "device", "precisions", "channels in", "notes"):
        table.add_column(heading)
    missing: dict[str, str] = {}
    for name in [target] if target else RUNTIMES:
        table.add_row(name, *_row(name, missing))
    console.print(table)
    for name, reason in missing.items():  # below the table, where a command can be copied whole
        console.print(f"{name} is not here: {reason}", highlight=False, soft_wrap=True)
    for name, value in environment("").items():
        if value:
            console.print(f"{name}: {value}", highlight=False)
    console.print(
        f"trained networks, measured latencies and timing caches are kept in {cache_folder()}",
        highlight=False,
        soft_wrap=True,
    )


def _row(name: str, missing: dict[str, str]) -> tuple[str, str, str, str, str]:
    """Returns a target's row; where it is not here, `missing` gets the reason."""
    try:
        found = runtime(name)
    except (TargetError, ImportError) as error:
        missing[name] = str(error).removeprefix(f"target {name!r} is not available here: ")
        return "no", "", "", "", "see below"
    able = found.capabilities()
    notes = [found.version()]
    if able.sparse_2_4:
        notes.append("2:4 sparsity")
    if able.int8_channels > 1:
        notes.append(f"8 bits from {able.int8_channels} channels on")
    for kind in able.fp32_in:
        notes.append(f"all fp32 layers in {kind} with target.{kind} = true in the study")
    for kind in able.storage:
        notes.append(f"weights in {kind} with space.storage in the study")
    if able.weight_bits < 8:
        notes.append(f"int8 weights in {able.weight_bits} bits, because this CPU has no VNNI")
    return "yes", found.device(), ", ".join(able.precisions), _steps(able.channel_steps), "; ".join(notes)


def _steps(channel_steps: Mapping[str, int]) -> str:
    """Returns the multiples that channels come in: `steps of 8`, or `8 (fp32, fp16), 32 (int8)`."""
    names: dict[int, list[str]] = {}
    for precision, step in channel_steps.items():
        names.setdefault(step, []).append(precision)
    if len(names) == 1:
        return f"steps of {next(iter(names))}"
    return ", ".join(f"{step} ({', '.join(names[step])})" for step in sorted(names))
