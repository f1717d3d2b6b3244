"""What is expected of rows that nobody measured: a model for each objective, and for each other constraint."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from search.samplers.hypervolume.encoding import Array, Codec
from search.samplers.hypervolume.exit_costs import ExitCosts, Function, concatenate, fit_exit_costs
from search.samplers.hypervolume.features import FeatureMap, damage_features, generic_features, latency_features
from search.samplers.hypervolume.gaussian_process import GaussianProcess, HeldOutErrors, fit_gp, held_out_errors
from search.samplers.hypervolume.observations import Observations
from search.samplers.hypervolume.outcome_transforms import (
    OutcomeTransform,
    damage_transform,
    identity_transform,
    log_transform,
    relative_transform,
)
from search.samplers.hypervolume.prior import NetworkStructure, ProblemPrior

_EXACT = 0.003
"""A formula that predicts all measurements up to a factor, within this share of them, needs no Gaussian process."""
_ENOUGH_ERRORS = 8
"""With fewer held-out errors nobody can say that a model is uninformative."""

ModelKey = int | str
"""What a model is of: the index of an objective, or the name of a constraint or of a part of an objective's model."""


@dataclass(frozen=True)
class Posterior:
    """What is expected of one cost, transformed.

    Args:
        transform: of the cost.
        features: what the Gaussian process sees of rows.
        mean_function: the prior mean, transformed, None where it is 0; the Gaussian process is of what it leaves.
        gp: of what is left; None where nothing is, or nothing was measured.
        constant: what is left where there is no Gaussian process.
        constant_std: the standard deviation then.
        error: on what was held out; None where there is no Gaussian process.
    """

    transform: OutcomeTransform
    features: FeatureMap
    mean_function: Function | None
    gp: GaussianProcess | None
    constant: float
    constant_std: float
    error: HeldOutErrors | None

    def means(self, rows: Array) -> Array:
        """Returns posterior means of rows `(n, d)`, transformed, `(n,)`."""
        prior_means = self.mean_function(rows) if self.mean_function else np.zeros(len(rows))
        if self.gp is None:
            return prior_means + self.constant
        return prior_means + self.gp.means(self.features(rows))

    def draw(self, rng: np.random.Generator) -> Function:
        """Returns a function of rows drawn from the posterior, transformed."""
        if self.gp is None:
            return self.means
        sample, mean_function = self.gp.draw(rng), self.mean_function
        return lambda rows: sample(self.features(rows)) + (mean_function(rows) if mean_function else 0.0)

    def means_and_stds(self, rows: Array) -> tuple[Array, Array]:
        """Returns means and standard deviations of a measurement of rows `(n, d)`, transformed, `(n,)` each.

        A measurement has noise of its own, which counts: versions are feasible, or not, as they are measured.
        """
        prior_means = self.mean_function(rows) if self.mean_function else np.zeros(len(rows))
        if self.gp is None:
            return prior_means + self.constant, np.full(len(rows), self.constant_std)
        means, stds = self.gp.means_and_stds(self.features(rows))
        noise = self.gp.noise_factor * self.transform.noise_std(prior_means + means)
        return prior_means + means, np.hypot(stds, noise)


@dataclass(frozen=True)
class Functions:
    """Functions of rows `(n, d)` for objectives, transformed, and for constraints that are no functions of them."""

    objectives: tuple[Function, ...]
    constraints: tuple[Function, ...]


