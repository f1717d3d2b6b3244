"""Image folders: one folder per class, optionally below train/, val/ and test/."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from search.config.references import SourceError
from search.loading.image_store import FileReader, ImageReader

EXTENSIONS = frozenset((".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"))
PARTS: Mapping[str, str] = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}
"""The part of the data that a folder of this name contains."""

_ORDER = ("train", "validation", "test")
"""Of two copies the one in the earlier part stays, because the network may have been trained on it."""


@dataclass(frozen=True)
class Pool:
    """Images of one part of a data source, before they are split."""

    reader: ImageReader
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class DataSource:
    """The images of a data source.

    Args:
        pools: by `train`, `validation` and `test`; at least one.
        classes: their names, in the order of the labels.
        size: height and width of every image, if fixed by the data set.
        mean: of each channel, usual for the data set.
        std: of each channel, usual for the data set.
        remarks: for the user.
        names: of the classes for people, where they are others.
    """

    pools: Mapping[str, Pool]
    classes: tuple[str, ...]
    size: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    remarks: tuple[str, ...] = ()
    names: tuple[str, ...] = ()

    def in_order(self, names: Sequence[str]) -> "DataSource":
        """Returns the same images, their classes numbered by their places among `names`.

        Raises:
            SourceError: a class is not among them, or a name stands there twice.
        """
        unknown = [name for name in self.classes if name not in names]
        twice = [name for name, count in Counter(names).items() if count > 1]
        if unknown or twice:
            wrong = f"none of {_listed(unknown)}" if unknown else f"{_listed(twice)} twice"
            raise SourceError(
                f"labels have the name of each class once, got {len(names)} names with {wrong}; write them as the data"
                f" has them: {_listed(self.classes)}"
            )
        number = np.array([names.index(name) for name in self.classes])
        pools = {part: Pool(pool.reader, number[pool.labels]) for part, pool in self.pools.items()}
        return replace(self, pools=pools, classes=tuple(names))


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def image_folder(place: str, download: bool) -> DataSource:  # noqa: ARG001  the data sources' signature
    """Returns the images of a folder of class folders, or of train/, val/ and test/ with class folders each.

    Classes are numbered in the order of their names, as torchvision's ImageFolder does, whether they have images or
    not, because labels have to match the weights. Hidden files, other files and broken links are ignored.

    Raises:
        SourceError: there is no such folder, or no image in it.
    """
    root = Path(place)
    if not root.is_dir():
        raise SourceError(f"an image folder is an existing folder, got {place!r}; check its path")
    parts = {PARTS[folder.name.lower()]: folder for folder in _folders(root) if folder.name.lower() in PARTS}
    parts = parts or {"train": root}
    classes = tuple(sorted({folder.name for part in parts.values() for folder in _folders(part)}))
    files_of = {part: [_images(parts[part] / name) for name in classes] for part in _ORDER if part in parts}
    images = {part: files for part, files in files_of.items() if any(files)}
    if not images or len(classes) < 2:
        raise SourceError(
            f"an image folder has a folder of images for each of two classes or more, got {place!r} with"
            f" {len(classes)} folders and {sum(len(files) for folders in images.values() for files in folders)} images;"
            " it may have them in train/, val/ and test/"
        )
    pools = {part: _pool(root, files) for part, files in images.items()}
    return DataSource(pools, classes, None, IMAGENET_MEAN, IMAGENET_STD, tuple(_remarks(images, classes)))


def _folders(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not _is_ignored(entry.name))


def _images(folder: Path) -> list[Path]:
    images = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not _is_ignored(name))
        images += [
            Path(parent, name)
            for name in sorted(names)
            if not name.startswith(".") and Path(name).suffix.lower() in EXTENSIONS
        ]
    return [file for file in images if file.is_file()]


def _pool(root: Path, images: Sequence[Sequence[Path]]) -> Pool:
    labels = np.repeat(np.arange(len(images)), [len(files) for files in images])
    return Pool(FileReader(root, [file for files in images for file in files]), labels.astype(np.int64))


def _remarks(images: Mapping[str, Sequence[Sequence[Path]]], classes: Sequence[str]) -> list[str]:
    remarks = []
    empty = [name for index, name in enumerate(classes) if not any(files[index] for files in images.values())]
    if empty:
        remarks.append(
            f"No images of {_listed(empty)}. An empty folder keeps its number among the {len(classes)} classes, so that"
            " the others' fit the weights; remove it if the network does not know it"
        )
    return remarks


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more classes"


def _is_ignored(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"
