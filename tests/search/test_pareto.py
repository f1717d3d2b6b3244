from dataclasses import replace
from io import StringIO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from evaluators.measurement import METRICS, Measurement
from search.config.budget import Budget
from search.config.objectives import BEFORE, DEFAULT, Objectives
from search.report.tables import front_table
from search.results.evaluation import Evaluation
from search.results.pareto import Version, choose, feasible, front_within, hypervolume, nearest_miss, pareto
from spaces.candidate import Candidate

UNITS = {"accuracy": 0.01, "latency": 0.001, "flops": 1e6, "size": 1e3}


def version(number: int, **values: float) -> Version:
    measurements = {
        metric: Measurement(metric, value * UNITS[metric], METRICS[metric].statistics[0], 1, 0.0, "test", "test")
        for metric, value in values.items()
    }
    return Version(number, Evaluation(Candidate({"g": number + 1}, {}), measurements, "none", ""))


DENSE = version(0, accuracy=99, latency=10, flops=40, size=1000).measured
points = st.tuples(st.integers(80, 90), st.integers(1, 9), st.integers(1, 9))


def made(rows: list[tuple[int, int, int]]) -> list[Version]:
    return [version(i, accuracy=a, latency=t, flops=f, size=1) for i, (a, t, f) in enumerate(rows)]


def dominates(one: Version, other: Version) -> bool:
    first, second = one.costs(BEFORE), other.costs(BEFORE)
    return bool((first <= second).all() and (first < second).any())


def costs(versions: list[Version]) -> set[tuple[float, ...]]:
    return {tuple(version.costs(BEFORE)) for version in versions}


@given(st.lists(points, max_size=20))
def test_a_front_is_exactly_what_nothing_dominates(rows: list[tuple[int, int, int]]) -> None:
    versions = made(rows)
    expected = {tuple(one.costs(BEFORE)) for one in versions if not any(dominates(other, one) for other in versions)}
    front = pareto(versions, BEFORE)
    assert costs(front) == expected
    assert len(front) == len(expected)


@given(st.lists(points, max_size=15), st.randoms())
def test_a_front_is_free_of_order_and_idempotent(rows: list[tuple[int, int, int]], random: object) -> None:
    versions = made(rows)
    shuffled = versions.copy()
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert pareto(shuffled, BEFORE) == pareto(versions, BEFORE)
    assert pareto(pareto(versions, BEFORE), BEFORE) == pareto(versions, BEFORE)


@given(st.lists(points, min_size=1, max_size=10), points)
def test_another_version_never_lowers_the_hypervolume(rows: list[tuple[int, int, int]], extra: tuple[int, ...]) -> None:
    budget = Budget.parse(["latency<9ms,accuracy>80%"])
    before = hypervolume(pareto(made(rows), BEFORE), budget, DENSE, BEFORE)
    after = hypervolume(pareto(made([*rows, extra]), BEFORE), budget, DENSE, BEFORE)  # type: ignore[list-item]
    assert -1e-12 <= before <= after + 1e-12 <= 1 + 1e-9


def test_hypervolume_of_one_version_is_its_box() -> None:
    budget = Budget.parse(["latency<8ms,accuracy>90%"])
    found = hypervolume([version(0, accuracy=95, latency=2, flops=10, size=1)], budget, DENSE, BEFORE)
    assert found == pytest.approx(0.5 * 0.75 * 0.75)


@given(st.lists(points, min_size=1, max_size=20))
def test_flops_that_are_no_objective_keep_no_version_on_the_front(rows: list[tuple[int, int, int]]) -> None:
    front = pareto(made(rows), DEFAULT)
    fastest_of = {accuracy: min(t for a, t, _ in rows if a >= accuracy) for accuracy, _, _ in rows}
    expected = {(a, t) for a, t, _ in rows if t == fastest_of[a] and not any(b > a and u <= t for b, u, _ in rows)}
    shown = [(round(one.measured["accuracy"].value * 100), round(one.measured["latency"].value * 1e3)) for one in front]
    assert set(shown) == expected
    assert len(shown) == len(expected)


