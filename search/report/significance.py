"""Whether two measurements differ by more than chance."""

import math
from dataclasses import dataclass

from evaluators.accuracy import wilson
from evaluators.measurement import METRICS, Measurement

EXACT = ("flops", "params", "size")
"""These are counted, so that any difference is one."""


@dataclass(frozen=True)
class Difference:
    """How far one measurement lies from another.

    Args:
        change: of accuracy in points as a share, 0.01 being one; of every other metric relative to the first.
        noise: of the same kind: what chance alone brings about at 95%; 0 where the metric is exact.
        is_noise: whether chance may be all that there is.
    """

    change: float
    noise: float
    is_noise: bool


def difference(first: Measurement, second: Measurement, machine: float = 0.0) -> Difference:
    """Returns how `second` differs from `first`, which measures the same metric.

    Args:
        first: what is compared with.
        second: what is compared.
        machine: by what share the machine itself was found to differ from one to the other, or from itself.
    """
    if first.metric == "accuracy":
        return _accuracy_difference(first, second)
    change = second.value / first.value - 1 if first.value else 0.0
    if METRICS[first.metric].name in EXACT:
        return Difference(change, 0.0, change == 0)
    noise = math.sqrt(half_width(first) ** 2 + half_width(second) ** 2 + machine**2)
    return Difference(change, noise, abs(math.log1p(change)) <= noise)


def half_width(latency: Measurement) -> float:
    """Returns half of the latency's 95% interval, as a share of it."""
    return latency.notes.get("half_width", 1.96 * latency.spread / latency.value if latency.value else 0.0)


def _accuracy_difference(first: Measurement, second: Measurement) -> Difference:
    """Returns the difference of two shares, as if they had been seen on different images.

    On the same images it is known better than that, so what counts as a difference here is one. Frames of a clip are
    right or wrong together, which only the standard errors know, so chance is at least what they tell.

    Source: Newcombe, Interval estimation for the difference between independent proportions, 1998, method 10.
    """
    a, b = second.value, first.value
    (low_a, high_a), (low_b, high_b) = wilson(a, second.n), wilson(b, first.n)
    change = a - b
    least = 1.96 * math.hypot(first.spread, second.spread)
    below = max(math.hypot(a - low_a, high_b - b), least)
    above = max(math.hypot(high_a - a, b - low_b), least)
    noise = below if change > 0 else above
    return Difference(change, noise, change - below <= 0 <= change + above)
