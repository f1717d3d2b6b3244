"""What each layer of a version became, as data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from search.report.describe import kept_share
from search.results.pareto import Version
from spaces.candidate import Candidate

COLUMNS = 40
"""A heat map shows at most so many versions."""


@dataclass(frozen=True)
class Layer:
    """One layer of one version.

    Args:
        name: its path in the network.
        kept: output channels that it keeps; None where nothing says.
        of: the dense layer's.
        precision: it runs in; empty where it is no choice, or where its exit is not part of the version.
        pattern: of its zeros; empty where it is dense.
    """

    name: str
    kept: int | None
    of: int | None
    precision: str
    pattern: str

    def __str__(self) -> str:
        channels = "" if self.kept is None else f"{self.kept}/{self.of}"
        return " ".join(part for part in (channels, self.precision, self.pattern) if part) or "-"


def layers_of(candidate: Candidate, dense: Candidate, members: Mapping[str, str]) -> list[Layer]:
    """Returns what each layer of a candidate became, in the network's order.

    Args:
        candidate: the version.
        dense: the dense network, which names every layer.
        members: the group of channels that each layer's output belongs to; a layer that gives a group its name needs
            no entry.
    """
    names = dict.fromkeys([*dense.precision, *dense.channels])
    return [_layer(name, members.get(name, name), candidate, dense) for name in names]


def _layer(name: str, group: str, candidate: Candidate, dense: Candidate) -> Layer:
    inactive = set(candidate.exits) - set(candidate.active_exits)
    is_left_out = any(name.startswith(f"exits.{exit_}.") for exit_ in inactive)
    return Layer(
        name,
        candidate.channels.get(group),
        dense.channels.get(group),
        "" if is_left_out else candidate.precision.get(name, ""),
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
        share: of the dense network's channels, `(groups, versions)`.
        precision: names, `(layers, versions)`; empty where a layer is not part of the version.
    """

    versions: tuple[Version, ...]
    groups: tuple[str, ...]
    layers: tuple[str, ...]
    kept: NDArray[np.int64]
    share: NDArray[np.float64]
    precision: list[list[str]]

    @property
    def precisions(self) -> list[str]:
        """The precisions that occur, in order of their first."""
        return list(dict.fromkeys(name for row in self.precision for name in row if name))


def heat_map(versions: Sequence[Version], dense: Version) -> HeatMap:
    """Returns the heat map of some versions; of more than `COLUMNS` an even choice, the first and the last among it."""
    chosen = [versions[index] for index in _spread(len(versions), COLUMNS)]
    whole = dense.evaluation.candidate
    candidates = [version.evaluation.candidate for version in chosen]
    kept = np.array([[each.channels[name] for each in candidates] for name in whole.channels], dtype=np.int64)
    kept = kept.reshape(len(whole.channels), len(chosen))
    of = np.array(list(whole.channels.values()), dtype=np.float64).reshape(-1, 1)
    layers = [layers_of(each, whole, {}) for each in candidates]
    names = list(whole.precision)
    found = [{layer.name: layer.precision for layer in some} for some in layers]
    precision = [[each[name] for each in found] for name in names]
    return HeatMap(tuple(chosen), tuple(whole.channels), tuple(names), kept, kept / of, precision)


def _spread(count: int, most: int) -> list[int]:
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, most))}) if count else []


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
    """Returns the axes of the parallel coordinates: costs, accuracy, and how far each kind of compression went."""
    whole = dense.evaluation.candidate

    def axis(title: str, *values: float) -> Axis:
        return Axis(title, values)

    measured = [version.measured for version in versions]
    candidates = [version.evaluation.candidate for version in versions]
    found = [
        axis("accuracy, %", *(each["accuracy"].value * 100 for each in measured)),
        axis("latency, ms", *(each["latency"].value * 1e3 for each in measured)),
        axis("FLOPs, %", *(each["flops"].value / dense.measured["flops"].value * 100 for each in measured)),
        axis("size, MB", *(each["size"].value / 1e6 for each in measured)),
        axis("channels, %", *(kept_share(each, whole) * 100 for each in candidates)),
        axis("lower bits, %", *(_lowered(each, whole) * 100 for each in candidates)),
    ]
    if whole.exits:
        found.append(axis("leave early, %", *(sum(left(version)) * 100 for version in versions)))
    return found


def _lowered(candidate: Candidate, dense: Candidate) -> float:
    """Returns the share of the layers that run in another precision than the dense network's."""
    layers = candidate.precision.items()
    return sum(name != dense.precision[layer] for layer, name in layers) / max(len(candidate.precision), 1)


def left(version: Version) -> list[float]:
    """Returns the share of the inputs that leaves at each exit of the network, 0 where a version lacks it."""
    shares = version.measured["accuracy"].notes
    active = version.evaluation.candidate.active_exits
    by_name = {name: shares.get(f"exit{place}", 0.0) for place, name in enumerate(active, 1)}
    return [by_name.get(name, 0.0) for name in version.evaluation.candidate.exits]
