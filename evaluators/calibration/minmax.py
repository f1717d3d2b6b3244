"""The extremes: nothing is clipped."""

from evaluators.artifact.scheme import Scheme
from evaluators.calibration.histogram import Histogram


def threshold(histogram: Histogram, scheme: Scheme) -> float:  # noqa: ARG001
    """Returns the largest magnitude that was seen."""
    return histogram.largest
