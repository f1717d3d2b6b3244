"""Labelled images, and how a study splits them."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

SMALL_BYTES = 64_000_000
"""Images up to this size in bytes may be in memory all at once; larger sets are read in batches."""


class ImageStore(Protocol):
    """Images `(n, c, h, w)`, float32, that may be read from disk on access; a NumPy array is one, too.

    A store that is not an array has a `digest`: a hexadecimal hash of the images and their preprocessing.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of images, channels, height and width."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of the images: float32."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> NDArray[np.float32]:
        """Returns the images of a slice or of an array of indices, `(m, c, h, w)`."""
        ...


def bytes_of(images: ImageStore) -> int:
    """Returns the size of all images in bytes, as float32."""
    return int(np.prod(images.shape, dtype=np.int64)) * images.dtype.itemsize


class Chosen:
    """A subset of a store's images.

    Args:
        images: the store.
        indices: of the subset, `(n,)`.
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
        """A hexadecimal hash of the store and the indices."""
        whole = LabelledImages(self._images, np.zeros(len(self._images), np.int64)).digest
        return hashlib.sha256(whole.encode() + self._indices.tobytes()).hexdigest()


@dataclass(frozen=True)
class LabelledImages:
    """Images `(n, c, h, w)`, float32, preprocessed for the network, and class labels `(n,)`.

    The images are an array, or a store that reads them on access.

    Raises:
        ValueError: a shape or a type is another.
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
        """Returns the images with these indices; those of a store are still read on access."""
        in_memory = isinstance(self.images, np.ndarray)
        images = self.images[indices] if in_memory else Chosen(self.images, indices)
        return LabelledImages(images, self.labels[indices])

    def parted(self, count: int) -> "tuple[LabelledImages, LabelledImages]":
        """Returns two disjoint parts, the first of `count` images, each class in proportion in both; always the same.

        Raises:
            ValueError: there are not so many images.
        """
        if not 0 <= count <= len(self):
            raise ValueError(f"a part has 0 to {len(self)} images, got {count}")
        by_class = np.argsort(self.labels, kind="stable")
        is_first = np.zeros(len(self), dtype=np.bool_)
        is_first[by_class[[-(-index * len(self) // count) for index in range(count)]]] = True
        return self.some(np.flatnonzero(is_first)), self.some(np.flatnonzero(~is_first))

    def mixed(self, seed: int = 0) -> "LabelledImages":
        """Returns the images in an order in which the first `n` have all classes in proportion, for every `n`.

        Args:
            seed: of the order within each class.
        """
        order = np.random.default_rng(seed).permutation(len(self))
        rank = np.empty(len(self))
        for label in np.unique(self.labels):
            members = order[self.labels[order] == label]
            rank[members] = np.arange(len(members)) / len(members)
        # A stable sort keeps the random order among images of equal rank.
        return self.some(order[np.argsort(rank[order], kind="stable")])

    def head(self, count: int) -> "LabelledImages":
        """Returns the first `count` images, as an array."""
        return LabelledImages(self.images[:count], self.labels[:count])

    @cached_property
    def digest(self) -> str:
        """SHA-256 of images and labels, the key of cached results.

        A store has a digest of its own, so that not all of its images have to be read.
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
    """Four disjoint sets of images.

    Args:
        train: for training weights and batch statistics.
        calibration: for activation ranges.
        validation: for the accuracies of the search.
        test: used by `pick` only, once.
        classes: the number of classes.
        names: of the classes, in the order of the labels; empty where they have none.

    Raises:
        ValueError: some classes have names and others none.
    """

    train: LabelledImages
    calibration: LabelledImages
    validation: LabelledImages
    test: LabelledImages
    classes: int
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.names and len(self.names) != self.classes:
            raise ValueError(f"there is one name per class, got {len(self.names)} for {self.classes} classes")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        _, channels, height, width = self.train.images.shape
        return channels, height, width
