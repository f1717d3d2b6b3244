"""A sensitivity profile as data; `search.pipeline.sensitivity_profiler` measures it, with torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

EIGHTHS = 8
"""Tables and plots have a column for each eighth of the channels."""


@dataclass(frozen=True)
class Point:
    """The network with one group pruned to one width, and all other groups dense.

    Args:
        group: its name.
        channels: that it keeps.
        share: of its channels that it keeps.
        loss: change of the cross-entropy against the dense network, in nats.
        divergence: KL divergence of this network's predictions from the dense network's, in nats.
        flops: of the whole network, as a share of the dense one's.
    """

    group: str
    channels: int
    share: float
    loss: float
    divergence: float
    flops: float

    @property
    def eighth(self) -> int:
        """The share in eighths, to the nearest; 8 at full width only."""
        return min(round(self.share * EIGHTHS), EIGHTHS - 1) if self.share < 1 else EIGHTHS


@dataclass(frozen=True)
class Profile:
    """The sensitivity of a network's groups.

    Args:
        effort: the recovery before measuring, as text.
        images: number of calibration images.
        floor: divergence, in nats, of the unpruned network after the same recovery, which pruning does not cause.
        points: for each group its widths, the dense one first.
    """

    effort: str
    images: int
    floor: float
    points: tuple[Point, ...]

    @property
    def groups(self) -> dict[str, list[Point]]:
        """The points of each group, widest first."""
        groups: dict[str, list[Point]] = {}
        for point in self.points:
            groups.setdefault(point.group, []).append(point)
        return groups

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready copy."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """Returns the profile that `to_dict` described."""
        return cls(**{**content, "points": tuple(Point(**point) for point in content["points"])})