def test_the_box_of_the_hypervolume_has_a_side_for_each_objective() -> None:
    budget = Budget.parse(["latency<8ms,accuracy>90%"])
    one = [version(0, accuracy=95, latency=2, flops=10, size=250)]
    assert hypervolume(one, budget, DENSE, ("accuracy", "latency")) == pytest.approx(0.5 * 0.75)
    assert hypervolume(one, budget, DENSE, ("accuracy", "latency", "size")) == pytest.approx(0.5 * 0.75 * 0.75)
    assert hypervolume(one, budget, DENSE, ("accuracy", "flops")) == pytest.approx(0.5 * 0.75)


def test_a_smaller_version_stays_where_size_counts_though_a_simple_one_is_faster_and_more_accurate() -> None:
    int8 = version(-2, accuracy=98, latency=4, flops=40, size=300)
    lean = version(3, accuracy=90, latency=6, flops=9, size=100)
    choices: tuple[Objectives, ...] = (
        DEFAULT,
        BEFORE,
        ("accuracy", "size"),
        ("accuracy", "latency", "size"),
        ("accuracy", "flops"),
    )
    found = [
        [each.number for each in front_within([lean], [int8], Budget(()), DENSE, chosen).versions] for chosen in choices
    ]
    assert found == [[-2], [-2], [-2, 3], [-2, 3], [-2, 3]]


def test_only_whole_measurements_within_the_budget_are_feasible() -> None:
    versions = [
        version(0, accuracy=95, latency=6, flops=10),
        version(1, latency=4, flops=10),
        version(2, accuracy=95, latency=4, flops=10),
    ]
    assert [one.number for one in feasible(versions, Budget.parse(["latency<5ms"]), DENSE)] == [2]


def test_choice_follows_the_preference() -> None:
    front = [
        version(0, accuracy=99, latency=9, flops=30, size=10),
        version(1, accuracy=98, latency=3, flops=12, size=30),
        version(2, accuracy=80, latency=2, flops=10, size=20),
    ]
    first = {name: choose(front, name, BEFORE)[0].number for name in ("accuracy", "latency", "flops", "size", "knee")}
    assert first == {"accuracy": 0, "latency": 2, "flops": 2, "size": 0, "knee": 1}
    assert np.all(np.diff([one.measured["latency"].value for one in choose(front, "latency", BEFORE)]) > 0)


def test_the_nearest_miss_oversteps_least() -> None:
    budget = Budget.parse(["latency<2ms"])
    versions = [version(0, accuracy=99, latency=9, flops=1), version(1, accuracy=95, latency=3, flops=1)]
    miss = nearest_miss(versions, budget, DENSE)
    assert miss is not None
    assert miss[0].number == 1
    assert miss[1] == {budget.constraints[0]: pytest.approx(0.5)}
    assert nearest_miss([], budget, DENSE) is None


def test_a_version_whose_accuracy_is_unknown_is_not_the_nearest() -> None:
    budget = Budget.parse(["latency<2ms", "accuracy>96%"])
    whole = version(1, accuracy=95, latency=3, flops=1)
    hasty = version(0, accuracy=10, latency=2.1, flops=1)
    measured = {name: value for name, value in hasty.measured.items() if name != "accuracy"}
    cut = replace(hasty, evaluation=replace(hasty.evaluation, measurements=measured))
    early = replace(hasty, evaluation=replace(hasty.evaluation, ended="at most 12% accurate"))
    miss = nearest_miss([cut, early, whole], budget, DENSE)
    assert miss is not None
    assert miss[0].number == 1
    assert list(miss[1]) == list(budget.constraints)
    assert nearest_miss([cut, early], budget, DENSE) is None


@pytest.mark.parametrize("width", [60, 72, 80, 81, 100])
def test_a_table_cuts_no_figure_and_keeps_exits_rather_than_points(width) -> None:
    shown = version(149, accuracy=99, latency=11.59, flops=40, size=843)
    accuracy = replace(shown.measured["accuracy"], notes={"exit1": 0.85, "end": 0.13}, n=175)
    measured = {**shown.measured, "accuracy": accuracy}
    candidate = Candidate({"g": 8}, {f"layer{index}": "int8" for index in range(24)})
    wide = Version(149, Evaluation(candidate, measured, "none", ""))
    console = Console(width=width, file=StringIO(), force_terminal=False)
    console.print(front_table([wide], replace(wide, number=-1), "front", width))
    told = console.file.getvalue()
    assert "\N{HORIZONTAL ELLIPSIS}" not in told
    assert "11.59 ms" in told
    assert ("85% 13%" in told) == (width >= 80)
