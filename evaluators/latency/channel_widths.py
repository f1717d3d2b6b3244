"""Which widths of layers are slower than wider ones on a target, decided from a short table of timings.

Kernels compute channels in blocks, and take as long for a part of one. On ONNX Runtime 1.32 (AMD EPYC with AVX-512 and
VNNI, one thread) int8 layers of 8 channels take 1.25 times as long as those of 16. A width is worth offering if it is
not slower than a wider one in at least one of the precisions that a layer may have.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import hypot, prod
from typing import Any, Self

from evaluators.latency.slow_layers import Interval

FACTORS = (1, 2, 4)
"""Steps that are considered, as multiples of the finest."""
TOLERANCE = 0.03
"""A width is slower than a wider one if it takes longer by more than this share."""


@dataclass(frozen=True)
class WidthTimes:
    """Widths of layers in one precision, and which of them are slower than a wider one.

    Args:
        widths: the channels of the layers, ascending.
        ratios: for each width but the last, its time divided by that of the next one.
    """

    widths: tuple[int, ...]
    ratios: tuple[Interval, ...]

    @property
    def slower(self) -> frozenset[int]:
        """The widths that are slower than any wider one, by more than `TOLERANCE` and by the ratios' 95% intervals."""
        pairs = [(start, end) for start in range(len(self.ratios)) for end in range(start + 1, len(self.widths))]
        return frozenset(self.widths[start] for start, end in pairs if _is_slower(self.ratios[start:end]))

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready copy."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """Returns the table that `to_dict` described."""
        return cls(tuple(content["widths"]), tuple(Interval(**ratio) for ratio in content["ratios"]))


@dataclass(frozen=True)
class OfferedWidths:
    """The widths of a layer that are worth offering: every `step` channels from `least` on."""

    step: int
    least: int

    def __str__(self) -> str:
        return f"steps of {self.step}" + (f" from {self.least} on" if self.least > self.step else "")


def _is_slower(ratios: Sequence[Interval]) -> bool:
    """Returns whether the first width of a chain of ratios is slower than the one at its end."""
    ratio = prod(interval.ratio for interval in ratios)
    half_width = hypot(*(interval.half_width for interval in ratios))
    return Interval(ratio, half_width).low > 1 + TOLERANCE


def offered_widths(tables: Iterable[WidthTimes]) -> OfferedWidths:
    """Returns the widths that are not slower than a wider one in at least one of the precisions of a layer.

    Of the steps that are considered, each begins after the last multiple that is slower in every precision; the one
    that leaves most widths of the table is taken, of several the one that begins first.

    Args:
        tables: of the precisions, at least one, all with the same widths.
    """
    times = list(tables)
    slower = frozenset.intersection(*(each.slower for each in times))
    return _most_widths(times[0].widths, slower)


def _most_widths(widths: Sequence[int], slower: Collection[int]) -> OfferedWidths:
    """Returns the step that leaves most widths of a table when those up to the last slower multiple are left out."""
    left: dict[int, list[int]] = {}
    for step in (factor * widths[0] for factor in FACTORS):
        multiples = [width for width in widths if width % step == 0]
        last_slow = max((index for index, width in enumerate(multiples) if width in slower), default=-1)
        left[step] = multiples[last_slow + 1 :]
    step = max(left, key=lambda step: (len(left[step]), -left[step][0]))
    return OfferedWidths(step, left[step][0])
