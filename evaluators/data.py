"""Labelled images, and how a study splits them."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class LabelledImages:
    """Images `(n, c, h, w)`, float32, preprocessed as the network wants them, and class labels `(n,)`."""

    images: NDArray[np.float32]
    labels: NDArray[np.int64]

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != np.float32:
            raise ValueError(f"images are float32 (n, c, h, w), got {self.images.dtype} {self.images.shape}")
        if self.labels.shape != (len(self.images),):
            raise ValueError(f"there is one label per image, got {self.labels.shape} for {len(self.images)} images")

    def __len__(self) -> int:
        return len(self.labels)

    def head(self, count: int) -> "LabelledImages":
        """Returns the first `count` images."""
        return LabelledImages(self.images[:count], self.labels[:count])

    @cached_property
    def digest(self) -> str:
        """SHA-256 of images and labels: what a cached result of theirs is filed under."""
        content = hashlib.sha256(np.ascontiguousarray(self.images).tobytes())
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
