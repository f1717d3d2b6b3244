"""What trials of a study came to, as a sampler reads them: rows, objectives to minimize, constraints."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from search.samplers.hypervolume.encoding import Array, Codec
from search.samplers.hypervolume.prior import Link

_TOLD = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True)
class Observed:
    """What is known: `n` rows, `m` objectives.

    Args:
        rows: what was tried, `(n, d)`.
        costs: objectives, less being better, `(n, m)`; NaN where it was not measured.
        constraints: of each name the values, `(n,)`, feasible at or below 0; NaN where it was not measured.
        limits: from constraints that are functions of an objective: the highest cost that keeps them all, `(m,)`.
        pending: rows that are being tried, `(k, d)`.
        spent: rows that nobody has to try again, failed ones included, `(l, d)`.
        linked: the constraints that are functions of an objective.
        leaving: the shares of the inputs that leave at each exit whose threshold was solved and, last, go to the end,
            `(n, exits + 1)`; NaN where there is none of them, no exits where there never is.
        ways: for some objectives, by their place, what an input costs that does, in the same shape.
    """

    rows: Array
    costs: Array
    constraints: Mapping[str, Array]
    limits: Array
    pending: Array
    spent: Array
    linked: frozenset[str]
    leaving: Array
    ways: Mapping[int, Array]

    @property
    def excess(self) -> Array:
        """How far each row oversteps its constraints, in sum, `(n,)`; what was not measured is not counted."""
        total = np.zeros(len(self.rows))
        for values in self.constraints.values():
            total += np.where(np.isnan(values), 0.0, np.maximum(values, 0.0))
        return total

    @property
    def is_whole(self) -> NDArray[np.bool_]:
        """Whether all objectives and constraints of a row were measured, `(n,)`."""
        known = ~np.isnan(self.costs).any(axis=1)
        for values in self.constraints.values():
            known &= ~np.isnan(values)
        return np.asarray(known)

    @property
    def is_feasible(self) -> NDArray[np.bool_]:
        """Whether a row was measured in full and keeps every constraint, `(n,)`."""
        return np.logical_and(self.is_whole, self.excess <= 0)


def observe(
    trials: Sequence[FrozenTrial],
    codec: Codec,
    directions: Sequence[StudyDirection],
    links: Mapping[str, Link],
    metrics: Sequence[str] = (),
) -> Observed:
    """Returns what the trials of a study came to.

    Args:
        trials: in any state; those without a value for some dimension are left out.
        codec: of the dimensions.
        directions: of the objectives.
        links: from constraints to objectives, where they are known; else they are noticed.
        metrics: the objectives by the names that trials keep their measurements under; none where they keep none.
    """
    usable = [trial for trial in trials if all(name in trial.params for name in codec.names)]
    told = [trial for trial in usable if trial.state in _TOLD and _is_finite(trial)]
    records = {trial.number: trial.user_attrs["evaluation"] for trial in trials if "evaluation" in trial.user_attrs}
    rows = codec.encode([trial.params for trial in told])
    signs = np.array([-1.0 if direction == StudyDirection.MAXIMIZE else 1.0 for direction in directions])
    costs = np.full((len(told), len(signs)), np.nan)
    evaluations = [
        trial.user_attrs.get("evaluation") or records.get(trial.user_attrs.get("duplicate_of", -1), {})
        for trial in told
    ]
    for place, (trial, evaluation) in enumerate(zip(told, evaluations, strict=True)):
        if metrics:  # a trial that broke a limit was told without values, and yet some were measured or estimated
            measured = evaluation.get("measurements", {})
            costs[place] = signs * [measured.get(metric, {}).get("value", np.nan) for metric in metrics]
        if trial.state == TrialState.COMPLETE:
            costs[place] = signs * np.array(trial.values)
    names = dict.fromkeys(name for trial in told for name in trial.constraints)
    constraints = {
        name: np.array([trial.constraints.get(name, np.nan) for trial in told], dtype=np.float64) for name in names
    }
    found = {name: links.get(name) or _noticed(costs * signs, values) for name, values in constraints.items()}
    limits = _read_links(costs, signs, constraints, found)
    pending = codec.encode([trial.params for trial in usable if trial.state == TrialState.RUNNING])
    spent = codec.encode([trial.params for trial in usable if trial.state != TrialState.WAITING])
    linked = frozenset(name for name, link in found.items() if link is not None)
    return Observed(rows, costs, constraints, limits, pending, spent, linked, *_gates(evaluations, metrics))


def _gates(evaluations: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> tuple[Array, dict[int, Array]]:
    """Returns at which exits inputs leave, and what that costs, as evaluations tell it whose thresholds were solved."""
    told = [evaluation.get("gates") or {} for evaluation in evaluations]
    exits = max((len(each["shares"]) for each in told if "ways" in each), default=0)
    unknown = [np.nan] * exits
    leaving = np.array([each["shares"] if "ways" in each else unknown for each in told], dtype=np.float64)
    names = {metric for each in told for metric in each.get("ways", ())}
    ways = {
        place: np.array([each.get("ways", {}).get(metric, unknown) for each in told], dtype=np.float64)
        for place, metric in enumerate(metrics)
        if metric in names
    }
    return leaving.reshape(len(told), exits), ways


def _is_finite(trial: FrozenTrial) -> bool:
    values = [*(trial.values or ()), *trial.constraints.values()] if trial.state == TrialState.COMPLETE else []
    return bool(np.isfinite(values).all())


def _noticed(values: Array, constraint: Array) -> Link | None:
    """Returns the objective that a constraint is a straight line over; None where there is none."""
    for objective in range(values.shape[1]):
        both = ~np.isnan(values[:, objective]) & ~np.isnan(constraint)
        x, y = values[both, objective], constraint[both]
        if len(np.unique(x)) < 4:
            continue
        slope, offset = np.polyfit(x, y, 1)
        if slope != 0 and np.abs(slope * x + offset - y).max() <= 1e-9 * max(1.0, float(np.ptp(y))):
            return Link(objective, float(slope), float(offset))
    return None


def _read_links(
    costs: Array, signs: Array, constraints: Mapping[str, Array], links: Mapping[str, Link | None]
) -> Array:
    """Returns the highest allowed costs, and fills in, in place, objectives that a constraint tells."""
    limits = np.full(costs.shape[1], np.inf)
    for name, link in links.items():
        if link is None:
            continue
        objective, sign = link.objective, signs[link.objective]
        if link.slope * sign > 0:  # what is worse breaks it
            limits[objective] = min(limits[objective], sign * -link.offset / link.slope)
        told = sign * (constraints[name] - link.offset) / link.slope
        missing = np.isnan(costs[:, objective])
        costs[missing, objective] = told[missing]
    return limits
