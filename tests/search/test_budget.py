import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluators.measurement import METRICS, Measurement, UnitError
from search.config.budget import BUDGET_METRICS, Budget, BudgetError, Constraint
from search.config.objectives import BEFORE
from search.config.study import Study
from search.pipeline.exit_thresholds import AIM, cost_target
from search.results.pareto import reference_point
from search.results.violations import violation_line


def measured(metric: str, value: float, **others: float) -> Measurement:
    return Measurement(metric, value, METRICS[metric].statistics[0], 10, 0.0, "test", "test", others)


DENSE = {
    "latency": measured("latency", 0.010, p99=0.012),
    "accuracy": measured("accuracy", 0.95),
    "flops": measured("flops", 40e6),
    "size": measured("size", 1e6),
}


@pytest.mark.parametrize(
    ("text", "metric", "statistic", "limit", "relative"),
    [
        ("latency<5ms", "latency", "median", 0.005, False),
        ("latency <= 5 ms", "latency", "median", 0.005, False),
        ("latency=5ms", "latency", "median", 0.005, False),
        ("latency:5000us", "latency", "median", 0.005, False),
        ("latency.p99<0.008s", "latency", "p99", 0.008, False),
        ("latency<50%", "latency", "median", 0.5, True),
        ("latency<1e-2s", "latency", "median", 0.01, False),
        ("accuracy>98.5%", "accuracy", "mean", 0.985, False),
        ("accuracy=98.5%", "accuracy", "mean", 0.985, False),
        ("accuracy_drop<1%", "accuracy_drop", "mean", 0.01, False),
        ("flops<20M", "flops", "expected", 20e6, False),
        ("flops<20000000", "flops", "expected", 20e6, False),
        ("params<30%", "params", "total", 0.3, True),
        ("size<1.5MB", "size", "total", 1.5e6, False),
    ],
)
def test_reads_what_people_write(text: str, metric: str, statistic: str, limit: float, relative: bool) -> None:
    assert Constraint.parse(text) == Constraint(BUDGET_METRICS[metric], statistic, limit, relative)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("latency", ["redirect", "latency=5ms", "'latency<5ms'"]),
        ("accuracy", ["accuracy=98%"]),
        ("", ["latency<5ms"]),
        ("latncy<5ms", ["'latncy'", "did you mean 'latency'"]),
        ("latency<5", ["us, ms, s, %", "latency<5ms"]),
        ("latency<5KB", ["us, ms, s, %"]),
        ("size<5ms", ["B, KB, MB, %"]),
        ("latency>5ms", ["from above", "'latency<5ms'"]),
        ("accuracy<90%", ["from below", "'accuracy>90%'"]),
        ("accuracy>101%", ["below 100%"]),
        ("accuracy>0.9", ["%"]),
        ("latency<0ms", ["above 0"]),
        ("latency<-3ms", ["above 0"]),
        ("latency<ms", ["number"]),
        ("latency<nan", ["number"]),
        ("latency.p42<5ms", ["p90", "p99"]),
        ("latency<5ms,latency<4ms", ["once", "latency<4ms"]),
        ("latency<5ms,", ["''"]),
        ("energy<2mJ", ["stated price", "energy<2mJ@50pJ"]),
        ("energy<2mJ@0pJ", ["stated price"]),
        ("energy<2mJ@nanpJ", ["stated price"]),
        ("energy<2mJ@50", ["stated price", "pJ, nJ"]),
        ("energy<50%@50pJ", ["mJ", "energy<2mJ@50pJ"]),
        ("energy<2ms@50pJ", ["mJ"]),
        ("flops<20M@50pJ", ["only energy"]),
        ("fps>100", ["'fps'", "latency = batch / rate", "latency<80ms"]),
        ("FPS>100", ["latency = batch / rate"]),
        ("memory<1MB", ["'memory'", "memory in use is not measured", "size<1MB"]),
        ("macs<20M", ["'macs'", "flops = MACs", "flops<20M"]),
        ("top1>90%", ["'top1'", "accuracy is top-1", "accuracy>98%"]),
        ("top-5>90%", ["'top-5'", "not measured", "accuracy>98%"]),
        ("error<2%", ["accuracy = 100% - error"]),
        ("p99<8ms", ["latency.p99<8ms"]),
        ("beauty<2", ["'beauty'", "choose from latency, accuracy"]),
    ],
)
def test_a_mistake_is_told_with_the_rule_and_the_remedy(text: str, words: list[str]) -> None:
    with pytest.raises(BudgetError) as error:
        Budget.parse([text])
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


constraints = st.one_of(
    st.builds(
        lambda stat, value, unit: f"latency{stat}<{value}{unit}",
        st.sampled_from(["", ".p90", ".p99", ".worst"]),
        st.decimals("0.001", 10000, places=3),
        st.sampled_from(["us", "ms", "s", "%"]),
    ),
    st.builds(lambda value: f"accuracy>{value}%", st.decimals("0.1", "99.9", places=2)),
    st.builds(lambda value: f"accuracy_drop<{value}%", st.decimals("0", "99", places=2)),
    st.builds(lambda v, u: f"flops<{v}{u}", st.decimals("0.01", 1000, places=2), st.sampled_from(["K", "M", "G", "%"])),
    st.builds(
        lambda v, u, price: f"energy<{v}{u}@{price}pJ",
        st.decimals("0.01", 1000, places=2),
        st.sampled_from(["uJ", "mJ", "J"]),
        st.decimals("0.1", 5000, places=1),
    ),
    st.builds(lambda v, u: f"size<{v}{u}", st.decimals("1", 1000, places=1), st.sampled_from(["B", "KB", "MB", "%"])),
)


