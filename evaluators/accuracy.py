"""Accuracy of the deployed artifact, in the runtime that will run it."""

import math

import numpy as np
from numpy.typing import NDArray

from evaluators.frames import KEY_FRAMES
from evaluators.measurement import Measurement
from evaluators.subject import Answers, Deployed
from evaluators.target import Target


def accuracy_of(answers: Answers, target: Target, images: str) -> Measurement:
    """Returns the share of right answers, with its standard error.

    Frames of one clip are right or wrong together, so of a stream it is the error over clips, of which there may be any
    number of frames.

    Args:
        answers: to labelled images.
        target: what ran the network.
        images: which images they were, for the record.
    """
    n, clips = len(answers.correct), answers.clips
    share = float(answers.correct.mean())
    shares = {f"exit{stage + 1}": float((answers.exits == stage).mean()) for stage in range(answers.stages - 1)}
    if answers.answering is not None:
        shares[KEY_FRAMES] = float(answers.computed.mean())
    return Measurement(
        metric="accuracy",
        value=share,
        statistic="mean",
        n=n,
        spread=math.sqrt(share * (1 - share) / n) if clips is None else _over_clips(answers.correct, clips),
        target=str(target),
        protocol=f"top-1 of the deployed artifact on {n} {images} {'images' if clips is None else 'frames'}, batch"
        f" {target.batch}",
        notes=shares,
    )


def _over_clips(correct: NDArray[np.bool_], clips: NDArray[np.int64]) -> float:
    """Returns the standard error of a share whose samples come in clips.

    Source: Cochran, Sampling Techniques, 1977, section 9.2 (a ratio over clusters of unequal size).
    """
    deviations = np.bincount(clips, correct - correct.mean())
    return float(np.sqrt((deviations**2).sum()) / len(clips))


class AccuracyEvaluator:
    """Top-1 accuracy on the validation images."""

    metric = "accuracy"

    def measure(self, subject: Deployed) -> Measurement:
        """Returns the share of right answers, 0 to 1, its standard error, and the share that leaves at each exit.

        Of a stream it has the share of key frames as well.
        """
        return accuracy_of(subject.answers, subject.target, "validation")
