"""Whether two measurements differ significantly."""

import math
from dataclasses import dataclass

from evaluators.accuracy import interval
from evaluators.measurement import METRICS, Measurement


@dataclass(frozen=True)
class Difference:
    """The difference of two measurements.

    Args:
        change: absolute for accuracy, 0.01 being one point; relative to the first for every other metric.
        noise: half-width of the 95% interval of the change, in the same unit; 0 for exact metrics.
        is_noise: whether the interval of the change contains 0.
    """

    change: float
    noise: float
    is_noise: bool


def difference(first: Measurement, second: Measurement, machine: float = 0.0) -> Difference:
    """Returns how `second` differs from `first`, which measures the same metric.

    Args:
        first: to compare with.
        second: to compare.
        machine: relative noise of the machine between the two.
    """
    if first.metric == "accuracy":
        return _accuracy_difference(first, second)
    change = second.value / first.value - 1 if first.value else 0.0
    if METRICS[first.metric].is_counted:
        return Difference(change, 0.0, change == 0)
    noise = math.sqrt(first.half_width**2 + second.half_width**2 + machine**2)
    return Difference(change, noise, abs(math.log1p(change)) <= noise)


def _accuracy_difference(first: Measurement, second: Measurement) -> Difference:
    """Returns the difference of two accuracies as if measured on different images.

    On the same images the interval would be narrower, so this one is conservative. Frames of a clip are correlated,
    which only the standard errors take into account, so the noise is at least theirs.

    Source: Newcombe, Interval estimation for the difference between independent proportions, 1998, method 10.
    """
    a, b = second.value, first.value
    (low_a, high_a), (low_b, high_b) = interval(second), interval(first)
    change = a - b
    from_spread = 1.96 * math.hypot(first.spread, second.spread)
    below = max(math.hypot(a - low_a, high_b - b), from_spread)
    above = max(math.hypot(high_a - a, b - low_b), from_spread)
    noise = below if change > 0 else above
    return Difference(change, noise, change - below <= 0 <= change + above)
