"""Labelled images, and how a study splits them."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

SMALL_BYTES = 64_000_000
"""Images that take no more may be had all at once; more are read a batch at a time."""


class ImageStore(Protocol):
    """Images `(n, c, h, w)` that are had as float32 when they are asked for; a NumPy array is one.

    A store that is not an array has a `digest`: hexadecimal digits over the images and what is done to them.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Images, channels, height and width."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """What is handed out: float32."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> NDArray[np.float32]:
        """Returns the images of a slice or of an array of indices, `(m, c, h, w)`."""
        ...


def bytes_of(images: ImageStore) -> int:
    """Returns how many bytes all of the images take as float32."""
    return int(np.prod(images.shape, dtype=np.int64)) * images.dtype.itemsize


class Chosen:
    """Some images of a store.

    Args:
        images: all of them.
        indices: which, `(n,)`.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, images: ImageStore, indices: NDArray[np.int64]) -> None:
        self._images, self._indices = images, indices
        self.shape = (len(indices), *images.shape[1:])

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any, /) -> NDArray[np.float32]:
        """Returns the images of a slice or of an array of indices, `(m, c, h, w)`."""
        return self._images[self._indices[index]]

    @property
    def digest(self) -> str:
        """Hexadecimal digits over the images and which of them these are."""
        whole = LabelledImages(self._images, np.zeros(len(self._images), np.int64)).digest
        return hashlib.sha256(whole.encode() + self._indices.tobytes()).hexdigest()


@dataclass(frozen=True)
class LabelledImages:
    """Images `(n, c, h, w)`, float32, preprocessed as the network wants them, and class labels `(n,)`.

    The images are an array, or a store that reads them when they are asked for.
    """

    images: ImageStore
    labels: NDArray[np.int64]

    def __post_init__(self) -> None:
        if len(self.images.shape) != 4 or self.images.dtype != np.float32:
            raise ValueError(f"images are float32 (n, c, h, w), got {self.images.dtype} {self.images.shape}")
        if self.labels.shape != (len(self.images),):
            raise ValueError(f"there is one label per image, got {self.labels.shape} for {len(self.images)} images")

    def __len__(self) -> int:
        return len(self.labels)

    def some(self, indices: NDArray[np.int64]) -> "LabelledImages":
        """Returns the images at these places, read when they are asked for."""
        known = isinstance(self.images, np.ndarray)
        images = self.images[indices] if known else Chosen(self.images, indices)
        return LabelledImages(images, self.labels[indices])

    def halves(self) -> "tuple[LabelledImages, LabelledImages]":
        """Returns two halves that share no image, each class evenly in both; always the same ones."""
        by_class = np.argsort(self.labels, kind="stable")
        return self.some(np.sort(by_class[0::2])), self.some(np.sort(by_class[1::2]))

    def mixed(self, seed: int = 0) -> "LabelledImages":
        """Returns the same images in an order of which every beginning has each class by its share; always the same."""
        order = np.random.default_rng(seed).permutation(len(self))
        rank = np.empty(len(self))
        for label in np.unique(self.labels):
            members = order[self.labels[order] == label]
            rank[members] = np.arange(len(members)) / len(members)
        # A stable sort of a permutation: images of equal rank come in random order.
        return self.some(order[np.argsort(rank[order], kind="stable")])

    def head(self, count: int) -> "LabelledImages":
        """Returns the first `count` images, as an array."""
        return LabelledImages(self.images[:count], self.labels[:count])

    @cached_property
    def digest(self) -> str:
        """SHA-256 of images and labels: what a cached result of theirs is filed under.

        A store brings a digest of its own, so that nobody has to read all of its images.
        """
        digest: str | None = getattr(self.images, "digest", None)
        if digest is None:
            content = hashlib.sha256(np.ascontiguousarray(self.images[:]).tobytes())
        else:
            content = hashlib.sha256(digest.encode())
        content.update(np.ascontiguousarray(self.labels).tobytes())
        return content.hexdigest()


@dataclass(frozen=True)
class Splits:
    """Four sets that share no image.

    Args:
        train: what weights and batch statistics are learned from.
        calibration: what activation ranges are read from.
        validation: what the search sees.
        test: what `pick` uses, once.
        classes: how many classes there are.
    """

    train: LabelledImages
    calibration: LabelledImages
    validation: LabelledImages
    test: LabelledImages
    classes: int

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        _, channels, height, width = self.train.images.shape
        return channels, height, width
