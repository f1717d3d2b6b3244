"""What early exits save where their thresholds are solved inside of each evaluation, and at what price.

The solver decides for each version anew where inputs leave. So costs jump between versions that are nearly alike, and
a surrogate of the mean cost learns little. What an input costs that leaves at an exit does not jump: the layers before
the exit tell it. How many go on behind it follows from what that costs beside the limit, and from what the version
loses. The mean is the sum of both, and a surrogate of what is left of it learns the rest.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from search.samplers.hypervolume.encoding import Array, Codec
from search.samplers.hypervolume.features import Columns, Features, of_damage, of_latency
from search.samplers.hypervolume.gaussian_process import HeldOut, fit, held_out
from search.samplers.hypervolume.observations import Observed
from search.samplers.hypervolume.prior import Meaning

Function = Callable[[Array], Array]
"""A number for each row."""

_OTHERS = 0.5
"""What all else weighs beside how far ways are from what is aimed at."""
_FEWEST = 4
"""With fewer versions whose thresholds were solved, nothing is told of exits."""


@dataclass(frozen=True)
class Told:
    """A function of rows, and what it comes to for rows that were measured if each is left out in turn."""

    function: Function
    held_out: Array


@dataclass(frozen=True)
class Savings:
    """What exits leave of costs.

    Args:
        means: of the cost over inputs, for some objectives by their place.
        near: columns for how far the ways out are from what is aimed at.
        columns: for what else decides on costs.
        errors: of what tells the longest way, on what was held out, by name.
    """

    means: Mapping[int, Told]
    near: Columns
    columns: Columns
    errors: Mapping[str, HeldOut]


def savings(observed: Observed, meaning: Meaning, codec: Codec) -> Savings | None:
    """Returns what exits leave of costs; None where too few versions tell.

    Args:
        observed: what was measured.
        meaning: of the study, its thresholds solved.
        codec: of its space.
    """
    known = int((~np.isnan(observed.leaving)).all(axis=1).sum())
    if observed.leaving.shape[1] < 2 or known < _FEWEST:
        return None
    ways, errors = {}, {}
    for place, costs in observed.ways.items():
        if meaning.aims[place].kind == "flops":
            ways[place] = _counted(observed.rows, costs, meaning, codec)
        else:
            ways[place], errors["longest way"] = _timed(observed.rows, costs, meaning, codec)
    near = _near({place: [way.function for way in found] for place, found in ways.items()}, meaning, codec)
    columns = _of_savings(near, meaning, codec)
    going_on = _going_on(observed.rows, observed.leaving, columns)
    means = {place: _mean(found, going_on) for place, found in ways.items()}
    return Savings(means, near, columns, errors)


def _timed(rows: Array, costs: Array, meaning: Meaning, codec: Codec) -> tuple[list[Told], HeldOut]:
    """Returns the seconds of each way out, told from the layers before it, and the error of the longest one's."""
    structure, found = meaning.structure, []
    for layers, taken in zip((*structure.exit_after, structure.layers), costs.T, strict=True):
        features, known = of_latency(structure.first(layers), codec), ~np.isnan(taken)
        surrogate = fit(features(rows[known]), np.log(taken[known]), np.ones(int(known.sum())))
        left_out = np.full(len(rows), np.nan)
        left_out[known] = np.exp(surrogate.predicted)
        function = _remembered(lambda some, of=features, by=surrogate: np.exp(by.means(of(some))))  # type: ignore[misc]
        found.append(Told(function, left_out))
    return found, held_out(surrogate.kernel.form, left_out[known], taken[known])


def _counted(rows: Array, costs: Array, meaning: Meaning, codec: Codec) -> list[Told]:
    """Returns the FLOPs of each way out: those of the layers before it, in the unit of what was counted."""
    structure, found = meaning.structure, []
    for layers, taken in zip((*structure.exit_after, structure.layers), costs.T, strict=True):

        def work(some: Array, layers: int = layers) -> Array:
            return np.asarray(np.maximum(structure.work(codec, some)[:, :layers].sum(axis=1), 1e-12))

        factor = float(np.nanmedian(taken / work(rows)))
        function = _remembered(lambda some, work=work, factor=factor: factor * work(some))  # type: ignore[misc]
        found.append(Told(function, function(rows)))
    return found


def _near(ways: Mapping[int, list[Function]], meaning: Meaning, codec: Codec) -> Columns:
    """Returns columns for how far ways out lie beyond what is aimed at, and how far within, as logarithms."""
    aimed = [(way, meaning.aims[place].aimed) for place, found in ways.items() for way in found]
    limited = [(way, aim) for way, aim in aimed if np.isfinite(aim)]

    def blocks(rows: Array) -> list[Array]:
        beyond = [np.log(way(rows) / aim) for way, aim in limited]
        columns = [part for each in beyond for part in (np.maximum(each, 0.0), np.minimum(each, 0.0))]
        return [np.stack(columns, axis=1) if columns else np.zeros((len(rows), 0))]

    return Features.fit(blocks, (1.0,), codec, (0,))


def _of_savings(near: Columns, meaning: Meaning, codec: Codec) -> Columns:
    """Returns columns for what exits save: `near` the limit, and what a version costs and loses without them."""
    costs, damages = of_latency(meaning.structure, codec), of_damage(meaning.structure, codec)
    return _remembered(
        lambda rows: np.concatenate([near(rows), _OTHERS * costs(rows), _OTHERS * damages(rows)], axis=1)
    )


def _going_on(rows: Array, leaving: Array, columns: Columns) -> list[Told]:
    """Returns the share of the inputs that goes on behind each exit."""
    known = ~np.isnan(leaving).any(axis=1)
    seen, found = columns(rows[known]), []
    for exit_ in range(leaving.shape[1] - 1):
        shares = leaving[known, exit_ + 1 :].sum(axis=1)
        left_out = np.full(len(rows), np.nan)
        if np.ptp(shares) == 0:
            left_out[known] = shares
            found.append(Told(lambda some, share=shares[0]: np.full(len(some), share), left_out))  # type: ignore[misc]
            continue
        surrogate = fit(seen, shares, np.ones(len(shares)))
        left_out[known] = np.clip(surrogate.predicted, 0.0, 1.0)
        function = _remembered(lambda some, by=surrogate: np.clip(by.means(columns(some)), 0.0, 1.0))  # type: ignore[misc]
        found.append(Told(function, left_out))
    return found


def _mean(ways: list[Told], going_on: list[Told]) -> Told:
    """Returns the mean over inputs: the first way, and for those that go on what each next one costs more."""

    def summed(costs: list[Array], shares: list[Array]) -> Array:
        total, stay = costs[0], np.ones_like(costs[0])
        for before, after, share in zip(costs, costs[1:], shares, strict=False):
            stay = np.minimum(stay, share)
            total = total + stay * np.maximum(after - before, 0.0)
        return total

    def mean(rows: Array) -> Array:
        return summed([way.function(rows) for way in ways], [share.function(rows) for share in going_on])

    return Told(mean, summed([way.held_out for way in ways], [share.held_out for share in going_on]))


def beside(near: Columns, columns: Columns) -> Columns:
    """Returns the columns of both."""
    return lambda rows: np.concatenate([near(rows), columns(rows)], axis=1)


def _remembered(function: Function) -> Function:
    """Returns the same function, which does not compute anew what it was asked last: several surrogates ask in turn."""
    last: list[tuple[Array, Array]] = []

    def found(rows: Array) -> Array:
        if not last or last[0][0] is not rows:
            last[:] = [(rows, function(rows))]
        return last[0][1]

    return found
