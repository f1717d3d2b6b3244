"""Command lines of this program, as a user can paste them into a shell."""

import shlex
from pathlib import Path

RUNS = Path("runs")
"""The folder of searches of a command line that names none."""


def command_line(*words: str, search: Path | None = None) -> str:
    """Returns the text of a command, quoted for a shell.

    Args:
        words: that follow the program's name.
        search: folder of the search that the command is for, which is named behind the words.
    """
    options = ["--search", search.name] if search is not None else []
    if search is not None and search.parent != RUNS:
        options += ["--runs", str(search.parent)]
    return shlex.join(["python", "-m", "search", *words, *options])
