"""Which targets exist on this machine, what each can do, and why one is missing."""

import importlib.util

from rich.console import Console
from rich.table import Table

from evaluators.target import RUNTIMES, TargetError, runtime
from search.cache import cache_folder
from search.environment import environment

_LATER = {"openvino": "Intel CPUs and GPUs"}
"""Runtimes that this version does not measure on yet."""


def examine(console: Console, target: str | None) -> None:
    """Writes a table of targets, here or on a board, and what this machine is."""
    table = Table(title="targets", title_justify="left")
    for heading in ("target", "here", "device", "precisions", "channels in", "notes"):
        table.add_column(heading)
    for name in [target] if target else RUNTIMES:
        table.add_row(name, *_row(name))
    for name, device in ({} if target else _LATER).items():
        installed = "its package is installed" if importlib.util.find_spec(name) else "its package is not installed"
        table.add_row(name, "no", device, "", "", f"this version does not measure on it yet; {installed}")
    console.print(table)
    for name, value in environment("").items():
        if value:
            console.print(f"{name}: {value}", highlight=False)
    console.print(f"trained networks are kept in {cache_folder()}", highlight=False, soft_wrap=True)


def _row(name: str) -> tuple[str, str, str, str, str]:
    try:
        found = runtime(name)
    except (TargetError, ImportError) as error:
        return "no", "", "", "", str(error)
    able = found.capabilities()
    notes = [found.version()]
    if able.weight_bits < 8:
        notes.append(f"int8 weights in {able.weight_bits} bits, because this CPU has no VNNI")
    return "yes", found.device(), ", ".join(able.precisions), f"steps of {able.channel_step}", "; ".join(notes)
