"""Files that are made once and used again: what they are called, and how they are written."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

Writer = Callable[[Path], object]
"""Writes a file."""


def key(*parts: str) -> str:
    """Returns sixteen hexadecimal digits over all that a cached result depends on; they name its file.

    Args:
        parts: in an order that never changes. What is kept of a class here is its JSON, never its `repr`: a class that
            gets another name would make everything anew.
    """
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def write_atomically(file: Path, content: bytes | str | Writer) -> None:
    """Writes a file, and the folders above it, so that it is whole or not there at all, whoever reads it meanwhile.

    Args:
        file: that is written, or replaced.
        content: what is in it, text as UTF-8; or what writes a file that does not exist yet.

    Raises:
        OSError: it cannot be written; what was there before stays.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        if callable(content):
            content(partial)
        else:
            partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)  # left where writing failed
