"""The probability that each exit is right about an image, from the confidences of all exits."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_CLIP = 1e-6
"""Confidences are clipped to this distance from 0 and 1, so that their logits are finite."""
_RESOLUTION = 2.0**20
"""Probabilities are rounded to multiples of 1 / `_RESOLUTION`, so that their sums are exact."""


def correctness_probabilities(confidences: NDArray[np.floating], correct: NDArray[np.bool_]) -> Floats:
    """Returns the probability that each exit and, last, the end is right about each image, `(n, exits + 1)`.

    Thresholds chosen by counting right answers overfit: chosen on 1,000 images they lost 0.62 points on other images,
    where the best possible thresholds lost 0.33 and those chosen by these probabilities 0.46
    (studies/benchmarks/exits.md). Correctness changes smoothly with confidence, so a logistic regression on the logits
    of all confidences estimates it from few images; its mean equals the accuracy that was counted.

    Args:
        confidences: of each exit and, last, of the end, 0 to 1, `(n, exits + 1)`.
        correct: whether each of them is right, `(n, exits + 1)`.
    """
    from sklearn.linear_model import LogisticRegression  # slow to import, and seldom needed

    clipped = np.clip(confidences.astype(np.float64), _CLIP, 1 - _CLIP)
    logits = np.log(clipped / (1 - clipped))
    spread = logits.std(axis=0)
    features = (logits - logits.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    probabilities = correct.astype(np.float64)
    for index in range(correct.shape[1]):
        right = correct[:, index]
        if 0 < right.sum() < len(right):  # with one class only there is nothing to fit
            model = LogisticRegression(solver="newton-cholesky", tol=1e-8).fit(features, right)
            probabilities[:, index] = model.predict_proba(features)[:, 1]
    rounded: Floats = np.rint(probabilities * _RESOLUTION) / _RESOLUTION
    return rounded
