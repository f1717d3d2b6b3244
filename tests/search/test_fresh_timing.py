"""What `pick` takes and says where versions turn out slower than the search found them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from evaluators.measurement import mean_of, scaled
from search.cli import run
from search.config.budget import Budget
from search.config.objectives import BEFORE
from search.deploy.fresh_timing import FreshTiming, FreshTimings, best_version, content, lines, wider_budget
from search.results.pareto import Version
from search.results.store import SearchFolder, store_recovered
from spaces.candidate import Candidate
from tests.helpers.searches import measurement, stored, version

DENSE = version(-1, 0.90, 1e-3, 1000.0).measured
BUDGET = Budget.parse(["latency<0.51ms"])
BEST, HIDDEN, POOR = version(12, 0.893, 0.50e-3, 500), version(7, 0.881, 0.505e-3, 510), version(3, 0.65, 0.3e-3, 300)
ALL = [BEST, HIDDEN, POOR]


def again(one: Version, seconds: float, timings: int = 1) -> FreshTiming:
    return FreshTiming(one, measurement("latency", seconds), 1.0, timings)


def test_what_a_lucky_version_hid_comes_before_what_was_behind_it_on_the_old_front() -> None:
    assert best_version(ALL, [], "accuracy", BUDGET, DENSE, BEFORE) == BEST
    slower = [again(BEST, 0.60e-3)]
    assert best_version(ALL, slower, "accuracy", BUDGET, DENSE, BEFORE) == HIDDEN, "88.1%, not 65%"
    assert best_version(ALL, [*slower, again(HIDDEN, 0.52e-3)], "accuracy", BUDGET, DENSE, BEFORE) == POOR


@pytest.mark.parametrize(
    ("prefer", "found", "second"),
    [("latency", 0.508e-3, 12), ("flops", 0.6e-3, 12), ("knee", 0.6e-3, 12), ("accuracy", 0.6e-3, 12)],
)
def test_each_preference_ranks_by_what_was_found_now(prefer, found, second) -> None:
    first = best_version(ALL, [], prefer, BUDGET, DENSE, BEFORE)
    assert first is not None
    now = best_version(ALL, [again(first, found)], prefer, BUDGET, DENSE, BEFORE)
    assert now is not None
    assert now.number == (7 if first.number == 12 else second)


def test_a_version_that_keeps_the_limits_gives_way_where_another_beats_it_now() -> None:
    twin = version(9, 0.893, 0.501e-3, 500)
    slower = again(BEST, 0.505e-3)
    assert best_version([*ALL, twin], [slower], "accuracy", BUDGET, DENSE, BEFORE) == twin
    told = lines(
        FreshTimings((slower, again(twin, 0.501e-3)), again(twin, 0.501e-3), 2), None, "accuracy", BUDGET, DENSE
    )
    assert f"keeps {BUDGET}, but by accuracy another is better now" in "\n".join(told)


def test_words_tell_what_was_rejected_what_is_taken_and_what_a_wider_budget_would_win() -> None:
    taken = again(HIDDEN, 0.50e-3)
    found = FreshTimings((again(BEST, 0.60e-3, 2), taken), taken, 1)
    wider = wider_budget(found, ALL, "accuracy", BUDGET, DENSE, BEFORE)
    assert lines(found, wider, "accuracy", BUDGET, DENSE) == [
        "Measured again, and not taken:",
        "  trial 12, 89.30%: 0.50 ms in the search, 0.60 ms measured again (+20.0%, timed twice): latency 0.60 ms, 18%"
        " over latency<510us",
        "Instead trial 7 is taken: 88.10% on the validation images, -1.20 points against trial 12, and 0.50 ms instead"
        " of 0.60 ms.",
        "With --budget 'latency<620us' trial 12 (89.30%) would be taken.",
    ]
    told = json.loads(json.dumps(content(found, wider, BUDGET, DENSE)))
    assert [each["trial"] for each in told["rejected"]] == [12]
    assert told["rejected"][0]["timings"] == 2
    assert told["rejected"][0]["broken"]["latency<510us"] == pytest.approx(0.60 / 0.51 - 1)
    assert told["instead_of"]["accuracy_points"] == pytest.approx(-1.2)
    assert told["slack"] == {"budget": "latency<620us", "trial": 12, "accuracy": 0.893, "measured_again": True}


def test_a_wider_budget_is_in_the_units_of_the_limit_and_keeps_all_others() -> None:
    budget = Budget.parse(["latency<51%", "size<1MB"])
    found = FreshTimings((again(BEST, 0.60e-3),), None, 2)
    wider = wider_budget(found, ALL, "accuracy", budget, DENSE, BEFORE)
    assert wider is not None
    assert str(wider.budget) == "latency<62%,size<1MB"
    better = version(20, 0.899, 0.61e-3, 500)
    told = lines(
        found, wider_budget(found, [*ALL, better], "accuracy", budget, DENSE, BEFORE), "accuracy", budget, DENSE
    )
    assert "No version that was measured again keeps latency<51%,size<1MB; 2 more that kept it" in told[-2]
    assert told[-1] == "With --budget 'latency<62%,size<1MB' trial 20 (89.90%) would be tried first."


def test_nothing_is_said_where_the_first_choice_is_taken() -> None:
    taken = again(BEST, 0.505e-3)
    found = FreshTimings((taken,), taken, 2)
    assert lines(found, wider_budget(found, ALL, "accuracy", BUDGET, DENSE, BEFORE), "accuracy", BUDGET, DENSE) == []
    told = content(found, None, BUDGET, DENSE)
    assert (told["rejected"], told["passed_over"], told["instead_of"], told["slack"]) == ([], [], None, None)


def test_the_mean_of_two_measurements_has_the_samples_of_both() -> None:
    one, two = (replace(measurement("latency", value), spread=1e-5) for value in (1e-3, 2e-3))
    both = mean_of(one, scaled(replace(two, others={"worst": 4e-3}), 0.5))
    assert (both.value, both.n) == (1e-3, 200)
    assert both.spread < 1e-5


@pytest.fixture
def lucky(folder, pipeline, tmp_path) -> Path:
    """Returns the folder of a search whose most accurate version, of fp32, and one of int8 come before all others.

    By its baseline the fp32 reference takes twenty times as long as when the version was measured: so does the version.
    """
    runs = tmp_path / "runs"
    shutil.copytree(folder / "one", runs / "one")
    search = SearchFolder(runs / "one")
    versions = [each for each in stored(runs).versions if each.is_complete]
    given = [(narrower(pipeline, "fp32"), 0.999), (narrower(pipeline, "int8"), 0.985), *[(None, 0.5)] * len(versions)]
    for each, (candidate, accuracy) in zip(versions, given, strict=False):
        measured = {**each.measured, "accuracy": replace(each.measured["accuracy"], value=accuracy)}
        evaluation = replace(each.evaluation, candidate=candidate or each.evaluation.candidate, measurements=measured)
        with search.lock():
            store_recovered(search.create(), each.number, evaluation)
    with search.lock():
        forget_simple(search)
        slow(search, "fp32")
    return runs


def forget_simple(search: SearchFolder) -> None:
    """Leaves no version to a journal but those of its trials: the dense network breaks the limit on accuracy."""
    study = search.create()
    baseline = study.user_attrs["baseline"]
    measured = baseline["evaluation"]["measurements"]
    poor = {**measured, "accuracy": {**measured["accuracy"], "value": 0.9}}
    dense = {**baseline["evaluation"], "measurements": poor}
    study.set_user_attr("baseline", {**baseline, "evaluation": dense, "simple": []})


def narrower(pipeline, precision: str) -> Candidate:
    """Returns a pruned version in one precision, without exits."""
    choices = pipeline.space.candidate(pipeline.space.uniform(0.5, precision))
    return pipeline.space.with_thresholds(choices, choices.thresholds.without_exits())


def slow(search: SearchFolder, precision: str) -> None:
    study = search.create()
    baseline = study.user_attrs["baseline"]
    seconds = baseline["reference_seconds"]
    study.set_user_attr("baseline", baseline | {"reference_seconds": seconds | {precision: 20 * seconds[precision]}})


def picked(runs: Path, out: Path, capsys, *more: str) -> tuple[int, str, str]:
    limit = 4e3 * max(each.measured["latency"].value for each in stored(runs).versions if "latency" in each.measured)
    budget = f"latency<{limit:.3g}ms,accuracy>98%"
    code = run(["pick", "--runs", str(runs), "--search", "one", "--budget", budget, "--out", str(out), *more])
    return code, *capsys.readouterr()


def test_a_pick_that_falls_back_says_so(lucky, tmp_path, capsys) -> None:
    first, second = (next(each for each in stored(lucky).versions if accuracy(each) == at) for at in (0.999, 0.985))
    code, text, _ = picked(lucky, tmp_path / "deploy", capsys)
    assert code == 0
    assert f"Picked trial {second.number} by accuracy" in text
    assert "Measured again, and not taken:" in text
    assert f"  trial {first.number}, 99.90%: " in text
    assert f"Instead trial {second.number} is taken: 98.50% on the validation images, -1.40 points" in text
    assert f"trial {first.number} (99.90%) would be taken." in text
    code, text, _ = picked(lucky, tmp_path / "deploy", capsys, "--json")
    told = json.loads(text)
    assert (code, told["trial"]) == (0, second.number)
    assert [each["trial"] for each in told["rejected"]] == [first.number]
    assert told["rejected"][0]["latency"]["value"] > 5 * told["rejected"][0]["searched_latency_s"]
    assert told["slack"]["trial"] == first.number


def accuracy(one: Version) -> float:
    return one.measured["accuracy"].value if "accuracy" in one.measured else 0.0


def test_a_pick_that_finds_nothing_says_what_it_tried(lucky, tmp_path, capsys) -> None:
    search = SearchFolder(lucky / "one")
    with search.lock():
        slow(search, "int8")
    out = tmp_path / "deploy"
    code, text, errors = picked(lucky, out, capsys, "--json")
    told = json.loads(text)
    assert code == 1
    assert told["trial"] is None
    assert len(told["rejected"]) == 2
    assert told["untried"] == 0
    assert told["slack"] is not None
    assert errors.count("measured again (+") == 2
    assert "No version that was measured again keeps latency<" in errors
    assert not out.exists()
