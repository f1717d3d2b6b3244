"""The picked version as a model of MLflow's registry: loaded, served over HTTP, and it answers as its bundle does."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import mlflow
import numpy as np
import pytest

from evaluators.bundle import run as run_bundle
from search.cli import run
from search.tracking.store import Tracking, quiet


@pytest.fixture(scope="module")
def picked(folder, tmp_path_factory) -> Path:
    """A run directory with a search that was picked from twice."""
    home = tmp_path_factory.mktemp("picked")
    runs = home / "runs"
    shutil.copytree(folder / "one", runs / "one")  # a registry of its own: other tests pick, too
    arguments = ["pick", "--runs", str(runs), "--search", "one", "--budget", "latency<1000%", "--quiet"]
    for prefer in ("accuracy", "latency"):
        assert run([*arguments, "--prefer", prefer, "--out", str(home / prefer)]) == 0
    return home


@pytest.fixture(autouse=True)
def no_server(monkeypatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def answers(bundle: Path, images) -> list[dict]:
    description = json.loads((bundle / "bundle.json").read_text())
    logits, routes, _ = run_bundle.answer(run_bundle.load(bundle), images, description["target"]["batch"])
    names = [*description["exits"], "end"]
    exits = [names[index] for index in run_bundle.exits_of(routes)]
    classes = description["class_names"]
    return [
        {"class": int(label), "exit": name, "name": classes[label]}
        for label, name in zip(logits.argmax(axis=1), exits, strict=True)
    ]


def test_every_pick_is_a_version_and_the_alias_is_at_the_last(picked) -> None:
    client = Tracking.of(picked / "runs").client()
    versions = sorted(client.search_model_versions("name='tiny'"), key=lambda found: int(found.version))
    assert [int(found.version) for found in versions] == [1, 2]
    assert int(client.get_model_version_by_alias("tiny", "deploy").version) == 2
    for found, bundle in zip(versions, ("accuracy", "latency"), strict=True):
        description = json.loads((picked / bundle / "bundle.json").read_text())
        assert found.tags["trial"] == str(description["trial"])
        metrics = client.get_run(found.run_id).data.metrics
        evaluation = json.loads((picked / bundle / "evaluation.json").read_text())
        test = evaluation["confirmed"]["test_accuracy"]["value"]
        assert metrics["test_accuracy_pct"] == pytest.approx(test * 100)
        searched = evaluation["search"]["measurements"]["latency"]["value"]
        assert metrics["latency_ms"] == pytest.approx(searched * 1e3, abs=1e-4)


def test_the_model_answers_as_its_bundle_does(picked) -> None:
    tracking = Tracking.of(picked / "runs")
    try:
        mlflow.set_tracking_uri(tracking.uri)
        with quiet():
            models = {version: mlflow.pyfunc.load_model(f"models:/tiny/{version}") for version in (1, 2)}
            info = mlflow.models.get_model_info("models:/tiny@deploy")
    finally:
        mlflow.set_tracking_uri(None)
    assert [column.name for column in info.signature.outputs] == ["class", "exit", "name"]
    assert info.signature.inputs.inputs[0].shape == (-1, 1, 8, 8)
    images = np.load(picked / "latency" / "check.npz")["images"]
    for version, bundle in ((1, "accuracy"), (2, "latency")):
        assert models[version].predict(images).to_dict("records") == answers(picked / bundle, images)
    example = info.saved_input_example_info
    assert example is not None


def test_a_pick_is_told_to_a_machine(picked, tmp_path, capsys) -> None:
    command = ["pick", "--runs", str(picked / "runs"), "--search", "one", "--budget", "latency<1000%", "--json"]
    assert run([*command, "--out", str(tmp_path / "deploy")]) == 0
    written = capsys.readouterr()
    found = json.loads(written.out)
    assert found["model"] == {"name": "tiny", "version": "3"}
    assert found["trial"] == json.loads((tmp_path / "deploy" / "bundle.json").read_text())["trial"]
    assert "Measuring the picked version afresh" in written.err


def test_a_pick_without_a_registry_is_a_bundle(picked, tmp_path, capsys) -> None:
    command = ["pick", "--runs", str(picked / "runs"), "--search", "one", "--budget", "latency<1000%"]
    assert run([*command, "--tracking-uri", "http://127.0.0.1:9", "--out", str(tmp_path / "deploy")]) == 0
    assert "is not registered" in capsys.readouterr().out
    assert (tmp_path / "deploy" / "run.py").is_file()


@pytest.mark.slow
def test_mlflow_serves_the_picked_version(picked) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/tiny@deploy", "--env-manager", "local"]
    settings = os.environ | {
        "MLFLOW_TRACKING_URI": Tracking.of(picked / "runs").uri,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    log = (picked / "serve.log").open("w")
    server = subprocess.Popen(
        [*command, "--port", str(port)], env=settings, stdout=log, stderr=log, start_new_session=True, cwd=picked
    )
    images = np.load(picked / "latency" / "check.npz")["images"][:3]
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations",
        json.dumps({"inputs": images.tolist()}).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        deadline = time.monotonic() + 120
        while True:
            assert server.poll() is None, (picked / "serve.log").read_text()
            assert time.monotonic() < deadline, (picked / "serve.log").read_text()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5):
                    break
            except OSError:
                time.sleep(0.5)
        with urllib.request.urlopen(request, timeout=60) as response:
            found = json.load(response)["predictions"]
        assert found == answers(picked / "latency", images)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(20)
