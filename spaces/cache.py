"""Names of cache files, and atomic writes."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

Writer = Callable[[Path], object]
"""Writes a file."""


def key(*parts: str) -> str:
    """Returns sixteen hexadecimal digits of a hash over everything that a cached result depends on; its file name.

    Args:
        parts: in a fixed order. Objects take part as JSON, never as `repr`, so that renaming a class does not
            invalidate the cache.
    """
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def write_atomically(file: Path, content: bytes | str | Writer) -> None:
    """Writes a file atomically and creates its folders: readers see the old content or the new, never a part.

    Args:
        file: the file to write or replace.
        content: the bytes, the text in UTF-8, or a function that writes to a path.

    Raises:
        OSError: it cannot be written; the old file stays.
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
