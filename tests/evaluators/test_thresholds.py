"""Thresholds: never worse than others, exact where that can be checked, cautious where it does not matter."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from evaluators.exits.correctness import correctness_probabilities
from evaluators.exits.threshold_solver import Cost, ThresholdSolver
from evaluators.inference.staged import CONFIDENCES


@st.composite
def cached(draw, most_exits: int = 3, most_images: int = 60):
    """Returns confidences `(n, exits)`, whether each exit and the end is right, and what leaving and heads cost."""
    exits, n = draw(st.integers(1, most_exits)), draw(st.integers(1, most_images))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = rng.normal(size=(n, exits + 1, 5)).astype(np.float32) * draw(st.sampled_from([0.5, 2.0, 100.0]))
    if draw(st.booleans()):
        logits = np.round(logits)  # as int8 has them: many images are equally sure
    kind = CONFIDENCES[draw(st.sampled_from(list(CONFIDENCES)))]
    confidences = np.stack([kind(logits[:, place]) for place in range(exits)], axis=1)
    correct = logits.argmax(axis=2) == rng.integers(0, 5, n)[:, None]
    leave = np.cumsum(rng.random(exits + 1) + 0.1)
    heads = np.minimum(rng.random(exits) * draw(st.sampled_from([0.0, 0.1])), 0.9 * np.diff(leave, prepend=0.0)[:-1])
    return confidences, correct, tuple(leave), tuple(heads)


def by_hand(confidences, correct, leave, heads, thresholds) -> tuple[float, float]:
    """Returns accuracy and mean cost, image by image; an exit without a threshold has no head."""
    right, spent = 0, 0.0
    for row, answers in zip(confidences, correct, strict=True):
        place, saved = 0, 0.0
        while place < len(thresholds):
            if thresholds[place] is None:
                saved += heads[place]
            elif row[place] >= np.float32(thresholds[place]):
                break
            place += 1
        right, spent = right + int(answers[place]), spent + leave[place] - saved
    return right / len(correct), spent / len(correct)


def loss(
    accuracy: float, cost: float, full: float, limit: float | None, floor: float | None, is_frugal: bool
) -> tuple[float, ...]:
    """Returns what a solution is judged by, less being better."""
    over = max(cost / limit - 1, 0) if limit else 0.0
    over += max(floor - accuracy, 0) if floor else 0.0
    over = over if over > 1e-9 else 0.0
    if limit and not is_frugal:
        return over, -accuracy, cost
    return (over, cost, -accuracy) if floor else (over, 0.1 * cost / full - accuracy, cost)


def is_no_worse(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    for mine, theirs in zip(one, other, strict=True):
        if abs(mine - theirs) > 1e-9 * max(1, abs(mine)):
            return mine < theirs
    return True


GOALS = st.sampled_from(["limit", "floor", "both", "frugal", "neither"])


def limits(goal: str, leave: tuple[float, ...], share: float, floor: float) -> tuple[float | None, float | None]:
    both = ("both", "frugal")
    return share * leave[-1] if goal in ("limit", *both) else None, floor if goal in ("floor", *both) else None


@settings(deadline=None, max_examples=60)
@given(cached(most_exits=2, most_images=12), GOALS, st.floats(0.2, 1.1), st.floats(0.05, 0.6))
def test_no_thresholds_at_all_are_better(answers, goal, share, floor) -> None:
    confidences, correct, leave, heads = answers
    limit, floor = limits(goal, leave, share, floor)
    is_frugal = goal == "frugal"
    found = ThresholdSolver(confidences, correct, [Cost(leave, heads, limit)], floor, is_frugal=is_frugal).solve()
    full = leave[-1] - sum(heads)
    mine = loss(*by_hand(*answers, found.thresholds), full, limit, floor, is_frugal)
    for each in product(*([0.0, *np.minimum(np.unique(column), 0.9999999), 1.0] for column in confidences.T)):
        assert is_no_worse(mine, loss(*by_hand(*answers, each), full, limit, floor, is_frugal)), each


@settings(deadline=None, max_examples=25)
@given(cached(), GOALS, st.floats(0.2, 1.1), st.floats(0.05, 0.6), st.integers(0, 2**32 - 1))
def test_500_random_thresholds_are_no_better(answers, goal, share, floor, seed) -> None:
    confidences, correct, leave, heads = answers
    limit, floor = limits(goal, leave, share, floor)
    is_frugal = goal == "frugal"
    solver = ThresholdSolver(confidences, correct, [Cost(leave, heads, limit)], floor, is_frugal=is_frugal)
    full = leave[-1] - sum(heads)
    found = solver.solve()
    mine = loss(found.accuracy, found.costs[0], full, limit, floor, is_frugal)
    rng = np.random.default_rng(seed)
    random = np.where(rng.random((500, len(heads))) < 0.15, 1.0, rng.random((500, len(heads))))
    for outcome in map(solver.outcome, random):
        assert is_no_worse(mine, loss(outcome.accuracy, outcome.costs[0], full, limit, floor, is_frugal))


@settings(deadline=None, max_examples=40)
@given(cached(most_exits=6, most_images=40), st.lists(st.floats(0, 1), min_size=6, max_size=6), st.booleans())
def test_what_thresholds_come_to_is_what_counting_says(answers, thresholds, solve) -> None:
    confidences, correct, leave, heads = answers
    solver = ThresholdSolver(confidences, correct, [Cost(leave, heads, 0.7 * leave[-1])])
    found = solver.solve() if solve else solver.outcome(thresholds[: len(heads)])
    accuracy, cost = by_hand(*answers, found.thresholds)
    assert found.accuracy == pytest.approx(accuracy)
    assert found.costs[0] == pytest.approx(cost)
    assert sum(found.shares) == pytest.approx(1)


@settings(deadline=None, max_examples=40)
@given(cached(), st.integers(1, 9), st.floats(0.3, 1.1), st.integers(0, 2**32 - 1))
def test_batches_that_part_pay_for_what_one_of_them_starts(answers, batch, share, seed) -> None:
    confidences, correct, leave, heads = answers
    rng = np.random.default_rng(seed)
    starts = rng.random(len(heads)) * np.diff(leave)
    solver = ThresholdSolver(confidences, correct, [Cost(leave, heads, share * leave[-1], batch, starts)])
    found = solver.solve()
    stay = 1 - np.cumsum(found.shares)[:-1]
    met = [binom(batch, max(each, 0.0)).sf(0) - each for each in stay]  # beyond what each image's own share pays for
    assert found.costs[0] == pytest.approx(by_hand(*answers, found.thresholds)[1] + np.dot(starts, met))
    mine = loss(found.accuracy, found.costs[0], leave[-1], share * leave[-1], None, False)
    for outcome in map(solver.outcome, rng.random((200, len(heads)))):
        assert is_no_worse(mine, loss(outcome.accuracy, outcome.costs[0], leave[-1], share * leave[-1], None, False))


def test_a_real_size_is_solved_as_well_as_by_many_tries() -> None:
    rng = np.random.default_rng(0)
    hard = rng.random(3000)
    confidences = (1 - 0.8 * hard[:, None] * rng.random((3000, 3))).astype(np.float32)
    correct = rng.random((3000, 4)) < np.array([0.75, 0.85, 0.9, 0.95]) * (1.05 - 0.3 * hard[:, None])
    leave, heads = (0.3, 0.55, 0.8, 1.05), (0.02, 0.02, 0.02)
    solver = ThresholdSolver(confidences, correct, [Cost(leave, heads, 0.6)])
    found = solver.solve()
    assert found.costs[0] <= 0.6
    tries = [solver.outcome(each) for each in rng.random((500, 3))]
    assert found.accuracy >= max(each.accuracy for each in tries if each.costs[0] <= 0.6)


def test_an_exit_that_is_never_right_is_turned_off_and_its_head_saved() -> None:
    confidences = np.linspace(0.3, 0.9, 10, dtype=np.float32)[:, None]
    correct = np.array([[False, True]] * 10)
    found = ThresholdSolver(confidences, correct, [Cost((0.5, 1.1), (0.1,), 1.0)]).solve()
    assert found.thresholds == (None,)
    assert found.costs == pytest.approx((1.0,))


def test_an_exit_that_is_always_right_answers_always() -> None:
    confidences = np.linspace(0.3, 0.9, 10, dtype=np.float32)[:, None]
    found = ThresholdSolver(confidences, np.ones((10, 2), bool), [Cost((0.5, 1.1), (0.1,))]).solve()
    assert found.shares == (1.0, 0.0)
    assert found.costs == pytest.approx((0.5,))


def test_of_equal_thresholds_the_cheapest_and_then_the_highest_is_taken() -> None:
    confidences = np.array([[0.2], [0.4], [0.6], [0.8]], np.float32)
    correct = np.array([[False, True], [True, True], [True, True], [True, True]])
    found = ThresholdSolver(confidences, correct, [Cost((0.5, 1.0), (0.0,), 2.0)]).solve()
    assert found.accuracy == 1.0
    assert found.shares[0] == 0.75, "as many as can leave without harm do"
    assert 0.399 < found.thresholds[0] <= 0.4, "no lower than the confidence that it lets pass"
    free = ThresholdSolver(confidences, np.ones((4, 2), bool), [Cost((1.0, 1.0), (0.0,), 2.0)]).solve()
    assert free.thresholds == (None,), "where nothing is saved nobody leaves"


def test_where_no_thresholds_keep_the_limits_the_nearest_miss_is_taken() -> None:
    confidences = np.array([[0.5], [0.9]], np.float32)
    correct = np.array([[False, True], [True, True]])
    found = ThresholdSolver(confidences, correct, [Cost((0.5, 1.0), (0.0,), 0.1)]).solve()
    assert found.costs[0] == pytest.approx(0.5)
    lost = ThresholdSolver(confidences, ~correct, [Cost((0.5, 1.0), (0.0,))], floor=0.9).solve()
    assert lost.accuracy == 0.5


def test_a_certain_softmax_is_no_exit_that_is_off() -> None:
    confidences = np.ones((4, 1), np.float32)
    found = ThresholdSolver(confidences, np.ones((4, 2), bool), [Cost((0.5, 1.0), (0.0,))]).solve()
    assert found.thresholds[0] is not None
    assert found.shares == (1.0, 0.0)


def test_answers_have_to_fit() -> None:
    with pytest.raises(ValueError, match="exits \\+ 1"):
        ThresholdSolver(np.ones((4, 2)), np.ones((4, 2), bool), [Cost((1.0, 2.0), (0.0,))])


def test_likelihoods_say_on_average_what_was_counted() -> None:
    rng = np.random.default_rng(0)
    confidences = rng.random((500, 3))
    correct = rng.random((500, 3)) < confidences
    correct[:, 2] = True
    found = correctness_probabilities(confidences, correct)
    np.testing.assert_allclose(found.mean(axis=0), correct.mean(axis=0), atol=1e-5)
    assert np.corrcoef(found[:, 0], confidences[:, 0])[0, 1] > 0.95
    assert found[:, 2].min() == 1


def test_thresholds_by_likelihood_hold_better_elsewhere_than_by_counting() -> None:
    rng = np.random.default_rng(1)

    def drawn(count: int) -> tuple[np.ndarray, np.ndarray]:
        ease = rng.normal(1.0, 1.5, (count, 1)) + np.array([0.0, 0.6, 1.5])
        sure = 1 / (1 + np.exp(-ease - rng.normal(0, 0.7, (count, 3))))
        return sure, rng.random((count, 3)) < sure

    cost = Cost((0.4, 0.7, 1.1), (0.05, 0.05), 0.75)
    everywhere, right = drawn(50_000)
    truth = ThresholdSolver(everywhere[:, :2], right, [cost])
    best, lost = truth.solve().accuracy, []
    for _ in range(12):
        sure, correct = drawn(400)
        by = [
            ThresholdSolver(sure[:, :2], told, [cost]).solve()
            for told in (correctness_probabilities(sure, correct), correct)
        ]
        lost.append([best - truth.outcome(found.thresholds).accuracy for found in by])
    smooth, counted = np.mean(lost, axis=0)
    assert smooth < 0.75 * counted
