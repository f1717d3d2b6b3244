"""Where a command writes: its result to standard output, what else there is to say perhaps beside it."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Output:
    """How much a command says, and in which form.

    Args:
        quiet: no progress and no remarks, but the result and what went wrong.
        as_json: the result is JSON; all else goes to standard error.
    """

    quiet: bool = False
    as_json: bool = False

    def console(self) -> "Console":
        """Returns the console for a result that people read, and for remarks about it."""
        from rich.console import Console

        return Console(stderr=self.as_json)

    def beside(self) -> "Console":
        """Returns the console for progress and warnings: standard error where the result alone is wanted."""
        from rich.console import Console

        return Console(stderr=self.as_json or self.quiet)


SPOKEN = Output()
"""Everything is said, for people."""


def write_json(content: Any) -> None:
    """Writes a result for a machine."""
    sys.stdout.write(json.dumps(content, indent=2) + "\n")


def write_lines(console: "Console", lines: Sequence[str]) -> None:
    """Writes lines as they are, however long."""
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
