"""What is proposed keeps limits with a probability, by what earlier proposals were told and came to."""

import numpy as np
import pytest
from scipy.stats import norm

from search.samplers.hypervolume.acquisition import Forecast, likely
from search.samplers.hypervolume.calibration_error import missed_by
from search.samplers.hypervolume.models import Belief, Beliefs, logarithmic_scale, relative_scale


def forecast() -> Forecast:
    means = np.array([[0.9, 2.0], [1.0, 2.0], [1.2, 2.0]])
    return Forecast(means, np.full((3, 2), 0.1), np.log([1.0, 0.5, 1.0]))


def test_the_chance_to_keep_limits_is_that_of_all_of_them() -> None:
    chances = forecast().keeps(np.array([1.0, np.inf]))
    assert chances == pytest.approx(norm.cdf([1.0, 0.0, -2.0]) * [1.0, 0.5, 1.0])
    both = forecast().keeps(np.array([1.0, 2.0]))
    assert both == pytest.approx(chances / 2)


def test_what_earlier_proposals_missed_makes_a_forecast_wary() -> None:
    limits = np.array([1.0, np.inf])
    worse = forecast().wary(np.array([[0.1, 0.0], [0.0, 0.0]]))
    assert worse.keeps(limits) == pytest.approx(norm.cdf([0.0, -1.0, -3.0]) * [1.0, 0.5, 1.0])
    wider = forecast().wary(np.array([[0.0, 0.0], [np.sqrt(0.03), 0.0]]))
    assert wider.keeps(limits) == pytest.approx(norm.cdf([0.5, 0.0, -1.0]) * [1.0, 0.5, 1.0])


def test_likely_rows_are_those_with_chance_enough_or_the_best_of_few() -> None:
    chances = np.array([0.1, 0.9, 0.85, 0.3])
    assert likely(chances, 0.8, 1).tolist() == [1, 2]
    assert likely(chances, 0.8, 3).tolist() == [1, 2, 3]
    assert likely(chances, 0.95, 1).tolist() == [1]
    assert likely(chances, 0.95, 9).tolist() == [0, 1, 2, 3]


def test_what_was_missed_is_told_on_the_scale_of_each_cost() -> None:
    plain, logarithmic = (
        Belief(scale, lambda rows: rows, None, None, 0.0, 1.0, None)
        for scale in (relative_scale(), logarithmic_scale())
    )
    told = np.array([1.0, 2.0, 4.0, 8.0])
    dearer, cheaper = np.stack([told, 1.1 * told], axis=1), np.stack([told, told - [0.5, 0.6, 0.5, 0.6]], axis=1)
    missed = missed_by([dearer, cheaper], Beliefs((logarithmic, plain), {}))
    assert missed[0] == pytest.approx([np.log(1.1), 0.0]), "what was better than told is no reason to be bold"
    assert missed[1] == pytest.approx([0.0, 0.05])
    assert missed_by([dearer[:3]], Beliefs((logarithmic,), {})).tolist() == [[0.0], [0.0]]
