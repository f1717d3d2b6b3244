"""Builds a sampler's prior knowledge of a study, from the network, its target and its budget."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from evaluators.flops.pruned import ScaledFlops
from evaluators.measurement import Measurement
from search.config.budget import Budget
from search.config.objectives import Objectives
from search.pipeline.exit_thresholds import cost_target
from search.pipeline.pipeline import CompressionPipeline
from search.pipeline.sensitivity_profiler import Profiler
from search.results.pareto import reference_point
from search.results.sensitivity import Profile
from search.results.store import Baseline
from search.samplers.hypervolume.encoding import Array
from search.samplers.hypervolume.prior import CostTarget, LinearConstraint, NetworkStructure, ProblemPrior
from spaces import channels as sparsity
from spaces import depth, precision
from spaces import thresholds as gates
from spaces.depth import DepthSpace
from spaces.dynamic.exit_network import layer_name
from spaces.input_size import SIZE
from spaces.joint import JointSpace

_BITS = {"int8": 8, "int4": 4, "fp8": 4, "fp16": 11}
"""Significant bits of a weight in each precision."""
_TIMED = ("latency", "flops")
"""Costs that a network's structure tells roughly beforehand."""
_HALF_WIDTH = 0.3
"""Assumed change of the log-accuracy when half of all channels are pruned, used without a sensitivity profile."""
_ALL_BLOCKS = 0.3
"""The same when every block is left out that can be: after recovery, which measured damage knows nothing of."""
_ROUNDING = 10.0
"""Assumed change of the log-accuracy per relative power of the rounding noise of weights."""


def problem_prior(pipeline: CompressionPipeline, space: JointSpace, baseline: Baseline) -> ProblemPrior:
    """Returns the prior of a study; it uses a sensitivity profile if one was measured."""
    dense = baseline.evaluation.measurements
    structure = _structure(pipeline, space, baseline.reference_seconds, Profiler(pipeline).known)
    limits, objectives = pipeline.study.budget, pipeline.study.objectives
    worst = reference_point(limits, dense, _TIMED)
    return ProblemPrior(
        structure,
        _targets(pipeline, dense),
        _linear_constraints(limits, dense, objectives),
        pipeline.solves_thresholds,
        min(worst[metric] / dense[metric].value for metric in _TIMED),
    )


def _targets(pipeline: CompressionPipeline, dense: Mapping[str, Measurement]) -> tuple[CostTarget, ...]:
    objectives = pipeline.study.objectives
    worst = reference_point(pipeline.study.budget, dense, objectives)
    chance, limits = 1 / pipeline.data.classes, pipeline.study.budget
    return tuple(
        CostTarget(name, dense[name].value, worst[name], min(chance, worst[name]), cost_target(limits, name, dense))
        for name in objectives
    )


def _linear_constraints(
    budget: Budget, dense: Mapping[str, Measurement], objectives: Objectives
) -> dict[str, LinearConstraint]:
    """Returns limits on objectives as linear functions of the objectives, from the violations at two points."""
    constraints = {}
    for limit in budget.constraints:
        metric = limit.measured_as
        if metric not in objectives or not limit.limits_default_statistic:
            continue
        own = dense[metric]
        at_zero, at_own = (limit.violation(replace(own, value=value), own) for value in (0.0, own.value))
        slope = (at_own - at_zero) / own.value
        constraints[str(limit)] = LinearConstraint(objectives.index(metric), slope, at_zero)
    return constraints


def _structure(
    pipeline: CompressionPipeline, space: JointSpace, seconds: Mapping[str, float], profile: Profile | None
) -> NetworkStructure:
    image = torch.from_numpy(pipeline.data.calibration.images[:1])
    flops = ScaledFlops(pipeline.network, space.sparsity.groups, image)
    dimensions = space.dimensions()
    paths = {layer_name(path): path for path in flops.dense}
    layers = [name for name in space.precision.layers if name in paths]
    norms = [name for name in paths if name not in set(layers)]
    order = [paths[name] for name in (*layers, *norms)]
    searched = [group for group in space.sparsity.groups if sparsity.PREFIX + group.name in dimensions]
    columns = {group.name: column for column, group in enumerate(searched)}
    precision_names = [precision.PREFIX + name for name in layers]
    reference = next(iter(space.precision.precisions))
    exits = tuple(gates.PREFIX + name for name in space.thresholds.exits if gates.PREFIX + name in dimensions)
    exit_count = len(pipeline.network.exit_names) if pipeline.solves_thresholds else len(exits)
    depths = [pipeline.flops.exits_before(paths[name]) for name in layers]
    return NetworkStructure(
        channels=tuple(sparsity.PREFIX + group.name for group in searched),
        full=np.array([float(group.channels) for group in searched]),
        flops=np.array([flops.dense[path] for path in order]),
        inputs=np.stack([_shares_by_column(flops.shares(path, "in"), columns) for path in order]),
        outputs=np.stack([_shares_by_column(flops.shares(path, "out"), columns) for path in order]),
        precision=tuple(name if name in dimensions else None for name in precision_names),
        fixed=tuple(space.precision.allowed[name][0] for name in layers),
        speeds={
            name: seconds.get(name, seconds[reference]) / seconds[reference] for name in space.precision.precisions
        },
        exits=exits,
        exit_after=tuple(sum(depth <= number for depth in depths) for number in range(exit_count)),
        damage=_damage(pipeline, space, profile, {name: paths[name] for name in layers}),
        depth=tuple(space.depth.dimensions()),
        runs_from=_runs_from(space, order),
        size=SIZE if SIZE in dimensions else None,
        size_work=tuple((size / max(space.input_size.sizes)) ** 2 for size in space.input_size.sizes),
    )


