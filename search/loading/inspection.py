"""Inspects image files for faults, sizes and copies, once, with a cached index."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from search.config.cache import cache_folder
from search.config.progress import Progress
from search.loading.image_store import in_threads, is_deep, is_transparent, open_image
from spaces import cache

_ORIENTATION = 0x0112
_STEP = "Looking at the images"
_EVERY = 500


@dataclass(frozen=True)
class Inspected:
    """The result of inspecting one file.

    Args:
        digest: SHA-256 of its content.
        fault: why it cannot be decoded; empty if it can.
        width: in pixels, before rotation by EXIF data.
        height: in pixels.
        traits: properties that need a conversion: `grey`, `transparent`, `CMYK`, `16-bit`, `turned`.
    """

    digest: str
    fault: str = ""
    width: int = 0
    height: int = 0
    traits: tuple[str, ...] = ()


def inspect_files(files: Sequence[Path], progress: Progress) -> list[Inspected]:
    """Returns the inspection of each file, done now or cached.

    A file is inspected again if its size or modification time changed. Files are decoded completely, because a
    truncated JPEG has a valid header.
    """
    index = _Index(files)
    fresh = [file for file in files if index.find(file) is None]
    for done, (file, inspected) in enumerate(zip(fresh, in_threads(_inspect, fresh), strict=True)):
        if done % _EVERY == 0:
            progress(_STEP, done, len(fresh))
        index.add(file, inspected)
    if fresh:
        progress(_STEP, len(fresh), len(fresh))
        index.keep()
    return [index.find(file) or _inspect(file) for file in files]


class _Index:
    """Cached inspections, by path, size and modification time."""

    def __init__(self, files: Sequence[Path]) -> None:
        top = os.path.commonpath([str(file.parent) for file in files]) if files else ""
        self._file = cache_folder() / "images" / f"{cache.key(top)}.json"
        try:
            stored = json.loads(self._file.read_text(encoding="utf-8"))
            self._known = {
                key: Inspected(**content | {"traits": tuple(content["traits"])}) for key, content in stored.items()
            }
        except (OSError, ValueError, TypeError, KeyError):  # missing or damaged: all files are inspected
            self._known = {}

    def find(self, file: Path) -> Inspected | None:
        return self._known.get(_key(file))

    def add(self, file: Path, inspected: Inspected) -> None:
        self._known[_key(file)] = inspected

    def keep(self) -> None:
        content = {key: asdict(inspected) for key, inspected in self._known.items()}
        cache.write_atomically(self._file, json.dumps(content))


def _key(file: Path) -> str:
    try:
        status = file.stat()
    except OSError:
        return str(file)
    return f"{file}|{status.st_size}|{status.st_mtime_ns}"


def _inspect(file: Path) -> Inspected:
    try:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        return Inspected("", f"{error.strerror}")
    try:
        image = open_image(file)
        if image.mode == "F":
            return Inspected(digest, "floating-point pixels")
        return Inspected(digest, "", image.width, image.height, _traits(image))
    except Exception as error:  # Pillow's decoders raise OSError, ValueError, SyntaxError and more
        return Inspected(digest, _reason(error, file))


def _reason(error: Exception, file: Path) -> str:
    text = str(error).replace(repr(str(file)), "it").splitlines()
    return text[0] if text else type(error).__name__


def _traits(image: Image.Image) -> tuple[str, ...]:
    traits = []
    if is_deep(image):
        traits.append("16-bit")
    if image.mode in ("1", "L", "LA"):
        traits.append("grey")
    if is_transparent(image):
        traits.append("transparent")
    if image.mode == "CMYK":
        traits.append("CMYK")
    if image.getexif().get(_ORIENTATION, 1) != 1:
        traits.append("turned")
    return tuple(traits)
