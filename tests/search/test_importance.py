"""Which layers cost accuracy and which buy latency: what was put into versions comes out."""

import json
from dataclasses import replace

import numpy as np
import pytest

from search.report.html_page import page
from search.report.importance import IMPORTANCE, MIN_VERSIONS, importance
from search.report.matplotlib_figures import save_pictures
from search.report.overview import Overview
from search.report.report import report_of, to_json
from search.results.evaluation import Evaluation
from search.results.pareto import Version
from spaces.candidate import Candidate
from tests.helpers.searches import measurement, stored

FULL = {"dear": 16, "cheap": 32}


def version(number: int, channels: dict[str, int], int8: bool) -> Version:
    """Returns a version: `dear` channels cost accuracy, `cheap` ones time, and int8 both, on top of exits' savings."""
    lost = {name: 1 - count / FULL[name] for name, count in channels.items()}
    path = 0.010 * (1 - 0.05 * lost["dear"] - 0.6 * lost["cheap"] - 0.2 * int8)
    latency = replace(measurement("latency", min(path, 0.004)), others={"worst": path})
    accuracy = measurement("accuracy", 0.9 - 0.2 * lost["dear"] - 0.01 * lost["cheap"] - 0.03 * int8)
    others = {name: measurement(name, 1e3) for name in ("flops", "size", "params")}
    precision = {"dear": "int8" if int8 else "fp32", "cheap": "fp32"}
    measured = {"accuracy": accuracy, "latency": latency, **others}
    return Version(number, Evaluation(Candidate(channels, precision), measured, "none", ""))


DENSE = version(-1, FULL, int8=False)
DENSE = replace(
    DENSE,
    evaluation=replace(DENSE.evaluation, measurements={**DENSE.measured, "latency": measurement("latency", 0.01)}),
)


def versions(count: int) -> list[Version]:
    rng = np.random.default_rng(0)
    return [
        version(
            number, {"dear": int(rng.choice([8, 12, 16])), "cheap": int(rng.choice([8, 16, 24, 32]))}, number % 2 > 0
        )
        for number in range(count)
    ]


def test_each_change_is_told_what_it_costs_and_buys() -> None:
    found = importance(versions(60), DENSE)
    assert found is not None
    effects = {(each.name, each.change): each for each in found.effects}
    assert set(effects) == {("dear", "8 of 16 channels"), ("cheap", "8 of 32 channels"), ("dear", "int8")}
    expected = {("dear", "8 of 16 channels"): (-0.1, -0.025), ("cheap", "8 of 32 channels"): (-0.0075, -0.45)}
    expected[("dear", "int8")] = (-0.03, -0.2)
    for key, (accuracy, latency) in expected.items():
        assert (effects[key].accuracy, effects[key].latency) == pytest.approx((accuracy, latency), abs=0.01)
    assert [each.latency for each in found.effects] == sorted(each.latency for each in found.effects)
    assert min(found.accuracy_r2, found.latency_r2) > 0.98


def test_versions_that_broke_a_limit_tell_of_latency() -> None:
    some = versions(60)
    halves = [
        replace(each, evaluation=replace(each.evaluation, measurements={"latency": each.measured["latency"]}))
        for each in some[30:]
    ]
    found = importance([*some[:30], *halves], DENSE)
    assert found is not None
    assert found.latency_r2 > 0.98


def test_too_little_is_not_told_and_precisions_that_hardly_occur_are_not() -> None:
    assert importance(versions(MIN_VERSIONS - 1), DENSE) is None
    once = [version(number, {"dear": 8 + number % 9, "cheap": 32}, number == 0) for number in range(30)]
    found = importance(once, DENSE)
    assert found is not None
    assert {each.change for each in found.effects} == {"8 of 16 channels"}


def test_versions_that_are_all_alike_have_no_effects() -> None:
    found = importance([DENSE] * MIN_VERSIONS, DENSE)
    assert found is not None
    assert found.effects == ()


def test_the_report_shows_it_in_every_form(folder, tmp_path) -> None:
    search = replace(stored(folder), folder=replace(stored(folder).folder, path=tmp_path))
    shown = replace(
        Overview.of(search), dense=DENSE, simple=(DENSE,), versions=tuple(versions(40)), feasible=(), front=()
    )
    text = report_of(shown).to_markdown()
    assert f"## {IMPORTANCE}" in text
    assert "| dear | int8 | -20" in text or "| dear | int8 | -19" in text
    assert f">{IMPORTANCE}</h2>" in page(shown)
    save_pictures(shown, tmp_path)
    assert (tmp_path / "importance.png").is_file()
    assert len(json.loads(json.dumps(to_json(shown)))["importance"]["effects"]) == 3
