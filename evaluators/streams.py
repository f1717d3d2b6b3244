"""Streams: images that follow each other, and which of them a network need not look at."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from evaluators.data import LabelledImages
from evaluators.inference.frame_reuse import Reuse, is_key, thumbnail
from evaluators.runtimes.base import Follows, TimedBatch

KEY_FRAMES = "key frames"
"""The note of an accuracy that tells the share of the frames that were computed."""
_AT_ONCE = 64


@dataclass(frozen=True)
class Stream(LabelledImages):
    """Frames in their order, with the class of each; some of them begin a clip that has nothing to do with the last.

    Nobody tells a deployed network where a clip begins: `starts` serves the statistics alone.
    """

    starts: NDArray[np.int64]

    def __post_init__(self) -> None:
        super().__post_init__()
        inside = bool((self.starts < len(self.labels)).all())
        if not len(self.starts) or self.starts[0] != 0 or (np.diff(self.starts) <= 0).any() or not inside:
            raise ValueError(f"clips start at frame 0 and then later and later in the stream, got {self.starts}")

    def mixed(self, seed: int = 0) -> "Stream":  # noqa: ARG002  the images' signature
        """Returns the stream as it is: frames have one order."""
        return self

    def head(self, count: int) -> "Stream":
        """Returns the first `count` frames, as an array."""
        return Stream(self.images[:count], self.labels[:count], self.starts[self.starts < count])

    @property
    def clips(self) -> NDArray[np.int64]:
        """The clip of each frame, `(n,)`, counted from 0."""
        return np.searchsorted(self.starts, np.arange(len(self)), side="right") - 1

    @cached_property
    def thumbnails(self) -> NDArray[np.float32]:
        """What frames are compared by, `(n, rows, columns)`."""
        parts = (self.images[start : start + _AT_ONCE] for start in range(0, len(self), _AT_ONCE))
        return np.stack([thumbnail(frame) for part in parts for frame in part])

    def key_frames(self, reuse: Reuse | None) -> NDArray[np.int64]:
        """Returns the key frame whose answer each frame gets, `(n,)`; a key frame, or any without reuse, its own.

        No network is asked: the difference of two frames does not depend on what was said to them. So what any
        threshold costs in accuracy follows exactly from the answers to single frames.
        """
        if reuse is None:
            return np.arange(len(self))
        answering = np.zeros(len(self), dtype=np.int64)
        small, last = self.thumbnails, 0
        for index in range(1, len(self)):
            if is_key(small[index], small[last], index - last, reuse.threshold, reuse.max_age):
                last = index
            answering[index] = last
        return answering


def timed_frames(
    answering: NDArray[np.int64], kinds: Sequence[tuple[int, int]], reuse: Reuse, differ: bool
) -> tuple[list[TimedBatch], list[float]]:
    """Returns one frame of each kind, as it is met in the stream, and how many there are; the longest path comes last.

    Where all key frames take one, that is the path of every key frame, so it is not timed beside it.

    Args:
        answering: the key frame whose answer each frame gets, `(n,)`.
        kinds: for each way that key frames take, one that does, and how many do.
        reuse: decides on the frames.
        differ: whether key frames may leave early or pass blocks by.
    """
    reused = np.flatnonzero(answering != np.arange(len(answering)))
    frames = [(int(reused[0]), float(len(reused)), False)] if len(reused) else []
    frames += [(key, float(count), False) for key, count in kinds]
    frames += [(kinds[0][0], 0.0, True)] if differ else []
    batches = [TimedBatch(frame, 1, longest, _met(frame, answering, reuse)) for frame, _, longest in frames]
    return batches, [count for _, count, _ in frames]


def _met(frame: int, answering: NDArray[np.int64], reuse: Reuse) -> Follows:
    """Returns what a frame finds when it comes; the first one, which finds nothing, a key frame that is too old."""
    if frame == 0:
        return Follows(0, reuse.max_age, reuse.threshold, reuse.max_age)
    key = int(answering[frame - 1])
    return Follows(key, frame - key, reuse.threshold, reuse.max_age)
