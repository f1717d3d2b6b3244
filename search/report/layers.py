"""The layers of versions as data: channels, precision and pattern, for tables, heat maps and axes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from search.report.describe import kept_share
from search.results.pareto import Version
from spaces.candidate import Candidate

LEFT_OUT = "left out"
"""What stands for a layer whose block a version lacks."""

MAX_COLUMNS = 40
"""The maximum number of versions in a heat map."""


@dataclass(frozen=True)
class Layer:
    """One layer of one version.

    Args:
        name: its path in the network.
        kept: number of output channels that it keeps; None if unknown, 0 if its block is left out.
        of: number of output channels in the dense network; None if unknown.
        precision: empty if it is not a dimension of the space, or if its exit or block is not part of the version.
        pattern: of zeros; empty without.
    """

    name: str
    kept: int | None
    of: int | None
    precision: str
    pattern: str

    def __str__(self) -> str:
        if self.kept == 0:
            return LEFT_OUT
        channels = "" if self.kept is None else f"{self.kept}/{self.of}"
        return " ".join(part for part in (channels, self.precision, self.pattern) if part) or "-"


def layers_of(candidate: Candidate, dense: Candidate, members: Mapping[str, str]) -> list[Layer]:
    """Returns the layers of a candidate, in the network's order.

    Args:
        candidate: the version.
        dense: the dense network, which names every layer.
        members: the group of channels of each layer's output; a layer with the name of its group needs no entry.
    """
    names = dict.fromkeys([*dense.precision, *dense.channels])
    return [_layer(name, members.get(name, name), candidate, dense) for name in names]


def _layer(name: str, group: str, candidate: Candidate, dense: Candidate) -> Layer:
    inactive = set(candidate.thresholds.exits) - set(candidate.active_exits)
    is_absent = candidate.lacks(name) or any(name.startswith(f"exits.{exit_}.") for exit_ in inactive)
    return Layer(
        name,
        0 if candidate.lacks(name) else candidate.channels.get(group),
        dense.channels.get(group),
        "" if is_absent else candidate.precision.get(name, ""),
        candidate.patterns.get(name, ""),
    )


@dataclass(frozen=True)
class HeatMap:
    """Channels and precisions of several versions.

    Args:
        versions: the columns, the fastest first.
        groups: the rows of `kept`.
        layers: the rows of `precision`.
        kept: channels, `(groups, versions)`.
        share: kept share of the dense network's channels, `(groups, versions)`.
        precision: names, `(layers, versions)`; empty for a layer that is not part of the version.
    """

    versions: tuple[Version, ...]
    groups: tuple[str, ...]
    layers: tuple[str, ...]
    kept: NDArray[np.int64]
    share: NDArray[np.float64]
    precision: list[list[str]]

    @property
    def precisions(self) -> list[str]:
        """The precisions that occur, in order of first occurrence."""
        return list(dict.fromkeys(name for row in self.precision for name in row if name))


def heat_map(versions: Sequence[Version], dense: Version) -> HeatMap:
    """Returns the heat map of versions; if there are more than `MAX_COLUMNS`, of evenly spaced ones."""
    chosen = [versions[index] for index in _spread(len(versions), MAX_COLUMNS)]
    whole = dense.evaluation.candidate
    candidates = [version.evaluation.candidate for version in chosen]
    kept = np.array(
        [[0 if each.lacks(name) else each.channels[name] for each in candidates] for name in whole.channels],
        dtype=np.int64,
    )
    kept = kept.reshape(len(whole.channels), len(chosen))
    of = np.array(list(whole.channels.values()), dtype=np.float64).reshape(-1, 1)
    layers = [layers_of(candidate, whole, {}) for candidate in candidates]
    names = list(whole.precision)
    columns = [{layer.name: layer.precision for layer in version_layers} for version_layers in layers]
    precision = [[column[name] for column in columns] for name in names]
    return HeatMap(tuple(chosen), tuple(whole.channels), tuple(names), kept, kept / of, precision)


def _spread(count: int, maximum: int) -> list[int]:
    """Returns evenly spaced indices, including the first and the last."""
    return sorted({round(position) for position in np.linspace(0, count - 1, min(count, maximum))}) if count else []


@dataclass(frozen=True)
class Axis:
    """One axis of the parallel coordinates.

    Args:
        title: with its unit.
        values: one for each version.
    """

    title: str
    values: tuple[float, ...]


def parallel_axes(versions: Sequence[Version], dense: Version) -> list[Axis]:
    """Returns the axes of the parallel coordinates: accuracy, costs, and the degree of each kind of compression."""
    whole = dense.evaluation.candidate

    def axis(title: str, *values: float) -> Axis:
        return Axis(title, values)

    measured = [version.measured for version in versions]
    candidates = [version.evaluation.candidate for version in versions]
    axes = [
        axis("accuracy, %", *(metrics["accuracy"].value * 100 for metrics in measured)),
        axis("latency, ms", *(metrics["latency"].value * 1e3 for metrics in measured)),
        axis("FLOPs, %", *(metrics["flops"].value / dense.measured["flops"].value * 100 for metrics in measured)),
        axis("size, MB", *(metrics["size"].value / 1e6 for metrics in measured)),
        axis("channels, %", *(kept_share(candidate, whole) * 100 for candidate in candidates)),
        axis("lower bits, %", *(_lowered(candidate, whole) * 100 for candidate in candidates)),
    ]
    if any(candidate.removed_blocks for candidate in candidates):
        axes.append(axis("blocks left out", *(float(len(candidate.removed_blocks)) for candidate in candidates)))
    if whole.thresholds.exits:
        axes.append(axis("early exits, %", *(sum(leaving_shares(version)) * 100 for version in versions)))
    return axes


def _lowered(candidate: Candidate, dense: Candidate) -> float:
    """Returns the share of the layers that run in another precision than the dense network's."""
    layers = candidate.precision.items()
    return sum(name != dense.precision[layer] for layer, name in layers) / max(len(candidate.precision), 1)


def leaving_shares(version: Version) -> list[float]:
    """Returns the share of inputs that each exit of the network answers, 0 for exits that the version lacks."""
    shares = version.measured["accuracy"].notes
    active = version.evaluation.candidate.active_exits
    by_name = {name: shares.get(f"exit{number}", 0.0) for number, name in enumerate(active, 1)}
    return [by_name.get(name, 0.0) for name in version.evaluation.candidate.thresholds.exits]
