"""The folder for what is made once and used again: trained networks, latencies, what is known of image files."""

import os
import tempfile
from pathlib import Path

import platformdirs

from spaces.errors import FolderError


def cache_folder() -> Path:
    """Returns the folder: `$DEPLOYFRONT_CACHE`, or the user's cache directory."""
    return Path(os.environ.get("DEPLOYFRONT_CACHE") or platformdirs.user_cache_path("deployfront"))


def check_cache() -> None:
    """Checks that the folder can be written, before hours are spent on what goes there.

    Raises:
        FolderError: it cannot.
    """
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
    except OSError as error:
        raise FolderError(
            f"trained networks are kept in a writable folder, got {folder}: {error.strerror};"
            " name another one with the environment variable DEPLOYFRONT_CACHE"
        ) from None
