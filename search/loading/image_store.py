"""Images of files and arrays, decoded and preprocessed on access."""

import hashlib
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

KEPT_BYTES = 512 * 1024 * 1024
"""Decoded pixels of a split stay in memory up to this size."""
_SERIAL = 8
"""Number of images up to which they are decoded in the calling thread."""

Pixels = NDArray[np.uint8]
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of an image: resize of the shorter side, center crop, normalization.

    Args:
        size: height and width of the input.
        resize: length of the shorter side before the crop.
        mean: of each channel, for values from 0 to 1: one for grey input, three for RGB.
        std: of each channel.
        interpolation: Pillow's name of the filter.
        origin: of these values, for the record.
    """

    size: int
    resize: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "BILINEAR"
    origin: str = ""

    @property
    def channels(self) -> int:
        """One for grey input, three for RGB."""
        return len(self.mean)

    def __str__(self) -> str:
        cut = f", the middle of {self.resize}x{self.resize}" if self.resize != self.size else ""
        mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        colours = "grey" if self.channels == 1 else "RGB"
        return f"{self.size}x{self.size} {colours}{cut}, mean {mean}, std {std} ({self.origin})"

    def pixels(self, image: Image.Image) -> Pixels:
        """Returns an image's pixels, `(size, size, channels)`, cropped as by torchvision's presets."""
        image = upright(image, "L" if self.channels == 1 else "RGB")
        width, height = image.size
        shorter = min(width, height)
        if shorter != self.resize:
            sides = (self.resize * width // shorter, self.resize * height // shorter)
            image = image.resize(sides, Image.Resampling[self.interpolation])
        left, top = (round((side - self.size) / 2.0) for side in image.size)
        if image.size != (self.size, self.size):
            image = image.crop((left, top, left + self.size, top + self.size))
        return np.asarray(image).reshape(self.size, self.size, self.channels)

    def normalised(self, pixels: Pixels) -> NDArray[np.float32]:
        """Returns `(n, channels, size, size)` for pixels `(n, size, size, channels)`."""
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        scaled = pixels.astype(np.float32)
        scaled *= np.float32(1 / 255) / std
        scaled -= mean / std
        return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


def upright(image: Image.Image, mode: str) -> Image.Image:
    """Returns an image in `mode`, rotated by its EXIF data, with transparency on white, and 16 bits reduced to 8."""
    image = ImageOps.exif_transpose(image)
    if is_deep(image):
        values = np.asarray(image).astype(np.float64)
        image = Image.fromarray((values.clip(0, 65535) / 257).round().astype(np.uint8))
    if is_transparent(image):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)


def is_deep(image: Image.Image) -> bool:
    """Returns whether an image has grey values of 16 bits."""
    return image.mode.startswith("I")


def is_transparent(image: Image.Image) -> bool:
    """Returns whether an image has an alpha channel or a transparent colour."""
    return image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info


class ImageReader(Protocol):
    """Reads the images of a data set one by one, before preprocessing."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Image.Image:
        """Returns one image, not preprocessed."""
        ...

    def name(self, index: int) -> str | int:
        """Returns the name of an image in the record."""
        ...


class FileReader:
    """Image files.

    Args:
        root: names in the record are relative to it.
        files: one per image.
    """

    def __init__(self, root: Path, files: Sequence[Path]) -> None:
        self._root = root
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> Image.Image:
        """Returns one image, not preprocessed."""
        return open_image(self.files[index])

    def name(self, index: int) -> str:
        """Returns the file's path below the root."""
        return str(self.files[index].relative_to(self._root))


class ArrayReader:
    """Pixels in memory, `(n, h, w)` or `(n, h, w, 3)`."""

    def __init__(self, pixels: Pixels) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, index: int) -> Image.Image:
        """Returns one image."""
        return Image.fromarray(self.pixels[index])

    def name(self, index: int) -> int:
        """Returns the image's index in the data set."""
        return index


def open_image(file: Path) -> Image.Image:
    """Returns a decoded image.

    Raises:
        OSError: it cannot be read, or is truncated.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on unused metadata and on size
        with Image.open(file) as image:
            image.load()
            return image


class StoredImages:
    """Images of a split, decoded on first access: an `evaluators.data.ImageStore`.

    If all pixels fit in `KEPT_BYTES` they stay decoded, else they are decoded on each access. Many are decoded in
    several threads, because Pillow releases the GIL.

    Args:
        reader: source of the images.
        indices: of the reader's images, in order.
        digests: of the content of each image.
        preprocessing: of the images.
    """

    def __init__(
        self, reader: ImageReader, indices: NDArray[np.int64], digests: Sequence[str], preprocessing: Preprocessing
    ) -> None:
        self._reader = reader
        self._indices = indices
        self._digests = digests
        self._preprocessing = preprocessing
        side, channels = preprocessing.size, preprocessing.channels
        self.shape: tuple[int, ...] = (len(indices), channels, side, side)
        self.dtype: np.dtype[Any] = np.dtype(np.float32)
        is_kept = len(indices) * channels * side * side <= KEPT_BYTES
        self._kept: Pixels | None = np.empty((len(indices), side, side, channels), np.uint8) if is_kept else None
        self._decoded = np.zeros(len(indices), bool)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: slice | NDArray[np.int64]) -> NDArray[np.float32]:
        """Returns some of the images, `(m, c, h, w)`, normalised."""
        chosen = np.arange(len(self))[index]
        if self._kept is None:
            return self._preprocessing.normalised(self._decode(chosen))
        with self._lock:
            missing = np.unique(chosen[~self._decoded[chosen]])
            for part in _parts(missing, 1024):
                self._kept[part] = self._decode(part)
                self._decoded[part] = True
        return self._preprocessing.normalised(self._kept[chosen])

    def _decode(self, chosen: NDArray[np.int64]) -> Pixels:
        side, channels = self._preprocessing.size, self._preprocessing.channels
        pixels = np.empty((len(chosen), side, side, channels), np.uint8)

        def decode(position: int) -> None:
            image = self._reader.read(int(self._indices[chosen[position]]))
            pixels[position] = self._preprocessing.pixels(image)

        for _ in in_threads(decode, range(len(chosen))):
            pass
        return pixels

    @property
    def names(self) -> list[str | int]:
        """The names of the images in the record."""
        return [self._reader.name(int(index)) for index in self._indices]

    @property
    def digest(self) -> str:
        """SHA-256 of the images' contents and the preprocessing, independent of file names."""
        content = hashlib.sha256("\n".join(self._digests).encode())
        preprocessing = asdict(self._preprocessing)
        del preprocessing["origin"]
        content.update(repr(sorted(preprocessing.items())).encode())
        return content.hexdigest()


def in_threads(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """Yields `function` of each item, in order; in several threads if there are many.

    Items are submitted in parts to bound memory.
    """
    if len(items) <= _SERIAL:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for part in _parts(items, 256):
            yield from pool.map(function, part)


def _parts(items: Any, size: int) -> Iterable[Any]:
    return (items[start : start + size] for start in range(0, len(items), size))
