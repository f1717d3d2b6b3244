"""What early exits save where their thresholds are solved inside of each evaluation.

The solver decides for each version anew where inputs leave. So mean costs jump between versions that are nearly equal,
and a model of the mean learns little. What an input costs that leaves at an exit does not jump: the layers before the
exit decide it. How many continue behind it follows from how far that cost is from the limit, and from what the version
loses. With `c` the costs of the paths in order, and `r` the rates at which inputs continue behind each exit, the mean
is

    c₀ + Σᵢ min(r₀, …, rᵢ₋₁) max(cᵢ - cᵢ₋₁, 0)

and a Gaussian process on top of it learns the rest.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from search.samplers.hypervolume.encoding import Array, Codec
from search.samplers.hypervolume.features import (
    FeatureMap,
    ScaledFeatures,
    damage_features,
    latency_features,
)
from search.samplers.hypervolume.gaussian_process import GaussianProcess, HeldOutErrors, fit_gp, held_out_errors
from search.samplers.hypervolume.observations import Observations
from search.samplers.hypervolume.prior import NetworkStructure, ProblemPrior

Function = Callable[[Array], Array]
"""Returns a number for each of some rows `(n, d)`, `(n,)`."""

LONGEST_PATH = "longest path"
"""What the model of the path that all layers are on is called."""
_OTHER_WEIGHT = 0.5
"""Of all features other than the distance to the limit."""
_FEWEST = 4
"""With fewer versions whose thresholds were solved, exits are not modelled."""


class LastResult:
    """A function that keeps its last result: several models ask for the same rows in turn.

    Args:
        function: of rows, which nobody changes in place.
    """

    def __init__(self, function: Function) -> None:
        self._function = function
        self._last: tuple[Array, Array] | None = None

    def __call__(self, rows: Array) -> Array:
        """Returns what the function returns for rows `(n, d)`."""
        if self._last is None or self._last[0] is not rows:
            self._last = rows, self._function(rows)
        return self._last[1]


@dataclass(frozen=True)
class PathLatency:
    """The seconds of one path through the network, `(n,)`, by the layers on it.

    Args:
        features: of rows, `(n, k)`.
        model: of the logarithm of the seconds.
    """

    features: FeatureMap
    model: GaussianProcess

    def __call__(self, rows: Array) -> Array:
        """Returns the seconds that are expected of rows `(n, d)`, `(n,)`."""
        return np.asarray(np.exp(self.model.means(self.features(rows))))


@dataclass(frozen=True)
class PathFlops:
    """The FLOPs of one path through the network, by the layers on it.

    Args:
        structure: of the whole network.
        codec: of the space.
        layers: how many, from the first one on, the path goes through.
        unit: what the sum over layers is multiplied by.
    """

    structure: NetworkStructure
    codec: Codec
    layers: int
    unit: float = 1.0

    def __call__(self, rows: Array) -> Array:
        """Returns the FLOPs of rows `(n, d)`, `(n,)`."""
        work = self.structure.work(self.codec, rows)[:, : self.layers].sum(axis=1)
        return np.asarray(self.unit * np.maximum(work, 1e-12))


@dataclass(frozen=True)
class ContinuationRate:
    """The share of the inputs that continues behind an exit.

    Args:
        features: of rows, `(n, k)`.
        model: of the share.
    """

    features: FeatureMap
    model: GaussianProcess

    def __call__(self, rows: Array) -> Array:
        """Returns the share that is expected of rows `(n, d)`, `(n,)`."""
        return np.asarray(np.clip(self.model.means(self.features(rows)), 0.0, 1.0))


@dataclass(frozen=True)
class ConstantRate:
    """The share of the inputs that continues behind an exit, where every version had the same."""

    share: float

    def __call__(self, rows: Array) -> Array:
        """Returns the share for each row, `(n,)`."""
        return np.full(len(rows), self.share)


@dataclass(frozen=True)
class Prediction:
    """A function of rows, and its leave-one-out predictions.

    Args:
        function: of rows `(n, d)`.
        held_out: what it comes to for each measured row if that is left out, `(n,)`; NaN where it was not fitted to it.
    """

    function: Function
    held_out: Array


@dataclass(frozen=True)
class MeanCost:
    """The mean cost over inputs: that of the first path, and for those that continue what each next one costs more.

    Args:
        paths: the cost of each path.
        rates: for every path but the first, the share of the inputs that continues to it.
    """

    paths: Sequence[Function]
    rates: Sequence[Function]

    def __call__(self, rows: Array) -> Array:
        """Returns the mean cost that is expected of rows `(n, d)`, `(n,)`."""
        return mean_cost([path(rows) for path in self.paths], [rate(rows) for rate in self.rates])


def mean_cost(costs: Sequence[Array], rates: Sequence[Array]) -> Array:
    """Returns the mean cost over inputs, see the top of this module.

    Args:
        costs: of each path, `(n,)` each.
        rates: at which inputs continue to every path but the first, `(n,)` each.
    """
    total = costs[0]
    continuing = np.ones_like(total)
    for before, after, rate in zip(costs, costs[1:], rates, strict=False):
        continuing = np.minimum(continuing, rate)
        total = total + continuing * np.maximum(after - before, 0.0)
    return total


@dataclass(frozen=True)
class ExitCosts:
    """What exits leave of costs.

    Args:
        means: of the cost over inputs, for some objectives by their index.
        distance: features: how far paths are from what is aimed at.
        features: all that decides on costs, `distance` included.
        errors: of the model of the longest path, on what was held out, by name.
    """

    means: Mapping[int, Prediction]
    distance: FeatureMap
    features: FeatureMap
    errors: Mapping[str, HeldOutErrors]


def fit_exit_costs(observations: Observations, prior: ProblemPrior, codec: Codec) -> ExitCosts | None:
    """Returns what exits leave of costs; None where too few thresholds were solved.

    Args:
        observations: what was measured.
        prior: of a study whose thresholds are solved.
        codec: of its space.
    """
    shares = observations.exit_shares
    solved = int((~np.isnan(shares)).all(axis=1).sum())
    if shares.shape[1] < 2 or solved < _FEWEST:
        return None
    paths, errors = {}, {}
    for objective, costs in observations.path_costs.items():
        if prior.objectives[objective].kind == "flops":
            paths[objective] = _path_flops(observations.rows, costs, prior.structure, codec)
        else:
            paths[objective], errors[LONGEST_PATH] = _path_latencies(observations.rows, costs, prior.structure, codec)
    distance = distance_to_limit(
        {objective: [path.function for path in predicted] for objective, predicted in paths.items()}, prior, codec
    )
    features = _exit_features(distance, prior.structure, codec)
    rates = continuation_rates(observations.rows, shares, features)
    means = {objective: _mean(predicted, rates) for objective, predicted in paths.items()}
    return ExitCosts(means, distance, features, errors)


def _path_latencies(
    rows: Array, costs: Array, structure: NetworkStructure, codec: Codec
) -> tuple[list[Prediction], HeldOutErrors]:
    """Returns the seconds of each path, from the layers on it, and the error of the longest one's.

    Args:
        rows: `(n, d)`.
        costs: the seconds of each path, `(n, paths)`; NaN where no thresholds were solved.
        structure: of the network.
        codec: of the space.
    """
    predictions = []
    for layers, seconds in zip((*structure.exit_after, structure.layers), costs.T, strict=True):
        features = latency_features(structure.first(layers), codec)
        known = ~np.isnan(seconds)
        model = fit_gp(features(rows[known]), np.log(seconds[known]), np.ones(int(known.sum())))
        held_out = np.full(len(rows), np.nan)
        held_out[known] = np.exp(model.left_out_means)
        predictions.append(Prediction(LastResult(PathLatency(features, model)), held_out))
    return predictions, held_out_errors(model.kernel.form, held_out[known], seconds[known])


def _path_flops(rows: Array, costs: Array, structure: NetworkStructure, codec: Codec) -> list[Prediction]:
    """Returns the FLOPs of each path, in the unit of what was counted.

    Args:
        rows: `(n, d)`.
        costs: the FLOPs of each path, `(n, paths)`; NaN where no thresholds were solved.
        structure: of the network.
        codec: of the space.
    """
    predictions = []
    for layers, counted in zip((*structure.exit_after, structure.layers), costs.T, strict=True):
        unit = float(np.nanmedian(counted / PathFlops(structure, codec, layers)(rows)))
        function = LastResult(PathFlops(structure, codec, layers, unit))
        predictions.append(Prediction(function, function(rows)))
    return predictions


def distance_to_limit(paths: Mapping[int, Sequence[Function]], prior: ProblemPrior, codec: Codec) -> FeatureMap:
    """Returns features of how far paths lie beyond what is aimed at, and how far within, as logarithms.

    Args:
        paths: the cost of each path, by the index of the objective.
        prior: knows what is aimed at.
        codec: of the space.
    """
    aimed = [(path, prior.objectives[objective].aimed_at) for objective, costs in paths.items() for path in costs]
    limited = [(path, aimed_at) for path, aimed_at in aimed if np.isfinite(aimed_at)]

    def blocks(rows: Array) -> list[Array]:
        distances = [np.log(path(rows) / aimed_at) for path, aimed_at in limited]
        columns = [part for log in distances for part in (np.maximum(log, 0.0), np.minimum(log, 0.0))]
        return [np.stack(columns, axis=1) if columns else np.zeros((len(rows), 0))]

    return ScaledFeatures.fit(blocks, (1.0,), codec, (0,))


def _exit_features(distance: FeatureMap, structure: NetworkStructure, codec: Codec) -> FeatureMap:
    """Returns the distance to the limit, and features of what a version costs and loses without exits."""
    costs, damages = latency_features(structure, codec), damage_features(structure, codec)
    return LastResult(
        lambda rows: np.concatenate(
            [distance(rows), _OTHER_WEIGHT * costs(rows), _OTHER_WEIGHT * damages(rows)], axis=1
        )
    )


def continuation_rates(rows: Array, shares: Array, features: FeatureMap) -> list[Prediction]:
    """Returns the share of the inputs that continues behind each exit.

    Args:
        rows: that were measured, `(n, d)`.
        shares: of the inputs that leave at each exit and, last, go to the end, `(n, exits + 1)`; NaN where no
            thresholds were solved.
        features: of rows.
    """
    known = ~np.isnan(shares).any(axis=1)
    measured, predictions = features(rows[known]), []
    for exit_ in range(shares.shape[1] - 1):
        continuing = shares[known, exit_ + 1 :].sum(axis=1)
        held_out = np.full(len(rows), np.nan)
        if np.ptp(continuing) == 0:
            held_out[known] = continuing
            predictions.append(Prediction(ConstantRate(continuing[0]), held_out))
            continue
        model = fit_gp(measured, continuing, np.ones(len(continuing)))
        held_out[known] = np.clip(model.left_out_means, 0.0, 1.0)
        predictions.append(Prediction(LastResult(ContinuationRate(features, model)), held_out))
    return predictions


def _mean(paths: Sequence[Prediction], rates: Sequence[Prediction]) -> Prediction:
    function = MeanCost([path.function for path in paths], [rate.function for rate in rates])
    return Prediction(function, mean_cost([path.held_out for path in paths], [rate.held_out for rate in rates]))


def concatenate(first: FeatureMap, second: FeatureMap) -> FeatureMap:
    """Returns the features of both, `(n, k + l)`."""
    return lambda rows: np.concatenate([first(rows), second(rows)], axis=1)