def _runs_from(space: JointSpace, paths: Sequence[str]) -> Array:
    """Returns the fewest blocks that each dimension of depth keeps where a module runs, `(modules, D)`; 0 for any."""
    names = list(space.depth.dimensions())
    fewest = np.zeros((len(paths), len(names)))
    for stage in space.depth.stages:
        if depth.PREFIX + stage.name not in names:
            continue
        for number, block in enumerate(stage.leaving):
            inside = [path.startswith(f"trunk.{block}.") for path in paths]
            fewest[inside, names.index(depth.PREFIX + stage.name)] = len(stage.blocks) - number
    return fewest


def _shares_by_column(shares: Mapping[str, float], columns: Mapping[str, int]) -> Array:
    row = np.zeros(len(columns))
    for name, share in shares.items():
        if name in columns:
            row[columns[name]] = share
    return row


def _damage(
    pipeline: CompressionPipeline, space: JointSpace, profile: Profile | None, paths: Mapping[str, str]
) -> dict[str, tuple[float, ...]]:
    """Returns the estimated damage of each value of each dimension, from a profile, scores or rounding noise."""
    estimates: dict[str, tuple[float, ...]] = {}
    widths = space.sparsity.dimensions()
    for name, dimension in widths.items():
        group = name.removeprefix(sparsity.PREFIX)
        counts = range(dimension.low, dimension.high + 1, dimension.step)  # type: ignore[union-attr, arg-type]
        if profile is not None and group in profile.groups:
            points = sorted(profile.groups[group], key=lambda point: point.channels)
            costs = [max(point.divergence - profile.floor, 0.0) for point in points]
            measured_at = [point.channels for point in points]
            estimates[name] = tuple(float(np.interp(count, measured_at, costs)) for count in counts)
        else:
            weight = 4 * _HALF_WIDTH / len(widths)
            estimates[name] = tuple(weight * space.sparsity.lost(group, count) ** 2 for count in counts)
    estimates |= _depth_damage(space.depth)
    if SIZE in space.dimensions():
        largest = max(space.input_size.sizes)
        lost_pixels = [1 - (size / largest) ** 2 for size in space.input_size.sizes]
        estimates[SIZE] = tuple(4 * _HALF_WIDTH * lost**2 for lost in lost_pixels)
    weights = dict(pipeline.network.named_parameters())
    for name in space.precision.dimensions():
        layer = name.removeprefix(precision.PREFIX)
        if layer in paths:
            weight_of = weights[f"{paths[layer]}.weight"].detach()
            estimates[name] = tuple(
                _ROUNDING * _rounding_noise(weight_of, choice) for choice in space.precision.allowed[layer]
            )
    return estimates


def _depth_damage(space: DepthSpace) -> dict[str, tuple[float, ...]]:
    """Returns the estimated damage of each depth: measured damage tells blocks apart, not what recovery leaves of it.

    Left out without training, blocks cost hundreds of times what they do once weights have learnt to do without.
    """
    dimensions = space.dimensions()
    measured = {stage: (0.0, *stage.damage) for stage in space.stages if depth.PREFIX + stage.name in dimensions}
    total = sum(max(lost) for lost in measured.values()) or 1.0
    estimates = {}
    for stage, lost in measured.items():
        blocks = dimensions[depth.PREFIX + stage.name]
        kept = range(blocks.low, blocks.high + 1)
        estimates[depth.PREFIX + stage.name] = tuple(
            _ALL_BLOCKS * max(lost[len(stage.blocks) - count], 0.0) / total for count in kept
        )
    return estimates


def _rounding_noise(weight: Tensor, name: str) -> float:
    """Returns the power of the rounding noise of weights, with a scale per channel, relative to that of the weights."""
    if name not in _BITS:
        return 0.0
    flat = weight.flatten(1) if weight.ndim > 1 else weight[None]
    power = float((flat**2).mean())
    if name.startswith("fp"):
        return float(2.0 ** (-2 * _BITS[name]) / 3)
    step = flat.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / (2 ** (_BITS[name] - 1) - 1)
    return float(((flat - (flat / step).round() * step) ** 2).mean()) / max(power, 1e-12)
