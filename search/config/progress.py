"""How long steps are shown."""

from typing import Protocol


class Progress(Protocol):
    """Shows how far a long step is."""

    def __call__(self, step: str, done: int, total: int) -> None:
        """Reports that `done` of `total` parts of `step` are finished."""
        ...


class Say(Protocol):
    """Writes a line for the user."""

    def __call__(self, text: str) -> None:
        """Takes one line."""
        ...
