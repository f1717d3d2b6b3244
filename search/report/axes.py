"""Title, limit lines and axes of the picture of the front, shared by all plotting libraries."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from search.config.budget import Budget
from search.report.overview import Overview
from search.results.pareto import Version

_MIN_VERSIONS = 8
"""With fewer versions, the view contains all of them."""


@dataclass(frozen=True)
class LimitLine:
    """A limit of the budget on one of the picture's axes, in the units of the picture.

    Args:
        axis: `x` is latency in ms, `y` accuracy in %.
        value: of the limit.
        label: the limit.
    """

    axis: str
    value: float
    label: str


def coordinates(version: Version) -> tuple[float, float]:
    """Returns the coordinates of a version: latency in ms, accuracy in %."""
    return version.measured["latency"].value * 1e3, version.measured["accuracy"].value * 100


def flops_share(version: Version, dense: Version) -> float:
    """Returns a version's FLOPs as a share of the dense network's."""
    return version.measured["flops"].value / dense.measured["flops"].value


def caption(overview: Overview) -> list[str]:
    """Returns the picture's title, and lines on how to read it and on versions that it does not show."""
    lines = [
        f"{overview.search.study.name}: {len(overview.front)} versions on the front within {overview.budget}",
        f"{overview.dense.measured['latency'].target}; the larger a point, the more FLOPs",
    ]
    over = len(overview.not_scored)
    missing = f"{over} more broke {overview.search.budget} and {'was' if over == 1 else 'were'} not scored"
    ended = len(overview.ended_early)
    early = f"{ended} {'was' if ended == 1 else 'were'} ended early, after some of the images"
    return [*lines, *([missing] if over else []), *([early] if ended else [])]


def limit_lines(budget: Budget, dense: Version) -> list[LimitLine]:
    """Returns the budget's limits on latency and accuracy."""
    lines = []
    for constraint in budget.constraints:
        base = dense.measured[constraint.measured_as]
        if constraint.name == "latency":
            lines.append(LimitLine("x", constraint.ceiling(base) * 1e3, str(constraint)))
        elif constraint.measured_as == "accuracy":
            lines.append(LimitLine("y", constraint.floor(base) * 100, str(constraint)))
    return lines


def staircase(front: Sequence[Version]) -> list[tuple[float, float]]:
    """Returns the corners of the staircase through the front, as pairs of latency in ms and accuracy in %."""
    corners: list[tuple[float, float]] = []
    for latency, accuracy in sorted(map(coordinates, front), key=lambda point: (point[0], -point[1])):
        if not corners or accuracy > corners[-1][1]:
            corners += [(latency, corners[-1][1])] if corners else []
            corners.append((latency, accuracy))
    return corners


def accuracy_view(overview: Overview) -> tuple[float, float] | None:
    """Returns the range of accuracies, in %, that contains most versions; None if it contains all.

    Outliers far below would compress the others, so they are left out of the view, and the caller says so.
    """
    values = np.array([coordinates(version)[1] for version in overview.complete])
    if len(values) < _MIN_VERSIONS:
        return None
    top = float(max(values.max(), coordinates(overview.dense)[1]))
    bulk = float(np.quantile(values, 0.1))
    lowest = bulk - max(top - bulk, 1.0)
    if values.min() >= lowest:
        return None
    bottom = float(values[values >= lowest].min())
    margin = 0.08 * (top - bottom)
    return bottom - margin, top + margin