@dataclass(frozen=True)
class Posteriors:
    """What is expected of all objectives, and of the constraints that are no functions of one.

    Args:
        objectives: `m` posteriors.
        constraints: by name.
        part_errors: held-out errors of what posteriors are built on, by name.
    """

    objectives: tuple[Posterior, ...]
    constraints: Mapping[str, Posterior]
    part_errors: Mapping[str, HeldOutErrors] = field(default_factory=dict)

    @property
    def means(self) -> Functions:
        """The posterior means."""
        return Functions(
            tuple(posterior.means for posterior in self.objectives),
            tuple(posterior.means for posterior in self.constraints.values()),
        )

    def draw(self, rng: np.random.Generator) -> Functions:
        """Returns a function for each objective and constraint, drawn from its posterior."""
        return Functions(
            tuple(posterior.draw(rng) for posterior in self.objectives),
            tuple(posterior.draw(rng) for posterior in self.constraints.values()),
        )

    def transformed(self, costs: Array) -> Array:
        """Returns costs `(n, m)` transformed; what is infinite or NaN stays so."""
        columns = zip(self.objectives, costs.T, strict=True)
        return np.stack([posterior.transform.forward_or_keep(column) for posterior, column in columns], axis=1)

    def untransformed(self, values: Array) -> Array:
        """Returns the costs of transformed values `(n, m)`, `(n, m)`."""
        columns = zip(self.objectives, values.T, strict=True)
        return np.stack([posterior.transform.inverse(column) for posterior, column in columns], axis=1)

    @property
    def errors(self) -> dict[ModelKey, HeldOutErrors]:
        """The errors on what was held out, of those models that have any."""
        posteriors: list[tuple[ModelKey, Posterior]] = [*enumerate(self.objectives), *self.constraints.items()]
        return {key: posterior.error for key, posterior in posteriors if posterior.error} | dict(self.part_errors)

    @property
    def are_uninformative(self) -> bool:
        """Whether most models predict next to nothing of what they were not fitted to.

        One that predicts nothing expects the mean, as uncertain as it should be; accuracies that are nearly all equal
        are no reason to give up what is known of latency.
        """
        bad = [
            error.count >= _ENOUGH_ERRORS and error.spearman < 0.2 and error.r2 < 0.1 for error in self.errors.values()
        ]
        return 2 * sum(bad) > len(bad)


def fit_models(observations: Observations, codec: Codec, prior: ProblemPrior | None) -> Posteriors:
    """Returns a posterior of everything that was measured.

    Args:
        observations: of `n` rows.
        codec: of the space.
        prior: what is known of the problem; None where nothing is.
    """
    exit_costs = fit_exit_costs(observations, prior, codec) if prior is not None and prior.solves_thresholds else None
    objectives = []
    for index, costs in enumerate(observations.costs.T):
        model = _model_of_objective(index, observations.rows, costs, codec, prior)
        if exit_costs is not None:
            model = _with_exit_costs(index, model, exit_costs)
        objectives.append(_fit(observations.rows, costs, model))
    constraints = {
        name: _fit(observations.rows, values, _model_of_constraint(values, codec, prior))
        for name, values in observations.constraints.items()
        if name not in observations.linear
    }
    return Posteriors(tuple(objectives), constraints, exit_costs.errors if exit_costs else {})


@dataclass(frozen=True)
class _Model:
    """How one cost is modelled.

    Args:
        transform: of it.
        features: what its Gaussian process sees.
        mean_function: the prior mean, transformed; None where it is 0.
        held_out_means: where the prior mean was fitted to the measurements: what it comes to for each measured row if
            that is left out, `(n,)`, NaN where it was not fitted to it. None where it was fitted to none.
    """

    transform: OutcomeTransform
    features: FeatureMap
    mean_function: Function | None = None
    held_out_means: Array | None = None

    def prior_means(self, rows: Array, known: NDArray[np.bool_]) -> Array:
        """Returns the prior means of the measured rows, `(known,)`.

        Args:
            rows: `(n, d)`.
            known: which of them were measured, `(n,)`.
        """
        if self.mean_function is None:
            return np.zeros(int(known.sum()))
        means = self.mean_function(rows[known])
        if self.held_out_means is None:
            return means
        held_out = self.held_out_means[known]
        return np.where(np.isnan(held_out), means, held_out)


