"""The folder of a bundle. Nothing heavy is imported here, so that a wrong one is told at once."""

from pathlib import Path

from evaluators.bundle.manifest import FILE
from spaces.errors import UserError


class BundleError(UserError):
    """A bundle cannot be written to the requested folder, or read from it."""


def check_out(folder: Path) -> None:
    """Checks that `folder` is new, empty, or an earlier bundle.

    Raises:
        BundleError: it contains something else.
    """
    if folder.exists() and not folder.is_dir():
        raise BundleError(f"a bundle is a folder, got the file {folder}; give another --out")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / FILE).is_file():
        raise BundleError(f"a bundle goes into a new, an empty or an earlier bundle's folder, got {folder}")


def check_bundle(folder: Path) -> None:
    """Checks that `folder` is a bundle.

    Raises:
        BundleError: it is none.
    """
    if not (folder / FILE).is_file():
        raise BundleError(f"a bundle is a folder that `pick` wrote, got {folder}, which has no {FILE}")
