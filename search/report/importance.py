"""Which layers cost accuracy, and which buy latency: from everything that a search measured, not only its front."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.results.pareto import Version
from search.samplers.hypervolume.gaussian_process import GaussianProcess, fit_gp, held_out_errors
from spaces.candidate import Candidate

IMPORTANCE = "What layers cost and buy"
"""The heading of what tells it."""
LEAST = 20
"""So many versions have to be measured before layers can be told apart."""
_TRIED = 3
"""A precision of a layer counts where so many versions have it."""
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Effect:
    """What one change comes to, on average over the versions that were measured.

    Args:
        name: of a group of channels or a layer.
        change: what is changed against the dense network: `4 of 16 channels`, `int8`.
        accuracy: what it adds, 0 to 1; negative where it costs some.
        latency: what it adds to the longest path, as a share of the dense network's latency.
    """

    name: str
    change: str
    accuracy: float
    latency: float


@dataclass(frozen=True)
class Importance:
    """The effects of all changes, those that buy most latency first.

    Args:
        effects: one for each group of channels, and for each layer and precision.
        accuracy_r2: share of the variance of what was held out that the surrogate of accuracy tells.
        latency_r2: the same of latency.
    """

    effects: tuple[Effect, ...]
    accuracy_r2: float
    latency_r2: float

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready copy."""
        return asdict(self)


def importance(versions: Sequence[Version], dense: Version) -> Importance | None:
    """Returns what each layer costs and buys; None where too little was measured.

    A surrogate tells every version with the change and without it, and all else as it was: partial dependence.
    Source: Friedman, Greedy Function Approximation: A Gradient Boosting Machine, 2001, section 8.2.

    Args:
        versions: that were measured; those that broke a limit before their accuracy was known tell of latency alone.
        dense: the dense network.
    """
    complete = [version for version in versions if version.is_complete]
    timed = [version for version in versions if "latency" in version.measured]
    if len(complete) < LEAST:
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
            _effect(accuracy_model, accuracies, places, then),
            _effect(latency_model, latencies, places, then),
        )
        for name, change, places, then in columns.changes()
    ]
    return Importance(
        tuple(sorted(effects, key=lambda effect: effect.latency)),
        held_out_errors("", accuracy_model.left_out_means, accuracy).r2,
        held_out_errors("", latency_model.left_out_means, latency).r2,
    )


def _longest(version: Version) -> float:
    """Returns the seconds of the longest path: those of the mean tell of exits, too."""
    latency = version.measured["latency"]
    return latency.others.get("worst", latency.value)


def _effect(model: GaussianProcess, rows: Array, places: Sequence[int], then: Sequence[float]) -> float:
    """Returns by how much, on average over rows, what is told differs with `then` in some columns from zeros there."""
    changed, usual = rows.copy(), rows.copy()
    changed[:, places], usual[:, places] = then, 0.0
    return float((model.means(changed) - model.means(usual)).mean())


@dataclass(frozen=True)
class _Columns:
    """Columns that are 0 in the dense network: the share of channels that is lost, its square, and lower precisions.

    Args:
        full: the channels of each group.
        least: the fewest that any version kept.
        lower: layers and precisions other than the dense network's.
    """

    full: Mapping[str, int]
    least: Mapping[str, int]
    lower: Sequence[tuple[str, str]]

    @classmethod
    def of(cls, candidates: Sequence[Candidate], dense: Candidate) -> "_Columns":
        """Returns columns for what was tried: groups that lost channels, precisions that several versions have."""
        least = {name: min(each.channels[name] for each in candidates) for name in dense.channels}
        tried = Counter((layer, name) for each in candidates for layer, name in each.precision.items())
        lower = [(layer, name) for layer, name in tried if name != dense.precision.get(layer)]
        return cls(
            {name: count for name, count in dense.channels.items() if least[name] < count},
            least,
            sorted(each for each in lower if tried[each] >= _TRIED),
        )

    def rows(self, versions: Sequence[Version]) -> Array:
        """Returns the columns of versions, `(n, 2 groups + lower)`."""
        found = []
        for version in versions:
            candidate = version.evaluation.candidate
            lost = [1 - candidate.channels[name] / count for name, count in self.full.items()]
            chosen = [float(candidate.precision.get(layer) == name) for layer, name in self.lower]
            found.append([*lost, *(share**2 for share in lost), *chosen])
        return np.array(found, dtype=np.float64).reshape(len(found), -1)

    def changes(self) -> Iterator[tuple[str, str, list[int], list[float]]]:
        """Yields each group and layer, in words what is changed, the columns that tell it, and what is in them then."""
        count = len(self.full)
        for place, (name, full) in enumerate(self.full.items()):
            lost = 1 - self.least[name] / full
            yield name, f"{self.least[name]} of {full} channels", [place, count + place], [lost, lost**2]
        for place, (layer, name) in enumerate(self.lower):
            yield layer, name, [2 * count + place], [1.0]
