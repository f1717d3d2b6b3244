"""Effects of each layer's channels and precision on accuracy and latency, from all versions of a search."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.results.pareto import Version
from search.samplers.hypervolume.gaussian_process import GaussianProcess, fit_gp, held_out_errors
from spaces.candidate import Candidate

IMPORTANCE = "Effect of each layer"
"""Heading of the table and the picture."""
MIN_VERSIONS = 20
"""The minimum number of fully measured versions."""
_MIN_WITH_PRECISION = 3
"""The minimum number of versions with a layer in a precision, to estimate its effect."""
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Effect:
    """The effect of one change, averaged over the measured versions.

    Args:
        name: of a group of channels or a layer.
        change: against the dense network: `4 of 16 channels`, `int8`.
        accuracy: change of the accuracy, 0.01 being one point.
        latency: change of the longest path's latency, as a share of the dense network's.
    """

    name: str
    change: str
    accuracy: float
    latency: float


@dataclass(frozen=True)
class Importance:
    """The effects of all changes, those that reduce latency most first.

    Args:
        effects: one for each group of channels, and for each layer and precision.
        accuracy_r2: R² of the accuracy surrogate on held-out versions.
        latency_r2: R² of the latency surrogate on held-out versions.
    """

    effects: tuple[Effect, ...]
    accuracy_r2: float
    latency_r2: float

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready copy."""
        return asdict(self)


def importance(versions: Sequence[Version], dense: Version) -> Importance | None:
    """Returns the effects of each layer; None if fewer than `MIN_VERSIONS` versions were fully measured.

    A surrogate predicts every version with the change and without it, all else being equal (partial dependence).
    Source: Friedman, Greedy Function Approximation: A Gradient Boosting Machine, 2001, section 8.2.

    Args:
        versions: measured ones; those without accuracy contribute to latency alone.
        dense: the dense network.
    """
    complete = [version for version in versions if version.is_complete]
    timed = [version for version in versions if "latency" in version.measured]
    if len(complete) < MIN_VERSIONS:
        return None
    columns = _Columns.of([version.evaluation.candidate for version in complete], dense.evaluation.candidate)
    accuracy = np.array([version.measured["accuracy"].value for version in complete])
    latency = np.array([_longest(version) for version in timed]) / dense.measured["latency"].value
    accuracies, latencies = columns.rows(complete), columns.rows(timed)
    accuracy_model = fit_gp(accuracies, accuracy, np.ones_like(accuracy))
    latency_model = fit_gp(latencies, latency, latency)
    effects = [
        Effect(
            name,
            change,
            _effect(accuracy_model, accuracies, indices, values),
            _effect(latency_model, latencies, indices, values),
        )
        for name, change, indices, values in columns.changes()
    ]
    return Importance(
        tuple(sorted(effects, key=lambda effect: effect.latency)),
        held_out_errors("", accuracy_model.left_out_means, accuracy).r2,
        held_out_errors("", latency_model.left_out_means, latency).r2,
    )


def _longest(version: Version) -> float:
    """Returns the seconds of the longest path, because the mean also depends on exits."""
    latency = version.measured["latency"]
    return latency.others.get("worst", latency.value)


def _effect(model: GaussianProcess, rows: Array, columns: Sequence[int], values: Sequence[float]) -> float:
    """Returns the mean difference of predictions with `values` and with zeros in some columns."""
    changed, unchanged = rows.copy(), rows.copy()
    changed[:, columns] = values
    unchanged[:, columns] = 0.0
    return float((model.means(changed) - model.means(unchanged)).mean())


@dataclass(frozen=True)
class _Columns:
    """Features that are 0 for the dense network: the share of pruned channels, its square, and lower precisions.

    Args:
        full: number of channels of each group.
        least: the smallest number that any version keeps.
        lower: pairs of a layer and a precision other than the dense network's.
    """

    full: Mapping[str, int]
    least: Mapping[str, int]
    lower: Sequence[tuple[str, str]]

    @classmethod
    def of(cls, candidates: Sequence[Candidate], dense: Candidate) -> "_Columns":
        """Returns columns for the groups that were pruned, and the precisions that several versions have."""
        least = {name: min(each.channels[name] for each in candidates) for name in dense.channels}
        tried = Counter((layer, name) for each in candidates for layer, name in each.precision.items())
        lower = [(layer, name) for layer, name in tried if name != dense.precision.get(layer)]
        return cls(
            {name: count for name, count in dense.channels.items() if least[name] < count},
            least,
            sorted(each for each in lower if tried[each] >= _MIN_WITH_PRECISION),
        )

    def rows(self, versions: Sequence[Version]) -> Array:
        """Returns the features of versions, `(n, 2 * groups + lower)`."""
        rows = []
        for version in versions:
            candidate = version.evaluation.candidate
            lost = [1 - candidate.channels[name] / count for name, count in self.full.items()]
            chosen = [float(candidate.precision.get(layer) == name) for layer, name in self.lower]
            rows.append([*lost, *(share**2 for share in lost), *chosen])
        return np.array(rows, dtype=np.float64).reshape(len(rows), -1)

    def changes(self) -> Iterator[tuple[str, str, list[int], list[float]]]:
        """Yields for each change: the group or layer, the change as text, the columns, and their values."""
        count = len(self.full)
        for index, (name, full) in enumerate(self.full.items()):
            lost = 1 - self.least[name] / full
            yield name, f"{self.least[name]} of {full} channels", [index, count + index], [lost, lost**2]
        for index, (layer, name) in enumerate(self.lower):
            yield layer, name, [2 * count + index], [1.0]
