"""Streams of frames: which frames are computed, and which reuse the prediction of an earlier key frame."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from evaluators.data import LabelledImages
from evaluators.inference.frame_reuse import Reuse, is_key, thumbnail
from evaluators.runtimes.base import PrecedingKeyFrame, TimedBatch

KEY_FRAMES = "key frames"
"""The name under which an accuracy's notes hold the share of frames that were computed."""
_BATCH = 64


@dataclass(frozen=True)
class Stream(LabelledImages):
    """Frames in order, with the class of each, made up of clips that are unrelated to each other.

    `starts` holds the index of each clip's first frame. A deployed network does not know where clips begin; `starts` is
    used by the statistics only.
    """

    starts: NDArray[np.int64]

    def __post_init__(self) -> None:
        super().__post_init__()
        inside = bool((self.starts < len(self.labels)).all())
        if not len(self.starts) or self.starts[0] != 0 or (np.diff(self.starts) <= 0).any() or not inside:
            raise ValueError(f"clips start at frame 0 and then later and later in the stream, got {self.starts}")

    def mixed(self, seed: int = 0) -> "Stream":  # noqa: ARG002  the images' signature
        """Returns the stream unchanged: the order of frames matters."""
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
        """The thumbnails by which frames are compared, `(n, rows, columns)`."""
        parts = (self.images[start : start + _BATCH] for start in range(0, len(self), _BATCH))
        return np.stack([thumbnail(frame) for part in parts for frame in part])

    def key_frames(self, reuse: Reuse | None) -> NDArray[np.int64]:
        """Returns the index of the key frame whose prediction each frame reuses, `(n,)`; a key frame's own index.

        Without reuse every frame is a key frame. Frames are compared by their thumbnails, not by predictions, so the
        accuracy at any threshold follows exactly from the predictions for single frames, without running the network.
        """
        if reuse is None:
            return np.arange(len(self))
        key_frames = np.zeros(len(self), dtype=np.int64)
        small, last = self.thumbnails, 0
        for index in range(1, len(self)):
            if is_key(small[index], small[last], index - last, reuse.threshold, reuse.max_age):
                last = index
            key_frames[index] = last
        return key_frames


def timed_frames(
    key_frames: NDArray[np.int64], profiles: Sequence[tuple[int, int]], reuse: Reuse, is_dynamic: bool
) -> tuple[list[TimedBatch], list[float]]:
    """Returns one frame to time for each path, in its place in the stream, and the number of frames on that path.

    A frame that reuses a prediction comes first, if there is one. Of a dynamic network the longest path comes last;
    otherwise every key frame takes it anyway.

    Args:
        key_frames: the key frame whose prediction each frame reuses, `(n,)`.
        profiles: for each path that key frames take, one key frame on it and the number of key frames on it.
        reuse: decides which frames are computed.
        is_dynamic: whether key frames may leave early or skip blocks.
    """
    reused = np.flatnonzero(key_frames != np.arange(len(key_frames)))
    frames = [(int(reused[0]), float(len(reused)), False)] if len(reused) else []
    frames += [(key, float(count), False) for key, count in profiles]
    frames += [(profiles[0][0], 0.0, True)] if is_dynamic else []
    batches = [TimedBatch(frame, 1, longest, _position(frame, key_frames, reuse)) for frame, _, longest in frames]
    return batches, [count for _, count, _ in frames]


def _position(frame: int, key_frames: NDArray[np.int64], reuse: Reuse) -> PrecedingKeyFrame:
    """Returns the key frame before a frame and its age; for the first frame, one that is too old to be reused."""
    if frame == 0:
        return PrecedingKeyFrame(0, reuse.max_age, reuse.threshold, reuse.max_age)
    key = int(key_frames[frame - 1])
    return PrecedingKeyFrame(key, frame - key, reuse.threshold, reuse.max_age)
