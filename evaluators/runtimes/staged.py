"""Runs networks whose inputs may leave early, and streams, on any runtime; a bundle has this file; needs numpy only."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Network = Callable[[Floats], tuple[Floats, NDArray[np.int64]]]

_FEW_CLASSES = 64
"""Of so many logits Python's own floats tell the confidence sooner than arrays do."""

CELLS = 8
"""A thumbnail has so many cells each way, or one a pixel where there are fewer."""


class StagedNetwork:
    """A network whose early exits let easy inputs leave.

    Args:
        stages: each maps a batch to `[features, logits]`, the last one to `[logits]`.
        thresholds: the confidence from which each exit answers.
        confidence: what tells it, a name in `CONFIDENCES`.
    """

    def __init__(
        self,
        stages: Sequence[Callable[[Floats], Sequence[Floats]]],
        thresholds: Sequence[float],
        confidence: str = "softmax",
    ) -> None:
        if len(stages) != len(thresholds) + 1:
            raise ValueError(f"there is one threshold per exit, got {len(thresholds)} for {len(stages)} stages")
        self.stages = tuple(stages)
        self.thresholds = tuple(thresholds)
        self._confidence = CONFIDENCES[confidence]
        self._confidence_of_one = CONFIDENCES_OF_ONE[confidence]

    def __call__(self, images: Floats) -> tuple[Floats, NDArray[np.int64]]:
        """Returns the logits `(n, classes)` and the exit `(n,)` that gave them, 0 being the first.

        Inputs that stay go on together, in a smaller batch.
        """
        if len(self.stages) == 1:
            logits = self.stages[0](images)[0]
            return logits, np.zeros(len(images), dtype=np.int64)
        if len(images) == 1:
            return self._answer_one(images)
        answers: Floats | None = None
        exits = np.full(len(images), len(self.thresholds), dtype=np.int64)
        waiting = np.arange(len(images))
        features = images
        for index, threshold in enumerate(self.thresholds):
            features, logits = self.stages[index](features)
            answers = logits if answers is None else answers
            leaves = self._confidence(logits) >= threshold
            gone = waiting[leaves]
            answers[gone], exits[gone] = logits[leaves], index
            waiting, features = waiting[~leaves], features[~leaves]
            if not len(waiting):
                return answers, exits
        assert answers is not None
        answers[waiting] = self.stages[-1](features)[0]
        return answers, exits

    def _answer_one(self, image: Floats) -> tuple[Floats, NDArray[np.int64]]:
        """Returns what `__call__` does for a single input, without taking anything out of arrays or putting it back.

        That took as long as a tenth of a ResNet-20 for each exit.
        """
        features = image
        for index, threshold in enumerate(self.thresholds):
            features, logits = self.stages[index](features)
            few = logits.shape[1] <= _FEW_CLASSES
            sure = self._confidence_of_one(logits[0].tolist()) if few else self._confidence(logits)[0]
            if sure >= threshold:
                return logits, np.array([index])
        return self.stages[-1](features)[0], np.array([len(self.thresholds)])

    def all_logits(self, images: Floats) -> Floats:
        """Returns what every exit and, last, the end says, `(n, exits + 1, classes)`: nobody leaves."""
        found, features = [], images
        for stage in self.stages[:-1]:
            features, logits = stage(features)
            found.append(logits)
        return np.stack([*found, self.stages[-1](features)[0]], axis=1)


def largest_probability(logits: Floats) -> Floats:
    """Returns the largest softmax probability of each row, `(n,)`."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    largest: Floats = 1.0 / shifted.sum(axis=1)
    return largest


def margin(logits: Floats) -> Floats:
    """Returns by how much the largest softmax probability of each row exceeds the second, `(n,)`."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    second: Floats = np.partition(shifted, -2, axis=1)[:, -2]
    apart: Floats = (1.0 - second) / shifted.sum(axis=1)
    return apart


def certainty(logits: Floats) -> Floats:
    """Returns 1 less the entropy of each row's softmax as a share of the largest possible one, 0 to 1, `(n,)`.

    Source: Teerapittayanon et al., BranchyNet, 2016, which holds the entropy itself against a threshold.
    """
    shifted = logits - logits.max(axis=1, keepdims=True)
    weights = np.exp(shifted)
    total = weights.sum(axis=1)
    entropy = np.log(total) - (weights * shifted).sum(axis=1) / total
    certain: Floats = np.clip(1.0 - entropy / np.float32(np.log(logits.shape[1])), 0.0, 1.0)
    return certain


CONFIDENCES: dict[str, Callable[[Floats], Floats]] = {
    "softmax": largest_probability,
    "margin": margin,
    "entropy": certainty,
}
"""What tells how sure an exit is, from logits `(n, classes)`: 0 to 1, by the name that a study and a bundle give it."""


def _largest_probability_of_one(logits: Sequence[float]) -> float:
    highest = max(logits)
    return 1.0 / sum([math.exp(logit - highest) for logit in logits])


def _margin_of_one(logits: Sequence[float]) -> float:
    *_, second, highest = sorted(logits)
    return (1.0 - math.exp(second - highest)) * _largest_probability_of_one(logits)


def _certainty_of_one(logits: Sequence[float]) -> float:
    highest = max(logits)
    shifted = [logit - highest for logit in logits]
    weights = [math.exp(logit) for logit in shifted]
    total = sum(weights)
    entropy = math.log(total) - sum([weight * logit for weight, logit in zip(weights, shifted, strict=True)]) / total
    return min(max(1.0 - entropy / math.log(len(logits)), 0.0), 1.0)


CONFIDENCES_OF_ONE: dict[str, Callable[[Sequence[float]], float]] = {
    "softmax": _largest_probability_of_one,
    "margin": _margin_of_one,
    "entropy": _certainty_of_one,
}
"""The same for the logits of a single input; the two differ by rounding, which thresholds leave room for."""


class KeyFrame(NamedTuple):
    """A frame that was computed: its thumbnail, and what the network said."""

    thumbnail: Floats
    logits: Floats
    exits: NDArray[np.int64]


class FrameReuse:
    """A network for streams: a frame that hardly differs from the last key frame is answered as that was.

    Args:
        network: maps a batch of one to logits and exits.
        threshold: the `difference` from which a frame is a key frame; at 0 all are.
        max_age: so many frames after a key frame the next one is, whatever it looks like.
    """

    def __init__(self, network: Network, threshold: float, max_age: int) -> None:
        self.network = network
        self.threshold = threshold
        self.max_age = max_age
        self.last: KeyFrame | None = None
        self.age = 0

    def __call__(self, frames: Floats) -> tuple[Floats, NDArray[np.int64], NDArray[np.bool_]]:
        """Returns the logits `(n, classes)`, the exits `(n,)`, and which are key frames `(n,)`, one after another.

        The last key frame is remembered from call to call.
        """
        found = [self.frame(frames[index : index + 1]) for index in range(len(frames))]
        logits = np.concatenate([key.logits for key, _ in found])
        exits = np.concatenate([key.exits for key, _ in found])
        return logits, exits, np.array([is_new for _, is_new in found])

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
