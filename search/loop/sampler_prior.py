"""What a study's dimensions, objectives and limits mean to a sampler: from the network, its target and its budget."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from evaluators.flops.pruned import ScaledFlops
from evaluators.measurement import Measurement
from search.config.budget import Budget
from search.pipeline.exit_thresholds import aimed
from search.pipeline.sensitivity_profiler import Profiler
from search.pipeline.workbench import Workbench
from search.results.pareto import OBJECTIVES, worst_that_counts
from search.results.sensitivity import Profile
from search.results.store import Baseline
from search.samplers.hypervolume.encoding import Array
from search.samplers.hypervolume.prior import Aim, Kind, Link, Meaning, Structure
from spaces import channels as sparsity
from spaces import precision
from spaces import thresholds as gates
from spaces.dynamic.exit_network import layer_name
from spaces.joint import JointSpace

_BITS = {"int8": 8, "int4": 4, "fp8": 4, "fp16": 11}
"""Of a weight's precision: rounding moves it by half of the last one."""
_HALF_WIDTH = 0.3
"""Without a profile, half of all channels are taken to cost so much of the logarithm of accuracy."""
_ROUNDING = 10.0
"""And noise in weights so many times its share of their power."""


def meaning_of(bench: Workbench, space: JointSpace, baseline: Baseline) -> Meaning:
    """Returns what a sampler may know of a study beforehand; a sensitivity profile where one was measured."""
    dense = baseline.evaluation.measurements
    structure = _structure(bench, space, baseline.reference_seconds, Profiler(bench).known)
    return Meaning(structure, _aims(bench, dense), _links(bench.study.budget, dense), bench.has_gates)


def _aims(bench: Workbench, dense: Mapping[str, Measurement]) -> tuple[Aim, ...]:
    worst = worst_that_counts(bench.study.budget, dense)
    kinds: Mapping[str, Kind] = {"accuracy": "accuracy", "latency": "latency", "flops": "flops"}
    chance, limits = 1 / bench.data.classes, bench.study.budget
    return tuple(
        Aim(kinds[name], dense[name].value, worst[name], min(chance, worst[name]), aimed(limits, name, dense))
        for name in OBJECTIVES
    )


def _links(budget: Budget, dense: Mapping[str, Measurement]) -> dict[str, Link]:
    """Returns how limits on objectives follow from them: they are straight lines, so two points tell them."""
    found = {}
    for limit in budget.constraints:
        metric = limit.measured_as
        if metric not in OBJECTIVES or not limit.limits_default_statistic:
            continue
        own = dense[metric]
        at = [limit.violation(replace(own, value=value), own) for value in (0.0, own.value)]
        slope = (at[1] - at[0]) / own.value
        found[str(limit)] = Link(OBJECTIVES.index(metric), slope, at[0])
    return found


def _structure(bench: Workbench, space: JointSpace, seconds: Mapping[str, float], profile: Profile | None) -> Structure:
    image = torch.from_numpy(bench.data.calibration.images[:1])
    flops = ScaledFlops(bench.network, space.sparsity.groups, image)
    dimensions = space.dimensions()
    paths = {layer_name(path): path for path in flops.dense}
    layers = [name for name in space.precision.layers if name in paths]
    norms = [name for name in paths if name not in set(layers)]
    order = [paths[name] for name in (*layers, *norms)]
    free = [group for group in space.sparsity.groups if sparsity.PREFIX + group.name in dimensions]
    columns = {group.name: place for place, group in enumerate(free)}
    chosen = [precision.PREFIX + name for name in layers]
    reference = next(iter(space.precision.precisions))
    exits = tuple(gates.PREFIX + name for name in space.gates.exits if gates.PREFIX + name in dimensions)
    ways = len(bench.network.exit_names) if bench.has_gates else len(exits)
    depths = [bench.flops.exits_before(paths[name]) for name in layers]
    return Structure(
        channels=tuple(sparsity.PREFIX + group.name for group in free),
        full=np.array([float(group.channels) for group in free]),
        flops=np.array([flops.dense[path] for path in order]),
        inputs=np.stack([_row(flops.shares(path, "in"), columns) for path in order]),
        outputs=np.stack([_row(flops.shares(path, "out"), columns) for path in order]),
        precision=tuple(name if name in dimensions else None for name in chosen),
        fixed=tuple(space.precision.allowed[name][0] for name in layers),
        speeds={
            name: seconds.get(name, seconds[reference]) / seconds[reference] for name in space.precision.precisions
        },
        exits=exits,
        exit_after=tuple(sum(depth <= number for depth in depths) for number in range(ways)),
        damage=_damage(bench, space, profile, {name: paths[name] for name in layers}),
    )


def _row(shares: Mapping[str, float], columns: Mapping[str, int]) -> Array:
    row = np.zeros(len(columns))
    for name, share in shares.items():
        if name in columns:
            row[columns[name]] = share
    return row


def _damage(
    bench: Workbench, space: JointSpace, profile: Profile | None, paths: Mapping[str, str]
) -> dict[str, tuple[float, ...]]:
    """Returns estimates for each value of each dimension: widths from a profile or scores, precisions from rounding."""
    found: dict[str, tuple[float, ...]] = {}
    widths = space.sparsity.dimensions()
    for name, dimension in widths.items():
        group = name.removeprefix(sparsity.PREFIX)
        counts = range(dimension.low, dimension.high + 1, dimension.step)  # type: ignore[union-attr, arg-type]
        if profile is not None and group in profile.groups:
            points = sorted(profile.groups[group], key=lambda point: point.channels)
            costs = [max(point.divergence - profile.floor, 0.0) for point in points]
            found[name] = tuple(float(np.interp(count, [p.channels for p in points], costs)) for count in counts)
        else:
            weight = 4 * _HALF_WIDTH / len(widths)
            found[name] = tuple(weight * space.sparsity.lost(group, count) ** 2 for count in counts)
    weights = dict(bench.network.named_parameters())
    for name in space.precision.dimensions():
        layer = name.removeprefix(precision.PREFIX)
        if layer in paths:
            weight_of = weights[f"{paths[layer]}.weight"].detach()
            found[name] = tuple(_ROUNDING * _noise(weight_of, each) for each in space.precision.allowed[layer])
    return found


def _noise(weight: Tensor, name: str) -> float:
    """Returns the share of the power of weights that rounding to a precision adds as noise, channel by channel."""
    if name not in _BITS:
        return 0.0
    flat = weight.flatten(1) if weight.ndim > 1 else weight[None]
    power = float((flat**2).mean())
    if name.startswith("fp"):
        return float(2.0 ** (-2 * _BITS[name]) / 3)
    step = flat.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / (2 ** (_BITS[name] - 1) - 1)
    return float(((flat - (flat / step).round() * step) ** 2).mean()) / max(power, 1e-12)
