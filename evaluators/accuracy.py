"""Accuracy of the deployed artifact, in the runtime that will run it."""

import math

import numpy as np
from numpy.typing import NDArray

from evaluators.deployed import Answers, LoadedArtifact
from evaluators.measurement import Measurement
from evaluators.runtimes.base import Target
from evaluators.streams import KEY_FRAMES


def accuracy_of(answers: Answers, target: Target, images: str) -> Measurement:
    """Returns the share of right answers, with its standard error and its 95% interval.

    Frames of one clip tend to be right or wrong together, so for a stream the standard error is taken over clips, and
    the interval is that of the number of independent images with the same standard error.

    Args:
        answers: predictions for labelled images.
        target: the target that ran the network.
        images: which images these are, for the protocol.
    """
    n, clips = len(answers.correct), answers.clips
    share, independent = float(answers.correct.mean()), float(n)
    shares = {f"exit{stage + 1}": float((answers.exits == stage).mean()) for stage in range(answers.stages - 1)}
    if answers.key_frames is not None:
        shares[KEY_FRAMES] = float(answers.computed.mean())
    spread = math.sqrt(share * (1 - share) / n)
    if clips is not None:
        spread = _over_clips(answers.correct, clips)
        independent = _effective_size(share, spread, n, len(np.unique(clips)))
    return Measurement(
        metric="accuracy",
        value=share,
        statistic="mean",
        n=n,
        spread=spread,
        target=str(target),
        protocol=f"top-1 of the deployed artifact on {n} {images} {'images' if clips is None else 'frames'}, batch"
        f" {target.batch}",
        others=dict(zip(("low", "high"), wilson(share, independent), strict=True)),
        notes=shares,
    )


def wilson(share: float, n: float, z: float = 1.96) -> tuple[float, float]:
    """Returns the Wilson score interval of a share observed in `n` samples, at 95% by default.

    Source: Wilson, Probable Inference, the Law of Succession, and Statistical Inference, 1927.
    """
    middle, width = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max((middle - width) / (1 + z * z / n), 0.0), min((middle + width) / (1 + z * z / n), 1.0)


def interval(accuracy: Measurement) -> tuple[float, float]:
    """Returns the 95% interval of an accuracy by Wilson; that of a stream is as wide as its clips make it."""
    low, high = wilson(accuracy.value, accuracy.n)
    return min(low, accuracy.others.get("low", low)), max(high, accuracy.others.get("high", high))


def _effective_size(share: float, spread: float, n: int, clips: int) -> float:
    """Returns how many independent images would give the same standard error: at most the number of frames.

    Where all clips are alike, as where every frame is right, the error says nothing, and each clip counts as one image.

    Source: Kish, Survey Sampling, 1965, section 8.2 (the design effect).
    """
    return min(share * (1 - share) / spread**2, n) if spread else clips


def _over_clips(correct: NDArray[np.bool_], clips: NDArray[np.int64]) -> float:
    """Returns the standard error of the share of right answers, with clips as clusters.

    Source: Cochran, Sampling Techniques, 1977, section 9.2 (a ratio over clusters of unequal size).
    """
    deviations = np.bincount(clips, correct - correct.mean())
    return float(np.sqrt((deviations**2).sum()) / len(clips))


class AccuracyEvaluator:
    """Top-1 accuracy on the validation images."""

    metric = "accuracy"

    def measure(self, subject: LoadedArtifact) -> Measurement:
        """Returns the share of right answers, 0 to 1, its standard error, and the share that leaves at each exit.

        For a stream it includes the share of key frames.
        """
        return accuracy_of(subject.answers, subject.target, "validation")
