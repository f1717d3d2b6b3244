"""Histograms of the magnitudes of activations, counted batch by batch."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BINS = 4096
"""Magnitudes are counted in so many bins; the largest of them lies in the upper half, so 2049 at least are in use."""

_DOUBLINGS = BINS.bit_length() - 1
_FINEST = -126
"""The exponent of the narrowest bins, those of nothing but zeros; float32 holds its inverse."""
_CHUNK = 2**18
"""The number of values that are counted at a time, so that intermediate results fit the CPU's cache."""


@dataclass(frozen=True, eq=False)
class Histogram:
    """The magnitudes of an activation in bins of equal width, and its extremes.

    Bins are a power of two wide. So scaling is exact, a sum of histograms joins whole bins, and the histogram of two
    batches is that of all their values, in whichever order they come.

    Args:
        counts: of the magnitudes in each bin, `(BINS,)`; bin `k` begins at `k * width`.
        exponent: the bins are `2 ** exponent` wide.
        low: the lowest value, at most 0.
        high: the highest value, at least 0.
    """

    counts: NDArray[np.int64]
    exponent: int
    low: float
    high: float

    @classmethod
    def of(cls, values: NDArray[np.float32]) -> "Histogram":
        """Returns the histogram of values of any shape.

        Raises:
            ValueError: one of them is not finite.
        """
        low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
        if not math.isfinite(high - low):
            raise ValueError(f"values are finite, got {low} to {high}")
        exponent = _exponent(max(-low, high))
        return cls(_counts(values.reshape(-1), exponent), exponent, low, high)

    def __add__(self, other: "Histogram") -> "Histogram":
        """Returns the histogram of the values of both."""
        exponent = max(self.exponent, other.exponent)
        counts = self._counts_at(exponent) + other._counts_at(exponent)
        return Histogram(counts, exponent, min(self.low, other.low), max(self.high, other.high))

    def _counts_at(self, exponent: int) -> NDArray[np.int64]:
        """Returns the counts in bins that are as wide or wider."""
        joined = 2 ** min(exponent - self.exponent, _DOUBLINGS)
        sums = self.counts.reshape(-1, joined).sum(axis=1)
        return np.pad(sums, (0, BINS - len(sums)))

    @property
    def width(self) -> float:
        """The width of a bin."""
        return 2.0**self.exponent

    @property
    def largest(self) -> float:
        """The largest magnitude."""
        return max(-self.low, self.high)

    @property
    def used(self) -> NDArray[np.int64]:
        """The counts up to the bin of the largest magnitude."""
        return self.counts[: int(self.largest / self.width) + 1]

    def clipped(self, magnitude: float) -> tuple[float, float]:
        """Returns the lowest and highest value once larger magnitudes are clipped."""
        return max(self.low, -magnitude), min(self.high, magnitude)


def _exponent(largest: float) -> int:
    """Returns the exponent of the narrowest bins that hold magnitudes up to `largest`."""
    return max(math.frexp(largest)[1] - _DOUBLINGS, _FINEST) if largest else _FINEST


def _counts(values: NDArray[np.float32], exponent: int) -> NDArray[np.int64]:
    """Returns how many of the values `(n,)` lie in each bin.

    Counting whole numbers takes a third of `numpy.histogram`'s time.
    """
    scale = np.float32(2.0**-exponent)
    counts = np.zeros(BINS, dtype=np.int64)
    for start in range(0, len(values), _CHUNK):
        bins = (np.abs(values[start : start + _CHUNK]) * scale).astype(np.int64)
        counts += np.bincount(bins, minlength=BINS)
    return counts
