"""What is proposed keeps limits with a probability, by what was predicted of earlier proposals and measured."""

import numpy as np
import pytest
from scipy.stats import norm

from search.samplers.hypervolume.acquisition import Marginals, probably_feasible
from search.samplers.hypervolume.models import Posterior, Posteriors
from search.samplers.hypervolume.outcome_transforms import log_transform, relative_transform
from search.samplers.hypervolume.prediction_errors import recent_bias_and_std


def marginals() -> Marginals:
    means = np.array([[0.9, 2.0], [1.0, 2.0], [1.2, 2.0]])
    return Marginals(means, np.full((3, 2), 0.1), np.log([1.0, 0.5, 1.0]))


def test_the_chance_to_keep_limits_is_that_of_all_of_them() -> None:
    chances = marginals().feasibility(np.array([1.0, np.inf]))
    assert chances == pytest.approx(norm.cdf([1.0, 0.0, -2.0]) * [1.0, 0.5, 1.0])
    both = marginals().feasibility(np.array([1.0, 2.0]))
    assert both == pytest.approx(chances / 2)


def test_errors_of_earlier_predictions_lower_the_probability_of_keeping_limits() -> None:
    limits = np.array([1.0, np.inf])
    worse = marginals().corrected(np.array([[0.1, 0.0], [0.0, 0.0]]))
    assert worse.feasibility(limits) == pytest.approx(norm.cdf([0.0, -1.0, -3.0]) * [1.0, 0.5, 1.0])
    wider = marginals().corrected(np.array([[0.0, 0.0], [np.sqrt(0.03), 0.0]]))
    assert wider.feasibility(limits) == pytest.approx(norm.cdf([0.5, 0.0, -1.0]) * [1.0, 0.5, 1.0])


def test_rows_are_those_that_are_feasible_with_the_probability_asked_for_or_the_best_of_few() -> None:
    chances = np.array([0.1, 0.9, 0.85, 0.3])
    assert probably_feasible(chances, 0.8, 1).tolist() == [1, 2]
    assert probably_feasible(chances, 0.8, 3).tolist() == [1, 2, 3]
    assert probably_feasible(chances, 0.95, 1).tolist() == [1]
    assert probably_feasible(chances, 0.95, 9).tolist() == [0, 1, 2, 3]


def test_bias_and_deviation_are_those_of_transformed_costs() -> None:
    plain, logarithmic = (
        Posterior(transform, lambda rows: rows, None, None, 0.0, 1.0, None)
        for transform in (relative_transform(), log_transform())
    )
    predicted = np.array([1.0, 2.0, 4.0, 8.0])
    dearer, cheaper = (
        np.stack([predicted, 1.1 * predicted], axis=1),
        np.stack([predicted, predicted - [0.5, 0.6, 0.5, 0.6]], axis=1),
    )
    bias_and_std = recent_bias_and_std([dearer, cheaper], Posteriors((logarithmic, plain), {}))
    assert bias_and_std[0] == pytest.approx([np.log(1.1), 0.0]), (
        "what was better than predicted is no reason to be bold"
    )
    assert bias_and_std[1] == pytest.approx([0.0, 0.05])
    assert recent_bias_and_std([dearer[:3]], Posteriors((logarithmic,), {})).tolist() == [[0.0], [0.0]]
