"""What the trials of a study came to, as a sampler reads them: rows, objectives to minimize, constraints."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from search.samplers.hypervolume.encoding import Array, Codec
from search.samplers.hypervolume.prior import LinearConstraint

_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
_FEWEST_VALUES = 4
"""With so many different values on one straight line, a constraint is taken to be linear in an objective."""


@dataclass(frozen=True)
class TrialObservation:
    """What was measured in one trial.

    Args:
        values: of the objectives, in the study's directions, `(m,)`; NaN where one was not measured, None where none
            was.
        exit_shares: the shares of the inputs that leave at each exit whose threshold was solved and, last, go to the
            end; empty where no thresholds were solved.
        path_costs: what an input costs that does, by the index of the objective, each as long as `exit_shares`.
    """

    values: Sequence[float] | None
    exit_shares: Sequence[float] = ()
    path_costs: Mapping[int, Sequence[float]] = field(default_factory=dict)


ObservesTrials = Callable[[Sequence[FrozenTrial]], list[TrialObservation]]
"""Returns, for all trials of a study, what was measured in each of them."""


def observe_values(trials: Sequence[FrozenTrial]) -> list[TrialObservation]:
    """Returns the values of completed trials, and nothing of all others: what is known of any study."""
    return [TrialObservation(trial.values if trial.state == TrialState.COMPLETE else None) for trial in trials]


@dataclass(frozen=True)
class Observations:
    """What is known: `n` rows, `m` objectives.

    Args:
        rows: what was tried, `(n, d)`.
        costs: objectives, less being better, `(n, m)`; NaN where it was not measured.
        constraints: of each name the values, `(n,)`, feasible at or below 0; NaN where it was not measured.
        limits: from constraints that are functions of an objective: the highest cost that keeps them all, `(m,)`;
            infinite where there is none.
        pending: rows that are being tried, `(k, d)`.
        tried: rows that need not be tried again, failed ones included, `(l, d)`.
        linear: the names of the constraints that are functions of an objective.
        exit_shares: the shares of the inputs that leave at each exit whose threshold was solved and, last, go to the
            end, `(n, exits + 1)`; NaN in rows without any, no columns where no row has any.
        path_costs: for some objectives, by their index, what an input costs that does, in the same shape.
    """

    rows: Array
    costs: Array
    constraints: Mapping[str, Array]
    limits: Array
    pending: Array
    tried: Array
    linear: frozenset[str]
    exit_shares: Array
    path_costs: Mapping[int, Array]

    @property
    def violations(self) -> Array:
        """The sum of each row's violated constraints, `(n,)`; one that was not measured is not counted."""
        total = np.zeros(len(self.rows))
        for values in self.constraints.values():
            total += np.where(np.isnan(values), 0.0, np.maximum(values, 0.0))
        return total

    @property
    def is_complete(self) -> NDArray[np.bool_]:
        """Whether all objectives and constraints of a row were measured, `(n,)`."""
        known = ~np.isnan(self.costs).any(axis=1)
        for values in self.constraints.values():
            known &= ~np.isnan(values)
        return np.asarray(known)

    @property
    def is_feasible(self) -> NDArray[np.bool_]:
        """Whether a row was measured in full and keeps every constraint, `(n,)`."""
        return np.logical_and(self.is_complete, self.violations <= 0)


