"""What early exits save where their thresholds are solved inside of each evaluation, and at what price.

The solver decides for each version anew whether its exits are used. So costs jump between versions that are nearly
alike, and a surrogate of the mean cost learns little. What an input costs that goes to the end does not jump: layers
tell it. Where that breaks a limit, thresholds bring the mean to what is aimed at; how far they have to bring it tells
what they save of everything else, and what they lose.
"""

from collections.abc import Callable, Mapping

import numpy as np

from search.samplers.codec import Array, Codec
from search.samplers.features import Columns, Features, of_damage, of_latency
from search.samplers.structure import Meaning
from search.samplers.surrogate import HeldOut, fit, held_out

Cost = Callable[[Array], Array]
"""A cost of each row."""

_OTHERS = 0.5
"""What all else weighs beside how far a longest path is from what is aimed at."""


def timed_paths(rows: Array, longest: Array, meaning: Meaning, codec: Codec) -> tuple[Cost, HeldOut] | None:
    """Returns what the longest path of rows costs, and the error of that on what was held out; None without timings.

    Args:
        rows: that were measured, `(n, d)`.
        longest: what their longest path cost, `(n,)`; NaN where it was not measured.
        meaning: of the study.
        codec: of its space.
    """
    known = ~np.isnan(longest)
    if known.sum() < 2 or np.ptp(longest[known]) == 0:
        return None
    features, costs = of_latency(meaning.structure, codec), longest[known]
    surrogate = fit(features(rows[known]), costs, costs)
    error = held_out(surrogate.kernel.form, surrogate.predicted, costs)
    least = float(costs.min()) / 10
    return _remembered(lambda some: np.maximum(surrogate.means(features(some)), least)), error


def counted_paths(rows: Array, longest: Array, meaning: Meaning, codec: Codec) -> Cost:
    """Returns the FLOPs of the longest path: those of the layers, in the unit of what was counted."""

    def work(some: Array) -> Array:
        return np.asarray(np.maximum(meaning.structure.work(codec, some).sum(axis=1), 1e-12))

    known = ~np.isnan(longest)
    factor = float(np.median(longest[known] / work(rows[known]))) if known.any() else 1.0
    return lambda some: factor * work(some)


def slack(paths: Mapping[int, Cost], meaning: Meaning, codec: Codec) -> Features:
    """Returns columns for how far longest paths lie beyond what is aimed at, and how far within, as logarithms.

    Args:
        paths: what the longest path costs, for some objectives by their place.
        meaning: of the study.
        codec: of its space.
    """
    aimed = [(path, meaning.aims[place].aimed) for place, path in paths.items()]
    limited = [(path, aim) for path, aim in aimed if np.isfinite(aim)]

    def blocks(rows: Array) -> list[Array]:
        beyond = [np.log(path(rows) / aim) for path, aim in limited]
        columns = [part for each in beyond for part in (np.maximum(each, 0.0), np.minimum(each, 0.0))]
        return [np.stack(columns, axis=1) if columns else np.zeros((len(rows), 0))]

    return Features.fit(blocks, (1.0,), codec, (0,))


def of_savings(near: Columns, meaning: Meaning, codec: Codec) -> Columns:
    """Returns columns for what exits save: `near` the limit, and what a version costs and loses without them."""
    costs, damages = of_latency(meaning.structure, codec), of_damage(meaning.structure, codec)
    return lambda rows: np.concatenate([near(rows), _OTHERS * costs(rows), _OTHERS * damages(rows)], axis=1)


def beside(near: Columns, columns: Columns) -> Columns:
    """Returns the columns of both."""
    return lambda rows: np.concatenate([near(rows), columns(rows)], axis=1)


def _remembered(cost: Cost) -> Cost:
    """Returns the same function, which does not compute anew what it was asked last: several surrogates ask in turn."""
    last: list[tuple[Array, Array]] = []

    def found(rows: Array) -> Array:
        if not last or last[0][0] is not rows:
            last[:] = [(rows, cost(rows))]
        return last[0][1]

    return found
