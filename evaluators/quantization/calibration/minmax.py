"""Min-max calibration: nothing is clipped."""

from evaluators.quantization.calibration.histogram import Histogram
from evaluators.quantization.scheme import Scheme


def threshold(histogram: Histogram, _scheme: Scheme, /) -> float:
    """Returns the largest magnitude of the histogram."""
    return histogram.largest
