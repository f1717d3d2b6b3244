"""MLflow's mirror: all that the journal has, nothing twice, whatever happens to MLflow."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from search.cli import run
from search.results.pareto import feasible, pareto
from search.results.store import SearchFolder, store_sampler
from search.tracking.mirror import Follower, Mirror
from search.tracking.store import MODE, Tracking, quiet, remember, remembered
from search.tracking.summary_run import note
from tests.helpers import tiny
from tests.helpers.searches import ROOT, finished, stored


@pytest.fixture(autouse=True)
def no_server(monkeypatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    """A run directory with the search's journal and nothing in MLflow."""
    shutil.copytree(folder / "one", tmp_path / "runs" / "one")
    return tmp_path / "runs"


def runs_of(tracking: Tracking, role: str) -> list[Run]:
    client = tracking.client()
    experiments = [found.experiment_id for found in client.search_experiments() if found.name == "tiny"]
    return list(client.search_runs(experiments, f"tags.role = '{role}'"))


def numbers(tracking: Tracking) -> list[int]:
    return sorted(int(run.data.tags["trial"]) for run in runs_of(tracking, "trial"))


def test_mlflow_mirrors_the_journal(folder) -> None:
    search, tracking = stored(folder), Tracking.of(folder)
    trials, (summary,) = runs_of(tracking, "trial"), runs_of(tracking, "summary")
    assert numbers(tracking) == list(range(12))
    front = pareto(feasible(search.versions, search.budget, search.baseline.evaluation.measurements), search.objectives)
    marked = {int(run.data.tags["trial"]) for run in trials if run.data.tags["front"] == "true"}
    assert marked == {version.number for version in front}
    for logged in trials:
        assert logged.info.status == "FINISHED"
        assert logged.data.tags["search"] == "one"
        assert logged.data.tags["sampler"] == "ehvi"
        trial = search.trials[int(logged.data.tags["trial"])]
        evaluation = trial.user_attrs.get("evaluation")
        if evaluation and "latency" in evaluation["measurements"]:
            metrics, measured = logged.data.metrics, evaluation["measurements"]
            assert metrics["latency_ms"] == pytest.approx(measured["latency"]["value"] * 1e3, abs=1e-4)
            assert metrics["size_mb"] == pytest.approx(measured["size"]["value"] / 1e6, abs=1e-4)
            over = trial.constraints["latency<1000%"]
            assert metrics["margin_latency_pct"] == pytest.approx(-100 * over, abs=1e-3)
            assert logged.data.tags["effort"] == evaluation["effort"]
            assert (logged.data.tags["feasible"] == "true") == all(value <= 0 for value in trial.constraints.values())
        assert any(name.startswith("precision.") for name in logged.data.params)
    client = tracking.client()
    names = {artifact.path for artifact in client.list_artifacts(summary.info.run_id)}
    assert {"report.html", "report.md", "front.png", "layers.png", "front.json", "study.json"} <= names
    assert summary.data.metrics["front_trials"] == len(front)
    assert "sampler_held_out_size_80_count" in summary.data.metrics, "what was told of the limit size<80%"
    assert len(client.get_metric_history(summary.info.run_id, "hypervolume_pct")) == sum(
        version.is_complete for version in search.versions
    )
    text = summary.data.tags["mlflow.note.content"]
    for logged in trials:
        if logged.data.tags["front"] == "true":
            assert f"(#/experiments/{logged.info.experiment_id}/runs/{logged.info.run_id}{MODE})" in text
    files = folder / "artifacts" / summary.info.run_id
    assert sum(file.stat().st_size for file in files.rglob("*") if file.is_file()) < 10e6


def test_sync_completes_the_mirror_once(copy, capsys) -> None:
    arguments = ["sync", "--runs", str(copy), "--json"]
    assert run(arguments) == 0
    assert json.loads(capsys.readouterr().out)["written"] == 12
    tracking = Tracking.of(copy)
    before = {each.info.run_id: each.data.to_dictionary() for each in runs_of(tracking, "trial")}
    assert run(arguments) == 0
    assert json.loads(capsys.readouterr().out)["written"] == 0
    assert {each.info.run_id: each.data.to_dictionary() for each in runs_of(tracking, "trial")} == before
    (summary,) = runs_of(tracking, "summary")
    assert [file.name for file in (copy / "artifacts").iterdir()] == [summary.info.run_id]


def test_a_run_that_was_begun_is_completed_and_a_twin_goes(copy) -> None:
    tracking, search = Tracking.of(copy), stored(copy)
    mirror = Mirror(tracking, search)
    client = tracking.client()
    tags = {"search": "one", "role": "trial", "trial": "3", "front": "false"}
    begun = client.create_run(mirror.experiment_id, tags=tags).info.run_id  # and then the process was killed
    mirror.write_one(search.trials[5])
    mirror.write_one(search.trials[5])  # as after an answer that was lost
    assert numbers(tracking) == [3, 5, 5]
    assert mirror.write(search.trials) == 11
    assert numbers(tracking) == list(range(12))
    assert client.get_run(begun).info.status == "FINISHED"
    assert "latency_ms" in client.get_run(begun).data.metrics or "reason" in client.get_run(begun).data.tags


