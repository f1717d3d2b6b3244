"""What the answers to some of the images tell of those to all, beside a network whose answers to all are known."""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.stats import hypergeom


@dataclass(frozen=True)
class Paired:
    """Right answers of two networks to the same images, some of all, chosen at random.

    What both have right, or neither, says nothing about which is better, so only where they differ counts.

    Args:
        gained: images that only the network in question has right.
        lost: images that only the one whose answers are known has right.
        asked: how many images both were asked about.
        total: how many there are in all.
        known: the share of all images that the known one has right.
    """

    gained: int
    lost: int
    asked: int
    total: int
    known: float

    @classmethod
    def of(cls, correct: NDArray[np.bool_], right: NDArray[np.bool_], known: float, total: int) -> "Paired":
        """Returns the pair of a network that was asked about the first images, and one that was about all.

        Args:
            correct: whether the network in question is right about each of the first images.
            right: the same of the other one; of as many images, or more.
            known: the other one's accuracy on all.
            total: how many there are.
        """
        first = right[: len(correct)]
        gained, lost = int((correct & ~first).sum()), int((first & ~correct).sum())
        return cls(gained, lost, len(correct), total, known)

    @property
    def accuracy(self) -> float:
        """The share of all images that the network probably has right.

        Source: Cochran, Sampling Techniques, 1977, section 7.3 (the difference estimator).
        """
        return min(max(self.known + (self.gained - self.lost) / self.asked, 0.0), 1.0)

    @property
    def spread(self) -> float:
        """The standard error of that, which falls to 0 as all are asked."""
        gained, lost = self.gained / self.asked, self.lost / self.asked
        left = (self.total - self.asked) / max(self.total - 1, 1)
        return math.sqrt((gained + lost - (gained - lost) ** 2) / self.asked * left)

    def most_accurate(self, error: float) -> float:
        """Returns the highest accuracy on all images that the answers leave likely.

        The exact limits of the images gained and lost are joined as independent ones' would be, and by as much more as
        they are correlated.

        Args:
            error: how often, at most, the accuracy on all turns out higher.

        Source: Zou, Toward using confidence intervals to compare correlations, 2007 (limits of a difference).
        """
        gained, lost = self.gained / self.asked, self.lost / self.asked
        above = most(self.gained, self.asked, self.total, error) / self.total - gained
        below = lost - least(self.lost, self.asked, self.total, error) / self.total
        chance = gained * lost
        together = math.sqrt(chance / ((1 - gained) * (1 - lost))) if chance else 0.0
        reach = math.sqrt(above**2 + below**2 + 2 * together * above * below)
        return min(max(self.known + gained - lost + reach, 0.0), 1.0)


@lru_cache(maxsize=65_536)
def most(seen: int, asked: int, total: int, error: float) -> int:
    """Returns how many of all may be such that so many are seen among those that were asked, or fewer.

    Args:
        seen: such ones among the asked.
        asked: how many were drawn.
        total: how many there are.
        error: more than this likely.

    Source: Buonaccorsi, A Note on Confidence Intervals for Proportions in Finite Populations, 1987.
    """
    low, high = seen, total - (asked - seen)
    while low < high:  # the more there are, the less likely it is to see so few
        middle = (low + high + 1) // 2
        low, high = (middle, high) if hypergeom.cdf(seen, total, middle, asked) > error else (low, middle - 1)
    return low


def least(seen: int, asked: int, total: int, error: float) -> int:
    """Returns how few of all may be such that so many are seen among those that were asked, or more."""
    return total - most(asked - seen, asked, total, error)
