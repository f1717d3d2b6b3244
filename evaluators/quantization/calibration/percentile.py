"""A share of the values stays inside."""

import numpy as np

from evaluators.quantization.calibration.histogram import Histogram
from evaluators.quantization.scheme import Scheme


def threshold(histogram: Histogram, scheme: Scheme) -> float:
    """Returns the first edge of a bin below which the scheme's percentage of the magnitudes lies, zeros counted.

    Source: Wu et al., Integer Quantization for Deep Learning Inference, 2020.
    """
    below = np.cumsum(histogram.counts)
    bins = np.searchsorted(below / below[-1], scheme.percentile / 100) + 1
    return float(bins) * histogram.width
