"""The effect of symmetric s8 quantization on a histogram, for all clipping points at once."""

import numpy as np
from numpy.typing import NDArray

LARGEST = 127
"""The largest level. Activations are s8 in the file whether or not they are negative: 127 levels and zero."""
_FEWEST = 128
"""No histogram is clipped to fewer bins than there are levels: what is lost inside a bin cannot be seen."""


def cuts(bins: int) -> NDArray[np.int64]:
    """Returns the numbers of bins `(cuts,)` to which a histogram may be clipped, up to all of its bins."""
    return np.arange(min(_FEWEST, bins), bins + 1)


def first_bins(kept: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns the first bin that is rounded to each level, `(cuts, 128)`, where `kept` bins `(cuts,)` stay inside.

    The upper edge of the last bin is level 127, so a level is `kept / 127` bins wide. The middle of bin `b` is rounded
    to level `k` or above where `b + 1/2 >= (k - 1/2) * kept / 127`, in whole numbers `254 b >= (2k - 1) kept - 127`.
    """
    levels = np.arange(LARGEST + 1)
    edges = -((LARGEST - (2 * levels - 1) * kept[:, None]) // (2 * LARGEST))
    return np.asarray(np.maximum(edges, 0))


def sums_between(values: NDArray[np.float64], edges: NDArray[np.int64]) -> NDArray[np.float64]:
    """Returns the sum of `values` `(bins,)` from each edge to the next, `(cuts, edges - 1)`."""
    return np.diff(running(values)[edges], axis=1)


def running(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the sum of the first 0, 1, 2, ... values, `(bins + 1,)`."""
    return np.concatenate([[0.0], np.cumsum(values)])


def widest_best(kept: NDArray[np.int64], losses: NDArray[np.float64]) -> int:
    """Returns the number of bins with the least loss, the largest of several."""
    return int(kept[::-1][np.argmin(losses[::-1])])
