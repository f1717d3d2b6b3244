"""MSE calibration: the least squared error of clipping and rounding."""

import numpy as np

from evaluators.quantization.calibration.clipping import LARGEST, cuts, first_bins, sums_between, widest_best
from evaluators.quantization.calibration.histogram import Histogram
from evaluators.quantization.scheme import Scheme


def threshold(histogram: Histogram, _scheme: Scheme, /) -> float:
    """Returns the clipping magnitude with the least squared error of rounding and clipping.

    All values of a bin are treated as its middle `c`. The error of those at a level `v` is the sum of `(c - v)^2`,
    which is `sum c^2 - 2 v sum c + v^2 sum 1`: three differences of cumulative sums, whatever the number of bins.
    Source: Wu et al., Integer Quantization for Deep Learning Inference, 2020.
    """
    counts = histogram.used.astype(np.float64)
    middles = np.arange(len(counts)) + 0.5
    kept = cuts(len(counts))
    edges = np.column_stack([first_bins(kept), np.full(len(kept), len(counts))])  # clipped values have the last level
    values = np.arange(LARGEST + 1) * kept[:, None] / LARGEST
    number, total, squares = (sums_between(counts * middles**power, edges) for power in range(3))
    errors = (squares - 2 * values * total + values**2 * number).sum(axis=1)
    return widest_best(kept, errors) * histogram.width
