"""Widths to try first: greedy pruning by the sensitivity profile."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from evaluators.flops.pruned import ScaledFlops
from search.config.command_lines import command_line
from search.config.progress import Progress
from search.pipeline.pipeline import CompressionPipeline
from search.pipeline.sensitivity_profiler import Profiler
from search.results.sensitivity import Point, Profile
from spaces.channels import PREFIX
from spaces.dimensions import Value

SHARES = (0.8, 0.65, 0.5, 0.35)
"""Shares of the dense network's FLOPs for which widths are proposed."""

_THRESHOLD = 0.9
"""Threshold of the exits in proposals with exits."""
AFFORDABLE_S = 600.0
"""Seconds that a search spends, at most, on measuring the sensitivity profile."""


def greedy_seeds(
    pipeline: CompressionPipeline, progress: Progress, say: Callable[[str], None], search: Path
) -> list[dict[str, Value]]:
    """Returns proposals with greedy widths in the target's last precision, without exits and with them.

    If thresholds are solved, there is one proposal per widths. There are none with a single group of channels, or if
    the profile would take too long; `say` tells the user then.

    Args:
        pipeline: of the search.
        progress: called with the progress of the measurement.
        say: called with why there are none.
        search: folder of the search.
    """
    profiler = Profiler(pipeline)
    if len(profiler.groups) < 2:
        return []
    seconds = profiler.expected_seconds()
    if seconds > AFFORDABLE_S:
        say(
            f"A sensitivity profile, which gives the search a good start, would take about {seconds / 60:.0f} min;"
            f" measure it once with: {command_line('profile', search=search)}"
        )
        return []
    precision = pipeline.space.precision.computed[-1]
    versions = greedy_versions(pipeline, profiler.run(progress))
    thresholds = (None, _THRESHOLD) if pipeline.space.thresholds.dimensions() else (None,)
    return [
        pipeline.space.uniform(1.0, precision, threshold) | {PREFIX + name: count for name, count in kept.items()}
        for _, kept in versions
        for threshold in thresholds
    ]


def greedy_versions(pipeline: CompressionPipeline, profile: Profile) -> list[tuple[float, dict[str, int]]]:
    """Returns greedy channels per group, each with its share of the dense network's FLOPs, as `(share, channels)`."""
    image = torch.from_numpy(pipeline.data.calibration.images[:1])
    flops = ScaledFlops(pipeline.network, pipeline.space.sparsity.groups, image)
    return [(flops.count(kept) / flops.count({}), kept) for kept in greedy_widths(profile, flops)]


def greedy_widths(profile: Profile, flops: ScaledFlops, shares: Sequence[float] = SHARES) -> list[dict[str, int]]:
    """Returns channels per group for each share of the dense FLOPs that can be reached.

    Starting from the dense network, the group with the least added divergence per FLOP saved is pruned to its next
    profiled width, again and again. Divergences are assumed to add up, after subtracting that of recovery alone.

    Args:
        profile: of the network.
        flops: of the network at any widths.
        shares: above 0, descending.
    """
    groups = profile.groups
    steps = dict.fromkeys(groups, 0)
    dense = flops.count({})
    widths: list[dict[str, int]] = []
    for share in shares:
        while flops.count(_channels(groups, steps)) > share * dense:
            name = _cheapest(groups, steps, flops, profile.floor)
            if name is None:
                return widths
            steps[name] += 1
        widths.append(_channels(groups, steps))
    return widths


def _channels(groups: Mapping[str, Sequence[Point]], steps: Mapping[str, int]) -> dict[str, int]:
    return {name: points[steps[name]].channels for name, points in groups.items()}


def _cheapest(
    groups: Mapping[str, Sequence[Point]], steps: Mapping[str, int], flops: ScaledFlops, floor: float
) -> str | None:
    """Returns the group whose next width adds the least divergence per FLOP saved; None if none is left."""
    now = flops.count(_channels(groups, steps))
    prices = {}
    for name, points in groups.items():
        if steps[name] + 1 < len(points):
            saved = now - flops.count(_channels(groups, {**steps, name: steps[name] + 1}))
            before = _due_to_pruning(points[steps[name]], floor)
            after = _due_to_pruning(points[steps[name] + 1], floor)
            prices[name] = max(after - before, 0.0) / max(saved, 1.0)
    return min(prices, key=lambda name: prices[name], default=None)


def _due_to_pruning(point: Point, floor: float) -> float:
    """Returns the part of a divergence that pruning causes."""
    return max(point.divergence - floor, 0.0)
