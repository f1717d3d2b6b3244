"""Entropy calibration: the least divergence between the clipped and the quantized distribution."""

import numpy as np
from numpy.typing import NDArray
from scipy.special import xlogy

from evaluators.quantization.calibration.clipping import cuts, first_bins, running, sums_between, widest_best
from evaluators.quantization.calibration.histogram import Histogram
from evaluators.quantization.scheme import Scheme


def threshold(histogram: Histogram, _scheme: Scheme, /) -> float:
    """Returns the clipping magnitude with the least Kullback-Leibler divergence, the largest of several.

    Zeros are exact in any quantization, so the count of the first bin, which has them, is set to that of the second.
    Source: Migacz, 8-bit Inference with TensorRT, 2017; NVIDIA, pytorch-quantization, histogram calibration.
    """
    counts = histogram.used.astype(np.float64)
    if len(counts) < 2:
        return histogram.width
    counts[0] = counts[1]
    kept = cuts(len(counts))
    return widest_best(kept, divergences(counts, kept)) * histogram.width


def divergences(counts: NDArray[np.float64], kept: NDArray[np.int64]) -> NDArray[np.float64]:
    """Returns KL(P || Q) in nats for each number of bins that stays inside, `(cuts,)`.

    P is the first `kept` bins with all that lies outside in the last of them. Q is these bins without what lies
    outside, each that is not empty with the mean of those that share its level. With sums over bins as
    `sum p log p - sum p log q`, the second is one term a level: all its bins have the same `q`.

    Args:
        counts: of each bin, `(bins,)`, the last one not 0.
        kept: numbers of bins, `(cuts,)`.
    """
    edges = np.column_stack([first_bins(kept), kept])
    inside = running(counts)[kept]
    last, outside = counts[kept - 1], counts.sum() - inside
    sums, filled = sums_between(counts, edges), sums_between((counts > 0).astype(np.float64), edges)
    q = sums / np.maximum(filled, 1)
    p_log_p = running(xlogy(counts, counts))[kept] - xlogy(last, last) + xlogy(last + outside, last + outside)
    p_log_q = xlogy(sums, q).sum(axis=1) + outside * np.log(np.where(last > 0, q[:, -1], 1))
    total = counts.sum()
    found = (p_log_p - p_log_q) / total + np.log(np.where(inside > 0, inside, total) / total)
    # What lies outside is in the last bin of P; where Q has nothing there, P is impossible.
    return np.where(last > 0, found, np.inf)
