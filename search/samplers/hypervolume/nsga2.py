"""NSGA-II over rows of a codec, on models: thousands of evaluations cost next to nothing.

Source: Deb et al., A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II, 2002.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from search.samplers.hypervolume.encoding import Array, Codec

Evaluates = Callable[[Array], tuple[Array, Array]]
"""Returns, for rows `(n, d)`, costs `(n, m)` and the sum of violated constraints `(n,)`, 0 where all are kept."""

_CROSSOVER = 0.8
"""The share of children that have two parents."""
_CHANGES = 1.5
"""Dimensions of a child that mutate, on average."""


def evolve(
    start: Array,
    evaluate: Evaluates,
    codec: Codec,
    rng: np.random.Generator,
    population: int = 100,
    generations: int = 30,
) -> tuple[Array, Array, Array]:
    """Returns the last population, the best first: rows `(n, d)`, costs `(n, m)` and violations `(n,)`.

    Args:
        start: the first population, `(k, d)`.
        evaluate: gives costs and violations.
        codec: of the space.
        rng: of all draws.
        population: rows that survive a generation.
        generations: how many.
    """
    rows = np.unique(start, axis=0)
    costs, violations = evaluate(rows)
    survivors = best_first(costs, violations, population)
    rows = rows[survivors]
    costs = costs[survivors]
    violations = violations[survivors]
    for _ in range(generations):
        children = offspring(rows, codec, rng, population)
        child_costs, child_violations = evaluate(children)
        rows, distinct = np.unique(np.vstack([rows, children]), axis=0, return_index=True)
        costs = np.vstack([costs, child_costs])[distinct]
        violations = np.concatenate([violations, child_violations])[distinct]
        survivors = best_first(costs, violations, population)
        rows = rows[survivors]
        costs = costs[survivors]
        violations = violations[survivors]
    return rows, costs, violations


def best_first(costs: Array, violations: Array, count: int) -> NDArray[np.int64]:
    """Returns the indices of the best `count` rows, the best first, `(count,)` or fewer.

    Feasible rows come first, by rank of non-domination and then by crowding distance; then the others, by violation.

    Args:
        costs: less being better, `(n, m)`, no NaN.
        violations: the sum of violated constraints, `(n,)`, 0 where all are kept.
        count: of rows that are wanted.
    """
    from pymoo.operators.survival.rank_and_crowding.metrics import calc_crowding_distance
    from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

    feasible = np.flatnonzero(violations <= 0)
    order: list[int] = []
    if len(feasible):
        for front in NonDominatedSorting().do(costs[feasible], n_stop_if_ranked=count):
            crowding = calc_crowding_distance(costs[feasible][front])
            order.extend(feasible[front][np.argsort(-crowding, kind="stable")])
    infeasible = np.flatnonzero(violations > 0)
    order.extend(infeasible[np.argsort(violations[infeasible], kind="stable")])
    return np.array(order[:count], dtype=np.int64)


def offspring(rows: Array, codec: Codec, rng: np.random.Generator, count: int) -> Array:
    """Returns children `(count, d)` by binary tournament, uniform crossover and mutation.

    Args:
        rows: in order, the best first, `(n, d)`.
        codec: of the space.
        rng: of all draws.
        count: of children.
    """
    winners = np.minimum(rng.integers(0, len(rows), (2, count)), rng.integers(0, len(rows), (2, count)))
    mothers, fathers = rows[winners[0]], rows[winners[1]]
    from_father = (rng.random(mothers.shape) < 0.5) & (rng.random((count, 1)) < _CROSSOVER)
    return mutate(np.where(from_father, fathers, mothers), codec, rng, _CHANGES)


def mutate(rows: Array, codec: Codec, rng: np.random.Generator, changes: float) -> Array:
    """Returns rows `(n, d)` in which some dimensions, and one at least, have another value.

    Args:
        rows: `(n, d)`.
        codec: of the space.
        rng: of all draws.
        changes: dimensions of a row that change, on average.
    """
    count, dimensions = rows.shape
    levels = codec.levels
    changes_here = rng.random(rows.shape) < changes / dimensions
    changes_here[np.arange(count), rng.integers(0, dimensions, count)] = True
    steps = rng.geometric(0.6, rows.shape) * rng.choice((-1.0, 1.0), rows.shape)
    other_choice = rng.integers(1, np.maximum(levels, 2), rows.shape)
    continuous = np.clip(rows + 0.12 * rng.standard_normal(rows.shape), 0.0, 1.0)
    ordered = np.clip(rows + steps, 0, np.maximum(levels - 1, 0))
    categorical = (rows + other_choice) % np.maximum(levels, 1)
    changed = np.where(codec.is_categorical, categorical, np.where(levels > 0, ordered, continuous))
    return np.where(changes_here, changed, rows)