def _model_of_objective(index: int, rows: Array, costs: Array, codec: Codec, prior: ProblemPrior | None) -> _Model:
    """Returns how an objective is modelled by what is known of it, but for exits whose thresholds are solved."""
    if prior is None:
        return _Model(identity_transform(costs[~np.isnan(costs)]), generic_features(codec))
    target, structure = prior.objectives[index], prior.structure
    if target.kind == "accuracy":
        transform = damage_transform(target)
        mean_function = _scaled_estimates(rows, costs, transform, structure, codec)
        return _Model(transform, damage_features(structure, codec), mean_function)
    if target.kind == "latency":
        return _Model(relative_transform(), latency_features(structure, codec))
    if target.kind in ("params", "size"):
        return _Model(log_transform(), latency_features(structure, codec))
    return _Model(
        log_transform(),
        latency_features(structure, codec),
        lambda rows: np.log(np.maximum(structure.work(codec, rows).sum(axis=1), 1e-12)),
    )


def _with_exit_costs(index: int, model: _Model, exit_costs: ExitCosts) -> _Model:
    """Returns how an objective is modelled behind exits whose thresholds are solved.

    Args:
        index: of the objective.
        model: how it would be with thresholds that are dimensions.
        exit_costs: what exits leave of costs.
    """
    if index not in exit_costs.means:
        return replace(model, features=concatenate(exit_costs.distance, model.features))
    mean = exit_costs.means[index]
    return _Model(log_transform(), exit_costs.features, lambda rows: np.log(mean.function(rows)), np.log(mean.held_out))


def _scaled_estimates(
    rows: Array, costs: Array, transform: OutcomeTransform, structure: NetworkStructure, codec: Codec
) -> Callable[[Array], Array] | None:
    """Returns the sum of estimated damages, scaled to what was measured; None where there are no estimates.

    The factor is that of a ridge regression whose prior is 1: one measurement that agrees with the estimates as they
    are speaks for their own unit.
    """
    if not structure.damage:
        return None
    known = ~np.isnan(costs)
    measured = transform.forward(costs[known])
    estimated = structure.estimated_damage(codec, rows[known]).sum(axis=1)
    precisions = 1 / transform.noise_std(measured) ** 2
    ridge = 0.1 * float((precisions * estimated**2).mean()) if len(estimated) else 1.0
    factor = ((precisions * estimated * measured).sum() + ridge) / ((precisions * estimated**2).sum() + ridge)
    return lambda rows: factor * structure.estimated_damage(codec, rows).sum(axis=1)


def _model_of_constraint(values: Array, codec: Codec, prior: ProblemPrior | None) -> _Model:
    """Returns how a constraint that follows from no objective is modelled."""
    features = generic_features(codec) if prior is None else latency_features(prior.structure, codec)
    return _Model(identity_transform(np.abs(values[~np.isnan(values)])), features)


def _fit(rows: Array, costs: Array, model: _Model) -> Posterior:
    """Returns the posterior of one cost.

    Args:
        rows: `(n, d)`.
        costs: of them, `(n,)`; NaN where it was not measured.
        model: how it is modelled.
    """
    transform, mean_function = model.transform, model.mean_function
    known: NDArray[np.bool_] = ~np.isnan(costs)
    measured = transform.forward(costs[known])
    residuals = measured - model.prior_means(rows, known)
    if len(residuals) < 2 or np.ptp(residuals) == 0 or (mean_function and np.std(residuals) < _EXACT):
        constant = float(residuals.mean()) if len(residuals) else 0.0
        std = _EXACT if len(residuals) > 1 else 1.0
        return Posterior(transform, model.features, mean_function, None, constant, std, None)
    gp = fit_gp(model.features(rows[known]), residuals, transform.noise_std(measured))
    predicted = transform.inverse(gp.left_out_means + (measured - residuals))
    error = held_out_errors(gp.kernel.form, predicted, costs[known])
    return Posterior(transform, model.features, mean_function, gp, 0.0, 0.0, error)
