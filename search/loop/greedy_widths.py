"""Widths to try first: from the sensitivity profile, shrink again and again what costs least."""

from collections.abc import Callable, Mapping, Sequence

import torch

from evaluators.flops.pruned import ScaledFlops
from search.config.progress import Progress
from search.pipeline.pipeline import CompressionPipeline
from search.pipeline.sensitivity_profiler import Profiler
from search.results.sensitivity import Point, Profile
from spaces.candidate import NEVER_EXIT
from spaces.channels import PREFIX
from spaces.dimensions import Value

SHARES = (0.8, 0.65, 0.5, 0.35)
"""Shares of the dense network's FLOPs for which widths are proposed."""

_THRESHOLD = 0.9
"""Of the exits, where a proposal has them."""
AFFORDABLE_S = 600.0
"""A search measures the profile that a study asks for where that takes no longer."""


def greedy_seeds(
    pipeline: CompressionPipeline, progress: Progress, say: Callable[[str], None]
) -> list[dict[str, Value]]:
    """Returns values of the space for the greedy widths: the target's last precision, without exits and with them.

    Where thresholds are solved, exits are no choice. Nothing where there is one group only, or where the profile would
    take too long: `say` tells the user then.
    """
    profiler = Profiler(pipeline)
    if len(profiler.groups) < 2:
        return []
    seconds = profiler.expected_seconds()
    if seconds > AFFORDABLE_S:
        say(
            f"A sensitivity profile, which gives the search a good start, would take about {seconds / 60:.0f} min;"
            f" measure it once with: python -m search profile --study {pipeline.study.name}"
        )
        return []
    precision = pipeline.space.precision.computed[-1]
    found = greedy_versions(pipeline, profiler.run(progress))
    thresholds = (NEVER_EXIT, _THRESHOLD) if pipeline.space.thresholds.dimensions() else (NEVER_EXIT,)
    return [
        pipeline.space.uniform(1.0, precision, threshold) | {PREFIX + name: count for name, count in kept.items()}
        for _, kept in found
        for threshold in thresholds
    ]


def greedy_versions(pipeline: CompressionPipeline, found: Profile) -> list[tuple[float, dict[str, int]]]:
    """Returns the greedy channels per group, each with its share of the dense network's FLOPs."""
    image = torch.from_numpy(pipeline.data.calibration.images[:1])
    flops = ScaledFlops(pipeline.network, pipeline.space.sparsity.groups, image)
    return [(flops.count(kept) / flops.count({}), kept) for kept in greedy_widths(found, flops)]


def greedy_widths(profile: Profile, flops: ScaledFlops, shares: Sequence[float] = SHARES) -> list[dict[str, int]]:
    """Returns, for each share of the dense FLOPs that can be reached, channels per group.

    Starting from the dense network, the group with the least added divergence per FLOP saved goes down to its next
    profiled width. Divergences are taken to add up, less what recovery alone changes.

    Args:
        profile: of the network.
        flops: of any widths of the same network.
        shares: above 0, descending.
    """
    groups = profile.groups
    place = dict.fromkeys(groups, 0)
    dense = flops.count({})
    found: list[dict[str, int]] = []
    for share in shares:
        while flops.count(_channels(groups, place)) > share * dense:
            name = _cheapest(groups, place, flops, profile.floor)
            if name is None:
                return found
            place[name] += 1
        found.append(_channels(groups, place))
    return found


def _channels(groups: Mapping[str, Sequence[Point]], place: Mapping[str, int]) -> dict[str, int]:
    return {name: points[place[name]].channels for name, points in groups.items()}


def _cheapest(
    groups: Mapping[str, Sequence[Point]], place: Mapping[str, int], flops: ScaledFlops, floor: float
) -> str | None:
    """Returns the group whose next step adds the least divergence per FLOP that it saves; None at the end of all."""
    now = flops.count(_channels(groups, place))
    prices = {}
    for name, points in groups.items():
        if place[name] + 1 < len(points):
            saved = now - flops.count(_channels(groups, {**place, name: place[name] + 1}))
            after, before = (_own(points[place[name] + step], floor) for step in (1, 0))
            prices[name] = max(after - before, 0.0) / max(saved, 1.0)
    return min(prices, key=lambda name: prices[name], default=None)


def _own(point: Point, floor: float) -> float:
    """Returns the part of a divergence that pruning is to blame for."""
    return max(point.divergence - floor, 0.0)
