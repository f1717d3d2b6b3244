"""Estimates of a network's accuracy on all images from some, paired with a network whose accuracy on all is known."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy.stats import hypergeom


@dataclass(frozen=True)
class PairedAccuracy:
    """Correct answers of two networks on the same random sample of images.

    Images on which both are correct, or both wrong, do not tell which network is better, so only the others count.

    Args:
        gained: number of images on which only the network to estimate is correct.
        lost: number of images on which only the known network is correct.
        sampled: number of images in the sample.
        total: number of all images.
        known: accuracy of the known network on all images, 0 to 1.
    """

    gained: int
    lost: int
    sampled: int
    total: int
    known: float

    @classmethod
    def of(cls, correct: NDArray[np.bool_], known_correct: NDArray[np.bool_], known: float, total: int) -> Self:
        """Returns the counts for a network that was run on the first images, and one that was run on all.

        Args:
            correct: whether the network to estimate is correct, for each of the first images, `(n,)`.
            known_correct: the same for the known network, for at least as many images.
            known: accuracy of the known network on all images, 0 to 1.
            total: number of all images.
        """
        first = known_correct[: len(correct)]
        gained = int((correct & ~first).sum())
        lost = int((first & ~correct).sum())
        return cls(gained, lost, len(correct), total, known)

    @property
    def accuracy(self) -> float:
        """The estimated accuracy on all images, 0 to 1.

        Source: Cochran, Sampling Techniques, 1977, section 7.3 (the difference estimator).
        """
        return min(max(self.known + (self.gained - self.lost) / self.sampled, 0.0), 1.0)

    @property
    def spread(self) -> float:
        """The standard error of `accuracy`; 0 if the sample has all images."""
        gained, lost = self.gained / self.sampled, self.lost / self.sampled
        finite_correction = (self.total - self.sampled) / max(self.total - 1, 1)
        return math.sqrt((gained + lost - (gained - lost) ** 2) / self.sampled * finite_correction)

    def upper_bound(self, error: float) -> float:
        """Returns a one-sided upper confidence bound of the accuracy on all images, 0 to 1.

        It combines the exact bounds of the shares gained and lost, which are negatively correlated.

        Args:
            error: the probability, at most, that the accuracy on all images is higher.

        Source: Zou, Toward using confidence intervals to compare correlations, 2007 (limits of a difference).
        """
        gained, lost = self.gained / self.sampled, self.lost / self.sampled
        above = largest_count(self.gained, self.sampled, self.total, error) / self.total - gained
        below = lost - smallest_count(self.lost, self.sampled, self.total, error) / self.total
        both = gained * lost
        correlation = math.sqrt(both / ((1 - gained) * (1 - lost))) if both else 0.0
        margin = math.sqrt(above**2 + below**2 + 2 * correlation * above * below)
        return min(max(self.known + gained - lost + margin, 0.0), 1.0)


@lru_cache(maxsize=65_536)
def largest_count(seen: int, sampled: int, total: int, error: float) -> int:
    """Returns the upper confidence bound of a count in a finite population, from a sample without replacement.

    Args:
        seen: the count in the sample.
        sampled: size of the sample.
        total: size of the population.
        error: the probability, at most, that the count in the population is larger.

    Source: Buonaccorsi, A Note on Confidence Intervals for Proportions in Finite Populations, 1987.
    """
    low, high = seen, total - (sampled - seen)
    while low < high:  # bisection: the larger the count, the less likely are so few in the sample
        middle = (low + high + 1) // 2
        low, high = (middle, high) if hypergeom.cdf(seen, total, middle, sampled) > error else (low, middle - 1)
    return low


def smallest_count(seen: int, sampled: int, total: int, error: float) -> int:
    """Returns the lower confidence bound of a count in a finite population; for the arguments see `largest_count`."""
    return total - largest_count(sampled - seen, sampled, total, error)
