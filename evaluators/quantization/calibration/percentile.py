"""Percentile calibration: a share of the values is not clipped."""

import numpy as np

from evaluators.quantization.calibration.histogram import Histogram
from evaluators.quantization.scheme import Scheme


def threshold(histogram: Histogram, scheme: Scheme) -> float:
    """Returns the first bin edge below which the scheme's percentage of the magnitudes lies, zeros included.

    Source: Wu et al., Integer Quantization for Deep Learning Inference, 2020.
    """
    below = np.cumsum(histogram.counts)
    bins = np.searchsorted(below / below[-1], scheme.percentile / 100) + 1
    return float(bins) * histogram.width
