"""A search whose front is recovered in full: what is stored, shown and shipped afterwards."""

import json
import os
from pathlib import Path

import pytest

from search.cli import run
from search.config.study import Study
from search.loop.front_recovery import recover_front
from search.pipeline.pipeline import build_pipeline
from search.report.limits import what_limits
from search.report.overview import Overview
from search.report.report import report_of
from search.results.pareto import feasible, pareto
from search.results.store import SearchFolder, StoredSearch
from tests.helpers import tiny

STUDY = (
    tiny.STUDY.replace('budget = ["latency<1000%", "size<80%"]', 'budget = ["latency<1000%"]')
    .replace(
        tiny.RECOVERY,
        'recovery = {level = "elastic", images = 64, elastic = {epochs = 1, batch = 50},'
        " final = {epochs = 1, batch = 50, versions = 50}}",
    )
    .replace('name = "tiny"', 'name = "elastic"')
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, cache) -> Path:
    """A finished search, and where it lies."""
    home = tmp_path_factory.mktemp("recovered")
    (home / "study.toml").write_text(STUDY)
    here = Path.cwd()
    os.chdir(home)
    try:
        assert run(["--study", "./study.toml", "--search", "one", "--trials", "14", "--runs", "runs"]) == 0
    finally:
        os.chdir(here)
    return home / "runs"


@pytest.fixture
def search(runs) -> StoredSearch:
    return StoredSearch.read(SearchFolder(runs / "one"))


def test_every_pruned_version_of_the_front_is_recovered_in_full(search) -> None:
    front = pareto(feasible(search.versions, search.budget, search.baseline.evaluation.measurements), search.objectives)
    dense = search.baseline.evaluation.candidate.channels
    pruned = [version for version in front if version.evaluation.candidate.channels != dense]
    assert search.recovered
    assert pruned
    for version in pruned:
        assert version.number in search.recovered
        assert version.evaluation.effort == "elastic 1 epoch or 30 CPU min + finetune 1 epoch"
        assert version.evaluation.finetune["epochs"] == 1
        assert version.is_complete


def test_what_the_search_measured_at_its_own_effort_stays_in_the_journal(search) -> None:
    for trial in search.trials:
        if trial.number in search.recovered:
            assert trial.user_attrs["evaluation"]["effort"] == "elastic 1 epoch or 30 CPU min"
            assert trial.user_attrs["evaluation"]["digest"] != search.recovered[trial.number].digest
    efforts = {trial.user_attrs["evaluation"]["effort"] for trial in search.trials if "evaluation" in trial.user_attrs}
    assert efforts <= {"elastic 1 epoch or 30 CPU min", "as given"}


def test_the_same_command_recovers_nothing_again(runs, search, monkeypatch, capsys) -> None:
    monkeypatch.chdir(runs.parent)
    before = (runs / "one" / "journal.log").read_bytes()
    assert run(["--study", "./study.toml", "--search", "one", "--trials", "14", "--runs", "runs"]) == 0
    assert (runs / "one" / "journal.log").read_bytes() == before
    assert "were recovered" not in capsys.readouterr().out


def test_recovering_goes_on_where_it_was_stopped(runs, search, cache) -> None:
    stored = SearchFolder(runs / "one").open()
    pipeline = build_pipeline(search.study, lambda *_: None)
    assert recover_front(pipeline, stored, search.baseline, lambda _: None) == 0


def test_the_recovered_weights_are_what_is_shipped(runs, search, monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.chdir(runs.parent)
    assert run(["pick", "--prefer", "flops", "--runs", "runs", "--out", str(tmp_path / "out")]) == 0
    told = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert told["confirmed"]["same_artifact"]
    assert told["search"]["effort"].endswith("+ finetune 1 epoch")
    assert "recovery  elastic 1 epoch or 30 CPU min + finetune 1 epoch" in capsys.readouterr().out


def test_a_pick_can_be_trained_on(runs, monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.chdir(runs.parent)
    line = ["pick", "--prefer", "flops", "--runs", "runs", "--out", str(tmp_path / "out"), "--finetune", "3epochs"]
    assert run(line) == 0
    told = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert told["search"]["effort"] == "elastic 1 epoch or 30 CPU min + finetune 3 epochs"
    assert told["search"]["finetune"]["epochs"] == 3
    assert told["confirmed"]["same_artifact"]


def test_mlflow_has_both_efforts(runs, search) -> None:
    from mlflow import MlflowClient

    from search.tracking.store import tracking_uri

    client = MlflowClient(tracking_uri(runs))
    experiment = client.get_experiment_by_name("elastic")
    number = min(search.recovered)
    (found,) = client.search_runs([experiment.experiment_id], f"tags.trial = '{number}' and tags.role = 'trial'")
    history = client.get_metric_history(found.info.run_id, "accuracy_pct")
    assert [point.step for point in history] == [0, 1]
    assert found.data.tags["effort"].endswith("+ finetune 1 epoch")


@pytest.mark.parametrize("key", ["levl", "elastik"])
def test_an_unknown_key_of_a_recovery_is_named(key) -> None:
    from search.config.study import StudyError

    with pytest.raises(StudyError, match=key):
        Study.parse(tiny.STUDY.replace("level", key), "test")


AUTOMATIC = STUDY.replace("final = {epochs = 1, batch = 50, versions = 50}", "final = {of_search = 0.3, batch = 50}")


@pytest.fixture(scope="module")
def automatic(tmp_path_factory, cache) -> StoredSearch:
    """A finished search whose time after it was shared out by the forecast."""
    home = tmp_path_factory.mktemp("automatic")
    (home / "study.toml").write_text(AUTOMATIC.replace('name = "elastic"', 'name = "automatic"'))
    line = ["--study", str(home / "study.toml"), "--search", "one", "--trials", "12", "--runs", str(home / "runs")]
    assert run(line) == 0
    return StoredSearch.read(SearchFolder(home / "runs" / "one"))


def test_time_after_a_search_is_shared_out(automatic) -> None:
    assert automatic.rounds
    for number, rounds in automatic.rounds.items():
        assert rounds[0].images == 0
        assert [each.images for each in rounds] == sorted(each.images for each in rounds)
        kept = automatic.recovered.get(number)
        if kept is not None:
            assert kept.measurements["accuracy"].value == max(each.accuracy for each in rounds)
            assert kept.trained["images"] in [each.images for each in rounds]
    spent = sum(rounds[-1].seconds for rounds in automatic.rounds.values())
    durations = sum(trial.duration.total_seconds() for trial in automatic.trials)
    assert spent < durations, "0.3 of the search's time was asked for; the shortest round takes two seconds"


def test_a_report_says_what_would_gain_most(automatic) -> None:
    said = what_limits(Overview.of(automatic))
    assert any(line.startswith("More recovery: ") and "images" in line for line in said)
    assert any(line.startswith("More trials: the last 3 of 12 added") for line in said)
    assert any("[space] sizes" in line for line in said)
    text = report_of(Overview.of(automatic)).to_markdown()
    assert "## What would gain most" in text
    assert all(f"- {line}" in text for line in said)
