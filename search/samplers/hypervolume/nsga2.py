"""NSGA-II over rows of a codec, with the costs of surrogates: thousands of rows cost next to nothing."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from search.samplers.hypervolume.encoding import Array, Codec

Judge = Callable[[Array], tuple[Array, Array]]
"""Returns costs `(n, m)` and, `(n,)`, by how much rows break their limits, 0 where they do not."""


def evolve(
    start: Array, judge: Judge, codec: Codec, rng: np.random.Generator, population: int = 100, generations: int = 30
) -> tuple[Array, Array, Array]:
    """Returns the last population, the best first, with its costs and how much it breaks its limits.

    Source: Deb et al., A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II, 2002, with feasibility first.
    """
    rows = np.unique(start, axis=0)
    costs, broken = judge(rows)
    order = ranked(costs, broken, population)
    rows = rows[order]
    costs = costs[order]
    broken = broken[order]
    for _ in range(generations):
        children = offspring(rows, codec, rng, population)
        more, theirs = judge(children)
        rows = np.vstack([rows, children])
        costs = np.vstack([costs, more])
        broken = np.concatenate([broken, theirs])
        _, first = np.unique(rows, axis=0, return_index=True)
        rows = rows[first]
        costs = costs[first]
        broken = broken[first]
        order = ranked(costs, broken, population)
        rows = rows[order]
        costs = costs[order]
        broken = broken[order]
    return rows, costs, broken


def ranked(costs: Array, broken: Array, count: int) -> NDArray[np.int64]:
    """Returns the places of the best `count` rows, the best first: by front and crowding, then by what they break."""
    from pymoo.operators.survival.rank_and_crowding.metrics import calc_crowding_distance
    from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

    whole = np.flatnonzero(broken <= 0)
    order: list[int] = []
    if len(whole):
        for front in NonDominatedSorting().do(costs[whole], n_stop_if_ranked=count):
            crowding = calc_crowding_distance(costs[whole][front])
            order.extend(whole[front][np.argsort(-crowding, kind="stable")])
    rest = np.flatnonzero(broken > 0)
    order.extend(rest[np.argsort(broken[rest], kind="stable")])
    return np.array(order[:count], dtype=np.int64)


def non_dominated(costs: Array) -> NDArray[np.int64]:
    """Returns the places of the costs `(n, m)` that no other beats."""
    from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

    if not len(costs):
        return np.zeros(0, dtype=np.int64)
    return np.asarray(NonDominatedSorting().do(costs, only_non_dominated_front=True), dtype=np.int64)


def offspring(rows: Array, codec: Codec, rng: np.random.Generator, count: int) -> Array:
    """Returns children of rows that are in order, the best first: parents are the better of two."""
    better = np.minimum(rng.integers(0, len(rows), (2, count)), rng.integers(0, len(rows), (2, count)))
    mother, father = rows[better[0]], rows[better[1]]
    mixed = (rng.random(mother.shape) < 0.5) & (rng.random((count, 1)) < 0.8)
    return mutated(np.where(mixed, father, mother), codec, rng, 1.5)


def mutated(rows: Array, codec: Codec, rng: np.random.Generator, changes: float) -> Array:
    """Returns rows in which some dimensions, `changes` a row on average, and one at least, have another value."""
    count, size = rows.shape
    levels, categorical = codec.levels, codec.is_categorical
    chosen = rng.random(rows.shape) < changes / size
    chosen[np.arange(count), rng.integers(0, size, count)] = True
    steps = rng.geometric(0.6, rows.shape) * rng.choice((-1.0, 1.0), rows.shape)
    other = rng.integers(1, np.maximum(levels, 2), rows.shape)
    free = np.clip(rows + 0.12 * rng.standard_normal(rows.shape), 0.0, 1.0)
    stepped = np.clip(rows + steps, 0, np.maximum(levels - 1, 0))
    cycled = (rows + other) % np.maximum(levels, 1)
    changed = np.where(categorical, cycled, np.where(levels > 0, stepped, free))
    return np.where(chosen, changed, rows)
