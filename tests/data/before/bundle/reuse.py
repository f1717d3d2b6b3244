"""Runs networks on streams, where a frame need not be computed; a bundle brings this file, which needs numpy only."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from evaluators.runtimes.staged import Floats, Network, Routes

CELLS = 8
"""A thumbnail has so many cells each way, or one a pixel where there are fewer."""


class KeyFrame(NamedTuple):
    """A frame that was computed: its thumbnail, and what the network said."""

    thumbnail: Floats
    logits: Floats
    routes: Routes


class FrameReuse:
    """A network for streams: a frame that hardly differs from the last key frame is answered as that was.

    Args:
        network: maps a batch of one to logits and routes.
        threshold: the `difference` from which a frame is a key frame; at 0 all are.
        max_age: so many frames after a key frame the next one is, whatever it looks like.
    """

    def __init__(self, network: Network, threshold: float, max_age: int) -> None:
        self.network = network
        self.threshold = threshold
        self.max_age = max_age
        self.last: KeyFrame | None = None
        self.age = 0

    def __call__(self, frames: Floats) -> tuple[Floats, Routes, NDArray[np.bool_]]:
        """Returns the logits `(n, classes)`, the routes `(n,)`, and which are key frames `(n,)`, one after another.

        The last key frame is remembered from call to call.
        """
        found = [self.frame(frames[index : index + 1]) for index in range(len(frames))]
        logits = np.concatenate([key.logits for key, _ in found])
        routes = np.concatenate([key.routes for key, _ in found])
        return logits, routes, np.array([is_new for _, is_new in found])

    def frame(self, frame: Floats) -> tuple[KeyFrame, bool]:
        """Returns the key frame that answers a frame `(1, c, h, w)`, and whether it is that frame itself."""
        self.age += 1
        small = thumbnail(frame[0])
        if self.last is None or is_key(small, self.last.thumbnail, self.age, self.threshold, self.max_age):
            self.last, self.age = KeyFrame(small, *self.network(frame)), 0
        return self.last, self.age == 0


def is_key(frame: Floats, last: Floats, age: int, threshold: float, max_age: int) -> bool:
    """Returns whether a frame is a key frame.

    Args:
        frame: its thumbnail.
        last: that of the last key frame.
        age: how many frames ago that was.
        threshold: the difference from which it is.
        max_age: the age at which it is anyway.
    """
    return age >= max_age or threshold <= 0 or difference(frame, last) >= threshold


def thumbnail(frame: Floats) -> Floats:
    """Returns a frame `(c, h, w)` in grey, as the means of at most 8x8 cells."""
    channels, height, width = frame.shape
    rows, columns, pixels = _cells(height, width)
    grey = np.add.reduce(frame, axis=0)
    small: Floats = np.add.reduceat(np.add.reduceat(grey, rows, axis=0), columns, axis=1) / (pixels * channels)
    return small


@cache
def _cells(height: int, width: int) -> tuple[NDArray[np.int64], NDArray[np.int64], Floats]:
    """Returns where the cells' rows and columns begin, and how many pixels each cell has."""
    ends = [np.linspace(0, size, min(CELLS, size) + 1).astype(np.int64) for size in (height, width)]
    rows, columns = (np.diff(end) for end in ends)
    return ends[0][:-1], ends[1][:-1], np.outer(rows, columns).astype(np.float32)


def difference(first: Floats, second: Floats) -> float:
    """Returns the mean absolute difference of two thumbnails, in units of the network's input."""
    return float(np.abs(first - second).mean())
