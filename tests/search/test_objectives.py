"""A search improves the objectives that it is given; all else that is measured stays in tables and limits."""

import json
from pathlib import Path

import pytest
from optuna.study import StudyDirection

from evaluators.measurement import METRICS
from search.cli import run
from search.config.objectives import OBJECTIVES, Objectives, together
from search.config.overrides import Request
from search.config.study import Study, StudyError
from search.results.folders import StoreError
from search.results.store import SearchFolder, StoredSearch
from tests.helpers import tiny
from tests.helpers.searches import stored

BUDGET = "latency<1000%,flops<98%"


def study(objectives: str) -> Study:
    search = f"search = {{trials = 12, objectives = {objectives}}}"
    return Study.parse(tiny.STUDY.replace("search = {trials = 12}", search), "mine.toml")


def test_whatever_is_measured_may_be_an_objective() -> None:
    assert set(OBJECTIVES) == set(METRICS)


def test_accuracy_and_latency_count_unless_others_are_given() -> None:
    assert Study.parse(tiny.STUDY, "mine.toml").objectives == ("accuracy", "latency")
    assert study('["size", "accuracy", "size"]').objectives == ("accuracy", "size"), "in their own order, once"
    assert Request(objectives=("accuracy", "flops")).to_study().objectives == ("accuracy", "flops")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ('["accuracy", "latncy"]', r"did you mean 'latency'\?\), got \['accuracy', 'latncy'\]; leave it out"),
        ('["accuracy", "memory"]', "search.objectives is accuracy and at least one of latency, flops, params, size"),
        ('["latency", "flops"]', "is accuracy and at least one of"),
        ('["accuracy"]', "is accuracy and at least one of"),
        ("[]", "is accuracy and at least one of"),
        ('"accuracy"', "search.objectives is a list in brackets"),
    ],
)
def test_what_is_no_choice_of_objectives_is_one_clear_line(given: str, words: str) -> None:
    with pytest.raises(StudyError, match=words):
        study(given)


def test_other_objectives_are_another_question_and_the_usual_ones_are_not() -> None:
    usual = Study.parse(tiny.STUDY, "mine.toml")
    assert study('["accuracy", "latency"]').question_key == usual.question_key
    keys = {study(f'["accuracy", "{cost}"]').question_key for cost in ("latency", "flops", "size")}
    assert len(keys) == 3
    three = study('["accuracy", "latency", "flops"]')
    assert Study.parse(three.to_toml(), "again") == three


def test_objectives_are_told_in_words() -> None:
    assert together(("accuracy", "latency")) == "accuracy and latency"
    assert together(("accuracy", "latency", "flops", "size")) == "accuracy, latency, FLOPs and size"


def test_a_journal_has_a_direction_for_each_objective_and_keeps_them(tmp_path: Path) -> None:
    folder = SearchFolder(tmp_path / "one")
    chosen: Objectives = ("accuracy", "latency", "size")
    with folder.lock():
        assert folder.create(chosen).directions == [StudyDirection.MAXIMIZE, *[StudyDirection.MINIMIZE] * 2]
    assert folder.objectives(None) == folder.objectives(chosen) == chosen
    with pytest.raises(StoreError, match="which has accuracy, latency, size; give another --search"):
        folder.objectives(("accuracy", "latency", "flops"))


def test_a_search_for_accuracy_and_latency_measures_flops_and_shows_them(folder, capsys) -> None:
    search = stored(folder)
    assert search.objectives == ("accuracy", "latency")
    assert {len(trial.values) for trial in search.trials if trial.values} == {2}
    assert all("flops" in version.measured for version in search.versions)
    assert run(["front", "--runs", str(folder), "--search", "one"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "none is beaten in accuracy and latency together" in shown
    assert "FLOPs" in shown
    assert run(["front", "--runs", str(folder), "--search", "one", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["objectives"] == ["accuracy", "latency"]


def searched(folder: Path, objectives: str, trials: int, *more: str) -> StoredSearch:
    (folder / "study.toml").write_text(tiny.STUDY)
    asked = ["--study", str(folder / "study.toml"), "--runs", str(folder), "--search", "mine", "--budget", BUDGET]
    assert run([*asked, "--objectives", objectives, "--trials", str(trials), *more]) == 0
    return stored(folder, "mine")


@pytest.mark.slow
def test_a_limit_on_flops_stays_a_constraint_where_flops_are_no_objective(tmp_path: Path, cache: Path) -> None:
    search = searched(tmp_path, "accuracy,latency", 22)
    assert search.report["proposals"], "our sampler proposed something"
    limits = {name for trial in search.trials for name in trial.constraints}
    assert "flops<98%" in limits
    assert all(len(trial.values) == 2 for trial in search.trials if trial.values)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["ehvi", "tpe"])
def test_a_search_for_size_goes_on_for_size(sampler: str, tmp_path: Path, cache: Path, capsys) -> None:
    search = searched(tmp_path, "accuracy,size", 22, "--sampler", sampler)
    assert search.objectives == ("accuracy", "size")
    for trial in search.trials:
        if trial.values and "evaluation" in trial.user_attrs:
            assert trial.values[1] == trial.user_attrs["evaluation"]["measurements"]["size"]["value"]
    assert run(["report", "--runs", str(tmp_path), "--search", "mine"]) == 0
    report = (tmp_path / "mine" / "report.md").read_text()
    assert "no other beats in accuracy and size together" in report
    assert "smallest" in report
    assert "fastest" not in report
    asked = ["--study", str(tmp_path / "study.toml"), "--runs", str(tmp_path), "--search", "mine", "--budget", BUDGET]
    assert run([*asked, "--trials", "24", "--sampler", sampler]) == 0, "the search's own objectives stand"
    assert stored(tmp_path, "mine").objectives == ("accuracy", "size")
    capsys.readouterr()
    assert run([*asked, "--objectives", "accuracy,latency"]) == 2
    assert "which has accuracy, size; give another --search" in " ".join(capsys.readouterr().err.split())
