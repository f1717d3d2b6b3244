"""Fronts and samplers agree on what dominates what."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from search.samplers.hypervolume.nsga2 import best_first
from search.samplers.non_domination import is_non_dominated

costs_of_three = st.integers(1, 12).flatmap(lambda n: arrays(float, (n, 3), elements=st.integers(0, 4).map(float)))


def test_no_point_at_least_as_good_everywhere_is_better_anywhere() -> None:
    costs = np.array([[1.0, 2.0], [2.0, 1.0], [2.0, 2.0], [1.0, 2.0]])
    assert is_non_dominated(costs).tolist() == [True, True, False, True]
    assert is_non_dominated(costs, deduplicate=True).tolist() == [True, True, False, False]
    assert is_non_dominated(np.zeros((0, 3))).tolist() == []


def test_a_point_with_an_unknown_cost_is_dominated_and_dominates_none() -> None:
    costs = np.array([[np.nan, 0.0], [1.0, 1.0], [0.0, np.nan], [np.inf, 0.5]])
    assert is_non_dominated(costs).tolist() == [False, True, False, True]


@given(costs_of_three)
def test_the_best_rows_of_evolution_begin_with_the_non_dominated_ones(costs: np.ndarray) -> None:
    mask = is_non_dominated(costs)
    best = best_first(costs, np.zeros(len(costs)), int(mask.sum()))
    assert sorted(best) == np.flatnonzero(mask).tolist()
