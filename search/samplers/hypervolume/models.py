"""What is expected of rows that nobody measured: one surrogate for each objective, and for each other constraint."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from search.samplers.hypervolume.encoding import Array, Codec
from search.samplers.hypervolume.exit_costs import Savings, beside, savings
from search.samplers.hypervolume.features import Columns, of_damage, of_latency, plain
from search.samplers.hypervolume.gaussian_process import HeldOut, Surrogate, fit, held_out
from search.samplers.hypervolume.observations import Observed
from search.samplers.hypervolume.prior import Aim, Meaning, Structure

_EXACT = 0.003
"""A formula that tells all measurements up to a factor, within this share of it, needs no surrogate."""


@dataclass(frozen=True)
class Scale:
    """An increasing function of a cost, in which what layers add is a sum.

    Args:
        forward: from costs, less being better.
        back: to them.
        doubts: how far off a measurement may be, from its place on the scale, in any unit.
    """

    forward: Callable[[Array], Array]
    back: Callable[[Array], Array]
    doubts: Callable[[Array], Array]


def damage_scale(aim: Aim) -> Scale:
    """Returns the logarithm of what is left of accuracy above chance: damages of layers multiply what is left."""
    span = aim.dense - aim.chance

    def forward(costs: Array) -> Array:
        return np.asarray(-np.log(np.maximum((-costs - aim.chance) / span, 0.02)))

    def back(places: Array) -> Array:
        return np.asarray(-(aim.chance + span * np.exp(-places)))

    return Scale(forward, back, lambda places: 0.03 + np.maximum(places, 0.0))


def relative_scale() -> Scale:
    """Returns costs as they are, told to within a share of them."""
    return Scale(lambda costs: costs, lambda places: places, lambda places: np.maximum(np.abs(places), 1e-12))


def logarithmic_scale() -> Scale:
    """Returns logarithms of costs."""
    return Scale(lambda costs: np.log(np.maximum(costs, 1e-12)), np.exp, np.ones_like)


def plain_scale(costs: Array) -> Scale:
    """Returns costs as they are; the better ones are told with more care."""
    low, middle = np.quantile(costs, (0.05, 0.5)) if len(costs) else (0.0, 1.0)
    span = max(float(middle - low), 1e-12)
    return Scale(lambda costs: costs, lambda places: places, lambda p: 1 + 2 * np.maximum((p - middle) / span, 0.0))


@dataclass(frozen=True)
class Belief:
    """What is expected of one cost, on its scale.

    Args:
        scale: of the cost.
        features: what the surrogate looks at.
        formula: what is known exactly, on the scale; added to what the surrogate tells.
        surrogate: of what is left; None where nothing is, or nothing was measured.
        constant: what is left where there is no surrogate.
        doubt: the standard deviation then.
        error: on what was held out; None where there is no surrogate.
    """

    scale: Scale
    features: Columns
    formula: Callable[[Array], Array] | None
    surrogate: Surrogate | None
    constant: float
    doubt: float
    error: HeldOut | None

    def means(self, rows: Array) -> Array:
        """Returns what is expected, on the scale, `(n,)`."""
        known = self.formula(rows) if self.formula else np.zeros(len(rows))
        if self.surrogate is None:
            return known + self.constant
        return known + self.surrogate.means(self.features(rows))

    def draw(self, rng: np.random.Generator) -> Callable[[Array], Array]:
        """Returns one of the functions of rows that agree with what was measured, on the scale."""
        if self.surrogate is None:
            return self.means
        drawn, formula = self.surrogate.draw(rng), self.formula
        return lambda rows: drawn(self.features(rows)) + (formula(rows) if formula else 0.0)

    def means_and_deviations(self, rows: Array) -> tuple[Array, Array]:
        """Returns what a measurement is expected to be, and its standard deviation, `(n,)` each.

        The deviation is that of a measurement, with its own error: versions are feasible, or not, as they are measured.
        """
        known = self.formula(rows) if self.formula else np.zeros(len(rows))
        if self.surrogate is None:
            return known + self.constant, np.full(len(rows), self.doubt)
        means, deviations = self.surrogate.means_and_deviations(self.features(rows))
        errors = self.surrogate.error * self.scale.doubts(known + means)
        return known + means, np.hypot(deviations, errors)


@dataclass(frozen=True)
class Functions:
    """Functions of rows for objectives, on their scales, and for constraints that are no functions of them."""

    objectives: tuple[Callable[[Array], Array], ...]
    others: tuple[Callable[[Array], Array], ...]


@dataclass(frozen=True)
class Beliefs:
    """What is expected of all objectives, and of the constraints that are no functions of one."""

    objectives: tuple[Belief, ...]
    others: Mapping[str, Belief]
    parts: Mapping[str, HeldOut] = field(default_factory=dict)
    """Errors of what surrogates are built on."""

    @property
    def expected(self) -> Functions:
        """What is expected of rows."""
        return Functions(
            tuple(belief.means for belief in self.objectives), tuple(belief.means for belief in self.others.values())
        )

    def draw(self, rng: np.random.Generator) -> Functions:
        """Returns functions of rows that agree with what was measured, each drawn at random."""
        return Functions(
            tuple(belief.draw(rng) for belief in self.objectives),
            tuple(belief.draw(rng) for belief in self.others.values()),
        )

    @property
    def errors(self) -> dict[str, HeldOut]:
        """The errors on what was held out, by `objective 0` or the constraint."""
        named = {f"objective {place}": belief.error for place, belief in enumerate(self.objectives)}
        found = {**named, **{name: belief.error for name, belief in self.others.items()}}
        return {name: error for name, error in found.items() if error is not None} | dict(self.parts)

    @property
    def are_bad(self) -> bool:
        """Whether most surrogates tell next to nothing of what they were not fitted to.

        One that tells nothing expects the mean, in doubt as it should be; accuracies that are nearly all alike are no
        reason to give up what is known of latency.
        """
        bad = [error.count >= 8 and error.spearman < 0.2 and error.r2 < 0.1 for error in self.errors.values()]
        return 2 * sum(bad) > len(bad)


def believe(observed: Observed, codec: Codec, meaning: Meaning | None) -> Beliefs:
    """Returns surrogates of everything that was measured."""
    saved = savings(observed, meaning, codec) if meaning is not None and meaning.is_solved else None
    objectives = []
    for place in range(observed.costs.shape[1]):
        costs = observed.costs[:, place]
        look = _look(place, observed.rows, costs, codec, meaning)
        if saved is not None:
            look = _look_behind_exits(place, look, saved)
        objectives.append(_belief(observed.rows, costs, look))
    others = {
        name: _belief(observed.rows, values, _look_at_constraint(values, codec, meaning))
        for name, values in observed.constraints.items()
        if name not in observed.linked
    }
    return Beliefs(tuple(objectives), others, saved.errors if saved else {})


@dataclass(frozen=True)
class _Look:
    """How a cost is looked at.

    Args:
        scale: of it.
        columns: what its surrogate sees.
        formula: what is known, on the scale; None where nothing is.
        told: what the formula comes to for the rows that were measured, where it was fitted to them: each left out in
            turn, and NaN where it was not. None where it was not fitted.
    """

    scale: Scale
    columns: Columns
    formula: Callable[[Array], Array] | None = None
    told: Array | None = None

    def known(self, rows: Array, some: NDArray[np.bool_]) -> Array:
        """Returns what is known of some rows, `(k,)`."""
        if self.formula is None:
            return np.zeros(int(some.sum()))
        found = self.formula(rows[some])
        return found if self.told is None else np.where(np.isnan(self.told[some]), found, self.told[some])


def _look_behind_exits(place: int, usual: _Look, saved: Savings) -> _Look:
    """Returns how an objective is looked at: `usual` is how it would be with thresholds that are dimensions."""
    if place not in saved.means:
        return replace(usual, columns=beside(saved.near, usual.columns))
    mean = saved.means[place]
    return _Look(logarithmic_scale(), saved.columns, lambda rows: np.log(mean.function(rows)), np.log(mean.held_out))


def _look(place: int, rows: Array, costs: Array, codec: Codec, meaning: Meaning | None) -> _Look:
    """Returns how one objective is looked at: its scale, its columns, and the formula for it where there is one."""
    if meaning is None:
        return _Look(plain_scale(costs[~np.isnan(costs)]), plain(codec))
    aim, structure = meaning.aims[place], meaning.structure
    if aim.kind == "accuracy":
        scale = damage_scale(aim)
        return _Look(scale, of_damage(structure, codec), _estimate(rows, costs, scale, structure, codec))
    if aim.kind == "latency":
        return _Look(relative_scale(), of_latency(structure, codec))
    return _Look(
        logarithmic_scale(),
        of_latency(structure, codec),
        lambda rows: np.log(np.maximum(structure.work(codec, rows).sum(axis=1), 1e-12)),
    )


def _estimate(
    rows: Array, costs: Array, scale: Scale, structure: Structure, codec: Codec
) -> Callable[[Array], Array] | None:
    """Returns the estimates' sum in the unit of what was measured; None where there are no estimates.

    One measurement that agrees with the estimates as they are speaks for their own unit.
    """
    if not structure.damage:
        return None
    known = ~np.isnan(costs)
    measured, told = scale.forward(costs[known]), structure.estimated_damage(codec, rows[known]).sum(axis=1)
    weights = 1 / scale.doubts(measured) ** 2
    usual = 0.1 * float((weights * told**2).mean()) if len(told) else 1.0
    factor = ((weights * told * measured).sum() + usual) / ((weights * told**2).sum() + usual)
    return lambda rows: factor * structure.estimated_damage(codec, rows).sum(axis=1)


def _look_at_constraint(values: Array, codec: Codec, meaning: Meaning | None) -> _Look:
    """Returns how a constraint that follows from no objective is looked at."""
    columns = plain(codec) if meaning is None else of_latency(meaning.structure, codec)
    return _Look(plain_scale(np.abs(values[~np.isnan(values)])), columns)


def _belief(rows: Array, costs: Array, look: _Look) -> Belief:
    scale = look.scale
    features = look.columns
    formula = look.formula
    known: NDArray[np.bool_] = ~np.isnan(costs)
    places = scale.forward(costs[known])
    left = places - look.known(rows, known)
    if len(left) < 2 or np.ptp(left) == 0 or (formula and np.std(left) < _EXACT):
        constant = float(left.mean()) if len(left) else 0.0
        doubt = _EXACT if len(left) > 1 else 1.0
        return Belief(scale, features, formula, None, constant, doubt, None)
    surrogate = fit(features(rows[known]), left, scale.doubts(places))
    predicted = surrogate.predicted + (places - left)
    error = held_out(surrogate.kernel.form, scale.back(predicted), costs[known])
    return Belief(scale, features, formula, surrogate, 0.0, 0.0, error)