def read_observations(
    trials: Sequence[FrozenTrial],
    codec: Codec,
    directions: Sequence[StudyDirection],
    linear_constraints: Mapping[str, LinearConstraint],
    observe: ObservesTrials = observe_values,
) -> Observations:
    """Returns what the trials of a study came to.

    Args:
        trials: in any state; those without a value for some dimension are left out.
        codec: of the dimensions.
        directions: of the objectives.
        linear_constraints: those that are known to be functions of an objective; others are noticed.
        observe: reads what was measured in trials; it may know more than their values.
    """
    signs = np.array([-1.0 if direction == StudyDirection.MAXIMIZE else 1.0 for direction in directions])
    usable = [trial for trial in trials if all(name in trial.params for name in codec.names)]
    finished = [trial for trial in usable if trial.state in _FINISHED and _is_finite(trial)]
    observation_of = {id(trial): observation for trial, observation in zip(trials, observe(trials), strict=True)}
    observed = [observation_of[id(trial)] for trial in finished]
    costs = np.full((len(observed), len(signs)), np.nan)
    for index, observation in enumerate(observed):
        if observation.values is not None:
            costs[index] = signs * observation.values
    constraints = _constraints_of(finished)
    linear = {
        name: linear_constraints.get(name) or _as_linear(costs * signs, values) for name, values in constraints.items()
    }
    limits = _apply_linear_constraints(costs, signs, constraints, linear)
    exit_shares, path_costs = _exits_of(observed)
    return Observations(
        rows=codec.encode([trial.params for trial in finished]),
        costs=costs,
        constraints=constraints,
        limits=limits,
        pending=codec.encode([trial.params for trial in usable if trial.state == TrialState.RUNNING]),
        tried=codec.encode([trial.params for trial in usable if trial.state != TrialState.WAITING]),
        linear=frozenset(name for name, constraint in linear.items() if constraint is not None),
        exit_shares=exit_shares,
        path_costs=path_costs,
    )


def _is_finite(trial: FrozenTrial) -> bool:
    values = [*(trial.values or ()), *trial.constraints.values()] if trial.state == TrialState.COMPLETE else []
    return bool(np.isfinite(values).all())


def _constraints_of(trials: Sequence[FrozenTrial]) -> dict[str, Array]:
    """Returns the values of each constraint, `(n,)`; NaN where a trial has none."""
    names = dict.fromkeys(name for trial in trials for name in trial.constraints)
    return {name: np.array([trial.constraints.get(name, np.nan) for trial in trials], dtype=float) for name in names}


def _exits_of(observed: Sequence[TrialObservation]) -> tuple[Array, dict[int, Array]]:
    """Returns `exit_shares` and `path_costs` of `Observations`."""
    paths = max((len(observation.exit_shares) for observation in observed), default=0)
    unknown = [np.nan] * paths
    shares = np.array([observation.exit_shares or unknown for observation in observed], dtype=np.float64)
    objectives = sorted({objective for observation in observed for objective in observation.path_costs})
    costs = {
        objective: np.array(
            [observation.path_costs.get(objective, unknown) for observation in observed], dtype=np.float64
        )
        for objective in objectives
    }
    return shares.reshape(len(observed), paths), costs


def _as_linear(values: Array, constraint: Array) -> LinearConstraint | None:
    """Returns the objective of which a constraint is a linear function; None where there is none."""
    for objective in range(values.shape[1]):
        known = ~np.isnan(values[:, objective]) & ~np.isnan(constraint)
        x, y = values[known, objective], constraint[known]
        if len(np.unique(x)) < _FEWEST_VALUES:
            continue
        slope, offset = np.polyfit(x, y, 1)
        if slope != 0 and np.abs(slope * x + offset - y).max() <= 1e-9 * max(1.0, float(np.ptp(y))):
            return LinearConstraint(objective, float(slope), float(offset))
    return None


def _apply_linear_constraints(
    costs: Array, signs: Array, constraints: Mapping[str, Array], linear: Mapping[str, LinearConstraint | None]
) -> Array:
    """Returns the highest allowed costs `(m,)`, and fills in, in place, objectives that a constraint implies."""
    limits = np.full(costs.shape[1], np.inf)
    for name, constraint in linear.items():
        if constraint is None:
            continue
        objective = constraint.objective
        sign = signs[objective]
        if constraint.slope * sign > 0:  # a higher cost breaks it
            limits[objective] = min(limits[objective], sign * -constraint.offset / constraint.slope)
        implied = sign * (constraints[name] - constraint.offset) / constraint.slope
        missing = np.isnan(costs[:, objective])
        costs[missing, objective] = implied[missing]
    return limits
