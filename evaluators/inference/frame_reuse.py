"""Runs networks on streams, reusing predictions for similar frames; copied into bundles, so it needs numpy only."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from evaluators.inference.staged import Floats, Network, Routes

CELLS = 8
"""The number of cells of a thumbnail along each axis; as many as pixels if there are fewer."""


class KeyFrame(NamedTuple):
    """A frame that was computed: its thumbnail, and the network's logits and routes."""

    thumbnail: Floats
    logits: Floats
    routes: Routes


class FrameReuse:
    """A network for streams: a frame that differs little from the last key frame reuses its prediction.

    Args:
        network: maps a batch of one image to logits and routes.
        threshold: the `difference` from which a frame is a key frame; at 0 every frame is.
        max_age: the number of frames after a key frame at which the next key frame is due at the latest.
    """

    def __init__(self, network: Network, threshold: float, max_age: int) -> None:
        self.network = network
        self.threshold = threshold
        self.max_age = max_age
        self.last: KeyFrame | None = None
        self.age = 0

    def __call__(self, frames: Floats) -> tuple[Floats, Routes, NDArray[np.bool_]]:
        """Returns the logits `(n, classes)`, the routes `(n,)`, and which of the frames are key frames, `(n,)`.

        The last key frame is remembered between calls.
        """
        results = [self.frame(frames[index : index + 1]) for index in range(len(frames))]
        logits = np.concatenate([key.logits for key, _ in results])
        routes = np.concatenate([key.routes for key, _ in results])
        return logits, routes, np.array([is_new for _, is_new in results])

    def frame(self, frame: Floats) -> tuple[KeyFrame, bool]:
        """Returns the key frame whose prediction a frame `(1, c, h, w)` gets, and whether it is the frame itself."""
        self.age += 1
        small = thumbnail(frame[0])
        if self.last is None or is_key(small, self.last.thumbnail, self.age, self.threshold, self.max_age):
            self.last, self.age = KeyFrame(small, *self.network(frame)), 0
        return self.last, self.age == 0


def is_key(frame: Floats, last: Floats, age: int, threshold: float, max_age: int) -> bool:
    """Returns whether a frame is a key frame.

    Args:
        frame: the frame's thumbnail.
        last: the thumbnail of the last key frame.
        age: how many frames ago that was.
        threshold: the difference from which the frame is a key frame.
        max_age: the age from which it is a key frame whatever the difference.
    """
    return age >= max_age or threshold <= 0 or difference(frame, last) >= threshold


def thumbnail(frame: Floats) -> Floats:
    """Returns a frame `(c, h, w)` in greyscale, averaged over at most 8x8 cells."""
    channels, height, width = frame.shape
    rows, columns, pixels = _cells(height, width)
    grey = np.add.reduce(frame, axis=0)
    small: Floats = np.add.reduceat(np.add.reduceat(grey, rows, axis=0), columns, axis=1) / (pixels * channels)
    return small


@cache
def _cells(height: int, width: int) -> tuple[NDArray[np.int64], NDArray[np.int64], Floats]:
    """Returns the first row and the first column of each cell, and the number of pixels of each cell."""
    ends = [np.linspace(0, size, min(CELLS, size) + 1).astype(np.int64) for size in (height, width)]
    rows, columns = (np.diff(end) for end in ends)
    return ends[0][:-1], ends[1][:-1], np.outer(rows, columns).astype(np.float32)


def difference(first: Floats, second: Floats) -> float:
    """Returns the mean absolute difference of two thumbnails, in units of the network's input."""
    return float(np.abs(first - second).mean())


@dataclass(frozen=True)
class Reuse:
    """When a frame reuses the prediction of the last key frame.

    Args:
        threshold: the mean absolute difference of thumbnails, in units of the network's input, from which a frame is
            computed.
        max_age: the number of frames after a key frame at which the next key frame is due at the latest.
    """

    threshold: float
    max_age: int
