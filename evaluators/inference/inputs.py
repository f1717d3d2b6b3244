"""Reads the inputs of a bundle: arrays and pictures, one file or a folder; copied into bundles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

ARRAYS, PICTURES = (".npy", ".npz"), (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff")
"""The suffixes of the files that are read from a folder."""


def read(path: Path) -> tuple[Floats, NDArray[np.int64] | None]:
    """Returns images and, if the file has them, labels."""
    try:
        content: Any = np.load(path)
    except (ValueError, EOFError) as error:
        raise ValueError(f"images come as .npz or .npy, got {str(path)!r}, which is neither") from error
    if path.suffix == ".npy":
        return np.asarray(content, dtype=np.float32), None
    labels = content["labels"] if "labels" in content.files else None
    return np.asarray(content["images"], dtype=np.float32), labels


def read_all(
    path: Path, image_shape: tuple[int, ...], preprocessing: Mapping[str, Any] | None
) -> Iterator[tuple[str, Floats, NDArray[np.int64] | None]]:
    """Yields the name, images `(n, c, h, w)` and labels, if any, of a file, or of each file below a folder, sorted.

    Args:
        path: a file or a folder.
        image_shape: the shape of each image, `(c, h, w)`.
        preprocessing: how a picture becomes an image, see `picture`; None if pictures are not accepted.

    Raises:
        ValueError: a file has other content.
    """
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in (*ARRAYS, *PICTURES))
        if not files:
            raise ValueError(
                f"a folder of inputs has {', '.join((*ARRAYS, *PICTURES))} files, got none in {str(path)!r}"
            )
    for file in files:
        if file.suffix.lower() in PICTURES:
            images, labels = picture(file, preprocessing), None
        else:
            images, labels = read(file)
        images = images[None] if images.shape == image_shape else images
        if images.shape[1:] != image_shape or not len(images):
            shapes = f"(n, {', '.join(map(str, image_shape))}) with n above 0"
            raise ValueError(f"images are {shapes}, got {images.shape} in {str(file)!r}")
        yield (str(file.relative_to(path)) if file != path else file.name), images, labels


def picture(file: Path, preprocessing: Mapping[str, Any] | None) -> Floats:
    """Returns a picture preprocessed as in training, `(1, c, h, w)`."""
    if preprocessing is None:
        raise ValueError(
            f"this bundle's data came preprocessed, got the picture {str(file)!r}; give .npy or .npz files"
        )
    try:
        from PIL import Image
    except ImportError as error:
        raise ValueError(f"a picture needs pillow, got {error}; pip install pillow, or give .npy files") from error
    mean, std = (np.array(preprocessing[name], np.float32) for name in ("mean", "std"))
    size, shorter = preprocessing["size"], preprocessing["resize"]
    with Image.open(file) as opened:
        image = upright(opened, "L" if len(mean) == 1 else "RGB")
    if min(image.size) != shorter:
        sides = (shorter * image.width // min(image.size), shorter * image.height // min(image.size))
        image = image.resize(sides, Image.Resampling[preprocessing["interpolation"]])
    left, top = (round((side - size) / 2.0) for side in image.size)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), np.float32).reshape(1, size, size, -1)
    normalised: Floats = (pixels * (np.float32(1 / 255) / std) - mean / std).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(normalised)


def upright(image: Any, mode: str) -> Any:
    """Returns a picture in `mode`, rotated by its EXIF data, with 16 bits reduced to 8 and transparency on white."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.float64).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)
