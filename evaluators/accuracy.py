"""Accuracy of the deployed artifact, in the runtime that will run it."""

import math

from evaluators.measurement import Measurement
from evaluators.subject import Answers, Deployed
from evaluators.target import Target


def accuracy_of(answers: Answers, target: Target, images: str) -> Measurement:
    """Returns the share of right answers, with the standard error of a share, and its 95% interval beside it.

    Args:
        answers: to labelled images.
        target: what ran the network.
        images: which images they were, for the record.
    """
    n = len(answers.correct)
    share = float(answers.correct.mean())
    shares = {f"exit{stage + 1}": float((answers.exits == stage).mean()) for stage in range(answers.stages - 1)}
    return Measurement(
        metric="accuracy",
        value=share,
        statistic="mean",
        n=n,
        spread=math.sqrt(share * (1 - share) / n),
        target=str(target),
        protocol=f"top-1 of the deployed artifact on {n} {images} images, batch {target.batch}",
        others=dict(zip(("low", "high"), wilson(share, n), strict=True)),
        notes=shares,
    )


def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Returns the interval in which a share that was seen among `n` lies, at 95% where `z` is not given.

    Source: Wilson, Probable Inference, the Law of Succession, and Statistical Inference, 1927.
    """
    middle, width = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max((middle - width) / (1 + z * z / n), 0.0), min((middle + width) / (1 + z * z / n), 1.0)


class AccuracyEvaluator:
    """Top-1 accuracy on the validation images."""

    metric = "accuracy"

    def measure(self, subject: Deployed) -> Measurement:
        """Returns the share of right answers, 0 to 1, its standard error, and the share that leaves at each exit."""
        return accuracy_of(subject.answers, subject.target, "validation")
