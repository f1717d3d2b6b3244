"""The extremes: nothing is clipped."""

from evaluators.quantization.calibration.histogram import Histogram
from evaluators.quantization.scheme import Scheme


def threshold(histogram: Histogram, scheme: Scheme) -> float:  # noqa: ARG001
    """Returns the largest magnitude that was seen."""
    return histogram.largest
