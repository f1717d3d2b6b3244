"""Ctrl-C only while a candidate is measured, not while its result is written."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Turns SIGINT and SIGTERM into `KeyboardInterrupt`, but only inside `allowed()`.

    A signal at another time is raised when `allowed()` is next entered. Outside the main thread nothing changes.
    """

    def __init__(self) -> None:
        self._allowed = False
        self._pending = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {name: signal.signal(name, self._handle) for name in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for name, handler in self._previous.items():
            signal.signal(name, handler)

    def _handle(self, _signal: int, _frame: FrameType | None) -> None:
        if self._allowed:
            raise KeyboardInterrupt
        self._pending = True

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """Allows interrupts inside, and raises a pending one.

        Raises:
            KeyboardInterrupt: interrupted now or earlier.
        """
        if self._pending:
            self._pending = False
            raise KeyboardInterrupt
        self._allowed = True
        try:
            yield
        finally:
            self._allowed = False
