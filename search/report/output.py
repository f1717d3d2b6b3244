"""Output of a command: its result, progress and remarks."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

REPORT_FORMS = (".html", ".md")
"""Endings of the files that a report is written to."""


@dataclass(frozen=True)
class Output:
    """Verbosity and format of a command's output.

    Args:
        quiet: whether to leave out progress and remarks; the result and errors are written.
        as_json: whether the result is JSON; all else goes to standard error then.
    """

    quiet: bool = False
    as_json: bool = False

    def console(self) -> "Console":
        """Returns the console for results as text, and for remarks on them."""
        from rich.console import Console

        return Console(stderr=self.as_json)

    def progress_console(self) -> "Console":
        """Returns the console for progress and warnings: standard error if standard output is for the result alone."""
        from rich.console import Console

        return Console(stderr=self.as_json or self.quiet)


TEXT_OUTPUT = Output()
"""Everything as text, for people."""


def write_json(content: Any) -> None:
    """Writes a result as JSON."""
    sys.stdout.write(json.dumps(content, indent=2) + "\n")


def write_lines(console: "Console", lines: Sequence[str]) -> None:
    """Writes lines without wrapping."""
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