def test_a_search_goes_on_where_mlflow_cannot_be_written(copy, monkeypatch) -> None:
    search, said = stored(copy), []
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens there
        lost = Tracking(f"http://me:secret@127.0.0.1:{taken.getsockname()[1]}", None)
        monkeypatch.setattr("search.tracking.mirror.PAUSE_S", 0.0)
        follower = Follower(lost, search, said.append)
        follower.begin()
        for trial in search.trials[:3]:
            follower.trial_done(trial, 0.0)
        assert not follower.finish(search)
    assert len(said) == 1
    assert shlex.split(said[0].partition("Later: ")[2])[3:] == ["sync", "--search", "one", "--runs", str(copy)]
    assert "secret" not in said[0]


def test_a_note_holds_as_many_rows_as_mlflow_keeps(folder) -> None:
    from dataclasses import replace

    from search.report.overview import Overview

    overview = Overview.of(stored(folder))
    long = replace(overview, front=overview.front * 200)
    text = note(long, lambda version: f"#/experiments/1/runs/{'0' * 32}")
    assert len(text) < 8000
    assert f"of {len(long.front)}" in text or "more, see front.json" in text
    assert "| dense |" in text


def test_where_runs_go_is_remembered_without_a_password(tmp_path, monkeypatch) -> None:
    folder = SearchFolder(tmp_path / "one")
    with folder.lock():
        study = folder.create()
    assert Tracking.of(tmp_path).uri == f"sqlite:///{tmp_path}/mlflow.db"
    remember(study, Tracking.of(tmp_path), tmp_path)
    assert remembered(study) is None
    remember(study, Tracking.of(tmp_path, "https://me:secret@mlflow.example/x"), tmp_path)
    assert remembered(study) == "https://mlflow.example/x"
    assert Tracking.of(tmp_path, None, remembered(study)).web == "https://mlflow.example/x"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere:5000")
    assert Tracking.of(tmp_path, None, remembered(study)).uri == "http://elsewhere:5000"
    assert Tracking.of(tmp_path, "http://here:5000").uri == "http://here:5000"


def test_each_trial_has_the_sampler_that_was_at_work(folder, tmp_path) -> None:
    shutil.copytree(folder / "one", tmp_path / "one")
    store_sampler(SearchFolder(tmp_path / "one").open(), "front")
    store_sampler(SearchFolder(tmp_path / "one").open(), "random")
    search = stored(tmp_path)
    last = len(search.trials)
    assert [search.sampler_of(number) for number in (0, last - 1, last)] == ["ehvi", "ehvi", "random"], (
        "it was called front before"
    )


def test_a_server_that_does_not_answer_is_named_before_anything_is_trained(tmp_path, capsys) -> None:
    (tmp_path / "study.toml").write_text(tiny.STUDY)
    command = ["--study", str(tmp_path / "study.toml"), "--runs", str(tmp_path / "runs")]
    assert run([*command, "--tracking-uri", "http://127.0.0.1:9"]) == 2
    error = capsys.readouterr().err
    assert "http://127.0.0.1:9" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def serve(home: Path, port: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{home}/server.db"]
    command += ["--artifacts-destination", str(home / "files"), "--host", "127.0.0.1", "--port", str(port)]
    settings = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "PATH": "/usr/bin:/bin", "HOME": str(home)}
    server = subprocess.Popen(
        [*command, "--workers", "1"], env=settings, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return server
        time.sleep(0.2)
    raise AssertionError("the server did not start")


def wait_for_runs(tracking: Tracking, count: int) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        if len(numbers(tracking)) >= count:
            return
        time.sleep(0.1)
    raise AssertionError("the search did not get that far")


def end(server: subprocess.Popen) -> None:
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()


@pytest.mark.slow
def test_a_server_that_dies_in_the_middle_costs_nothing(tmp_path, cache, capsys) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "study.toml").write_text(tiny.STUDY)
    tracking = Tracking(f"http://127.0.0.1:{port}", None)
    server = serve(tmp_path, port)
    try:
        command = ["--study", str(tmp_path / "study.toml"), "--search", "one", "--runs", str(tmp_path / "runs")]
        search = subprocess.Popen(
            [sys.executable, "-m", "search", *command, "--tracking-uri", tracking.uri],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        wait_for_runs(tracking, 3)
        end(server)
        output, _ = search.communicate(timeout=240)
        assert search.returncode in (0, 1), output
        assert output.count("Careful: MLflow") == 1, output
        assert len(finished(stored(tmp_path / "runs").trials)) == 12
        server = serve(tmp_path, port)
        with quiet():
            assert 0 < len(numbers(tracking)) < 12
        # The search remembers its server.
        assert run(["sync", "--runs", str(tmp_path / "runs"), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["tracking"] == tracking.uri
        assert Counter(numbers(tracking)) == Counter(range(12))
        assert all(each.info.status in ("FINISHED", "FAILED") for each in runs_of(tracking, "trial"))
        (summary,) = runs_of(tracking, "summary")
        client: MlflowClient = tracking.client()
        page = Path(client.download_artifacts(summary.info.run_id, "report.html")).read_text()
        assert f"{tracking.uri}/#/experiments/" in page
        assert run(["ui", "--runs", str(tmp_path / "runs")]) == 0
        links = re.findall(r"http://\S+", capsys.readouterr().out)
        assert summary.info.run_id in links[0]
        assert all(MODE in link for link in links)
    finally:
        end(server)