@given(constraints)
def test_text_round_trip(text: str) -> None:
    constraint = Constraint.parse(text)
    assert Constraint.parse(str(constraint)) == constraint


def test_several_limits_in_one_text_or_in_several_are_the_same() -> None:
    assert Budget.parse(["latency<5ms,size<1MB"]) == Budget.parse(["latency<5ms", "size<1MB"])


def test_violation_is_the_share_by_which_a_limit_is_overstepped() -> None:
    constraint = Constraint.parse("latency<5ms")
    assert constraint.violation(measured("latency", 0.006), DENSE["latency"]) == pytest.approx(0.2)
    assert constraint.violation(measured("latency", 0.005), DENSE["latency"]) <= 0
    assert constraint.violation(measured("latency", 0.004), DENSE["latency"]) == pytest.approx(-0.2)


def test_percent_means_of_the_dense_network() -> None:
    assert Constraint.parse("latency<50%").violation(measured("latency", 0.006), DENSE["latency"]) == pytest.approx(0.2)
    p99 = Constraint.parse("latency.p99<50%")
    assert p99.violation(measured("latency", 0.001, p99=0.009), DENSE["latency"]) == pytest.approx(0.5)


def test_accuracy_is_limited_from_below_and_its_drop_in_points() -> None:
    assert Constraint.parse("accuracy>90%").violation(measured("accuracy", 0.81), DENSE["accuracy"]) == pytest.approx(
        0.1
    )
    drop = Constraint.parse("accuracy_drop<2%")
    assert drop.violation(measured("accuracy", 0.92), DENSE["accuracy"]) == pytest.approx(0.5)
    assert drop.violation(measured("accuracy", 0.96), DENSE["accuracy"]) < 0


def test_energy_is_flops_at_a_stated_price() -> None:
    limit = Constraint.parse("energy < 1 mJ @ 50pJ")
    assert limit.measured_as == "flops"
    assert limit.violation(measured("flops", 30e6), DENSE["flops"]) == pytest.approx(0.5)
    assert limit.ceiling(DENSE["flops"]) == pytest.approx(20e6)
    assert violation_line(limit, measured("flops", 30e6), DENSE["flops"]) == "energy 1.5 mJ, 50% over energy<1mJ@50pJ"
    worst = Constraint.parse("energy.worst<1mJ@50pJ")
    assert worst.violation(measured("flops", 10e6, worst=22e6), DENSE["flops"]) == pytest.approx(0.1)


def test_the_worst_that_counts_is_what_the_tightest_limit_lets_through() -> None:
    budget = Budget.parse(["flops<30M,energy<1mJ@50pJ,energy.worst<1uJ@1pJ,latency<50%,accuracy>90%,accuracy_drop<2%"])
    assert reference_point(budget, DENSE, BEFORE) == pytest.approx({"accuracy": 0.93, "latency": 0.005, "flops": 20e6})
    assert cost_target(budget, "flops", DENSE) == pytest.approx(AIM * 20e6)


def test_a_statistic_that_was_not_measured_is_no_number() -> None:
    with pytest.raises(UnitError):
        Constraint.parse("latency.p90<5ms").violation(measured("latency", 0.001), DENSE["latency"])


def test_a_budget_is_met_only_when_all_of_it_was_measured() -> None:
    budget = Budget.parse(["latency<5ms,accuracy_drop<1%"])
    assert not budget.is_met({"latency": measured("latency", 0.004)}, DENSE)
    assert budget.is_met({"latency": measured("latency", 0.004), "accuracy": measured("accuracy", 0.945)}, DENSE)
    assert not budget.is_met({"latency": measured("latency", 0.004), "accuracy": measured("accuracy", 0.93)}, DENSE)


def test_a_study_holds_its_budget_and_writes_it_in_one_spelling() -> None:
    text = 'name = "a"\nquestion = ""\nbudget = ["latency <= 5000 us, size:1MB"]\n'
    sections = '[model]\nsource = "a.b:net"\n[data]\nsource = "a.b:splits"\n'
    study = Study.parse(text + sections, "here")
    assert study.budget == Budget.parse(["latency<5ms,size<1MB"])
    assert 'budget = ["latency<5ms", "size<1MB"]' in study.to_toml()
    assert study.model_dump(mode="json")["budget"] == ["latency<5ms", "size<1MB"]
    assert Study.model_validate_json(study.model_dump_json()) == study
    assert study.model_copy(deep=True) == study


def test_broken_limits_are_those_that_were_measured_and_overstepped() -> None:
    budget = Budget.parse(["latency<5ms,size<2MB,flops<10M,accuracy>90%"])
    found = budget.broken({"latency": measured("latency", 0.006), "size": measured("size", 1e6)}, DENSE)
    assert found == {Constraint.parse("latency<5ms"): pytest.approx(0.2)}


def test_the_tightest_limit_is_the_floor_or_the_ceiling() -> None:
    budget = Budget.parse(["accuracy>90%,accuracy_drop<2%,latency<50%,latency.p99<1ms"])
    assert budget.accuracy_floor(DENSE) == pytest.approx(0.93)
    assert budget.ceiling("latency", DENSE) == pytest.approx(0.005)
    assert budget.ceiling("flops", DENSE) is None
    assert [str(limit) for limit in budget.on("latency")] == ["latency<50%", "latency.p99<1ms"]
    assert str(budget.without("accuracy")) == "latency<50%,latency.p99<1ms"
    assert Budget(()).accuracy_floor(DENSE) is None


def test_what_a_drop_is_survives_a_copy() -> None:
    limit = copy.deepcopy(Constraint.parse("accuracy_drop<2%"))
    assert limit.violation(measured("accuracy", 0.92), DENSE["accuracy"]) == pytest.approx(0.5)
