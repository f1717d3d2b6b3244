"""Whole searches on the tests' study: real training, real sessions, real crashes."""

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from optuna.trial import TrialState

from search.budget import Budget
from search.cli import run
from search.coordinator import Coordinator
from search.evaluation import Evaluation
from search.front import Version, feasible, pareto
from search.store import SearchFolder, StoredSearch
from search.study import Study
from tests import tiny

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory, cache) -> Path:
    """A finished search of twelve trials, and where it lies."""
    home = tmp_path_factory.mktemp("search")
    (home / "study.toml").write_text(tiny.STUDY)
    (home / "mlruns").mkdir()  # a folder that MLflow would take for a store of its own
    here = Path.cwd()
    os.chdir(home)
    try:
        assert run(["--study", "./study.toml", "--search", "one", "--runs", "runs"]) in (0, 1)
    finally:
        os.chdir(here)
    return home / "runs"


def stored(folder: Path, name: str = "one") -> StoredSearch:
    return StoredSearch.read(SearchFolder(folder / name))


def finished(trials) -> list:
    return [trial for trial in trials if trial.state.is_finished()]


def test_every_trial_is_stored_with_all_that_was_measured(folder) -> None:
    search = stored(folder)
    assert len(finished(search.trials)) == 12
    assert search.baseline.evaluation.measurements.keys() == {"params", "size", "flops", "latency", "accuracy"}
    for trial in finished(search.trials):
        assert trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
        if "duplicate_of" in trial.user_attrs:
            continue
        evaluation = Evaluation.from_dict(trial.user_attrs["evaluation"])
        assert Evaluation.from_dict(json.loads(json.dumps(evaluation.to_dict()))) == evaluation
        violations = search.budget.violations(evaluation.measurements, search.baseline.evaluation.measurements)
        assert trial.constraints == pytest.approx(violations)
        # Only a broken budget may leave the dear metrics out.
        assert ("accuracy" in evaluation.measurements) or max(violations.values()) > 0


def test_no_candidate_is_measured_twice(folder) -> None:
    keys = [version.evaluation.candidate.key for version in stored(folder).versions]
    assert len(keys) == len(set(keys))


def test_the_same_command_finds_nothing_left_to_do(folder, capsys) -> None:
    before = (folder / "one" / "journal.log").read_bytes()
    study = str(folder.parent / "study.toml")
    run(["--study", study, "--search", "one", "--runs", str(folder)])
    assert "12 trials are there" in capsys.readouterr().out
    assert [trial.number for trial in finished(stored(folder).trials)] == list(range(12))
    assert (folder / "one" / "journal.log").read_bytes().startswith(before)


def test_another_question_in_the_same_folder_is_refused(folder, capsys) -> None:
    study = str(folder.parent / "study.toml")
    before = (folder / "one" / "journal.log").read_bytes()
    assert run(["--study", study, "--search", "one", "--runs", str(folder), "--budget", "latency<50%"]) == 2
    assert "belongs to study 'tiny' with latency<1000%,size<80%" in capsys.readouterr().err
    assert (folder / "one" / "journal.log").read_bytes() == before


def test_a_search_does_not_go_on_with_another_network(folder, tmp_path, capsys) -> None:
    shutil.copytree(folder / "one", tmp_path / "one")
    journal = tmp_path / "one" / "journal.log"
    print_of = json.loads(next(line for line in journal.read_text().splitlines() if '"fingerprint"' in line))[
        "user_attr"
    ]["fingerprint"]
    journal.write_text(journal.read_text().replace(print_of, "0" * 16))
    before = journal.read_bytes()
    study = str(folder.parent / "study.toml")
    assert run(["--study", study, "--search", "one", "--runs", str(tmp_path)]) == 2
    assert "the network and the images that it began with" in capsys.readouterr().err
    assert journal.read_bytes() == before


def test_front_in_all_its_forms_says_the_same(folder, capsys) -> None:
    loose = ["--runs", str(folder), "--search", "one", "--budget", "latency<1000%"]
    assert run(["front", *loose, "--json"]) == 0
    as_json = json.loads(capsys.readouterr().out)
    assert run(["front", *loose, "--csv"]) == 0
    as_csv = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    search = stored(folder)
    front = pareto(feasible(search.versions, Budget.parse(["latency<1000%"]), search.baseline.evaluation.measurements))
    numbers = [version.number for version in front]
    assert [entry["trial"] for entry in as_json["front"]] == numbers
    assert [row["trial"] for row in as_csv] == [*map(str, numbers), "dense"]
    assert run(["front", *loose]) == 0
    assert f"{len(numbers)} versions within" in capsys.readouterr().out


def test_a_budget_that_nothing_meets_names_the_nearest_miss(folder, tmp_path, capsys) -> None:
    arguments = ["--runs", str(folder), "--search", "one", "--budget", "latency<1us"]
    assert run(["front", *arguments]) == 1
    assert run(["pick", *arguments, "--out", str(tmp_path / "deploy")]) == 1
    text = capsys.readouterr().out
    assert "No version keeps latency<1us" in text
    assert "over latency<1us" in text
    assert not (tmp_path / "deploy").exists()


def test_mlflow_mirrors_the_journal(folder) -> None:
    from mlflow import MlflowClient

    from search.tracking import tracking_uri

    client = MlflowClient(tracking_uri(folder))
    (experiment,) = [found for found in client.search_experiments() if found.name == "tiny"]
    runs = client.search_runs([experiment.experiment_id])
    trials = [run for run in runs if run.data.tags["role"] == "trial"]
    (summary,) = [run for run in runs if run.data.tags["role"] == "summary"]
    search = stored(folder)
    assert sorted(int(run.data.tags["trial"]) for run in trials) == list(range(12))
    assert all(run.data.tags["search"] == "one" for run in runs)
    front = pareto(feasible(search.versions, search.budget, search.baseline.evaluation.measurements))
    marked = {int(run.data.tags["trial"]) for run in trials if run.data.tags["front"] == "true"}
    assert marked == {version.number for version in front}
    for logged in trials:
        evaluation = search.trials[int(logged.data.tags["trial"])].user_attrs.get("evaluation")
        if evaluation and "latency" in evaluation["measurements"]:
            measured = evaluation["measurements"]["latency"]["value"]
            assert logged.data.metrics["latency_ms"] == pytest.approx(measured * 1e3, abs=1e-4)
            over = search.trials[int(logged.data.tags["trial"])].constraints["latency<1000%"]
            assert logged.data.metrics["margin_latency_pct"] == pytest.approx(-100 * over, abs=1e-3)
        assert any(name.startswith("precision.") for name in logged.data.params)
    names = {artifact.path for artifact in client.list_artifacts(summary.info.run_id)}
    assert {"front.html", "front.png", "front.json", "study.json", "environment.txt"} <= names
    assert summary.data.metrics["front_trials"] == len(front)
    page = Path(client.download_artifacts(summary.info.run_id, "front.html")).read_text()
    assert "https://cdn" not in page.split("plotly.js v")[0]


def test_the_bundle_answers_as_measured_in_a_bare_interpreter(folder, tmp_path, capsys, bench) -> None:
    out = tmp_path / "deploy"
    arguments = ["--runs", str(folder), "--search", "one", "--budget", "latency<1000%", "--out", str(out)]
    assert run(["pick", *arguments]) == 0
    text = capsys.readouterr().out
    assert "measured again" in text
    names = {file.name for file in out.iterdir()}
    needed = {"candidate.json", "evaluation.json", "study.toml", "environment.json", "run.py", "bundle.json"}
    assert needed <= names
    evaluation = json.loads((out / "evaluation.json").read_text())
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(out, elsewhere)
    script = (
        "import sys, runpy\n"
        "class Bare:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'onnx', 'search', 'evaluators', 'spaces'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Bare())\n"
        "sys.argv = ['run.py']\n"
        f"runpy.run_path({str(elsewhere / 'run.py')!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    accuracy = evaluation["confirmed"]["test_accuracy"]["value"]
    assert f"accuracy: {accuracy:.4%}" in done.stdout
    assert json.loads((out / "bundle.json").read_text())["check"]["images"] == len(bench.data.test)
    # A second pick may replace it; something else in the way may not be.
    assert run(["pick", *arguments]) == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    assert run(["pick", *arguments[:-1], str(tmp_path / "mine")]) == 2
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "precious"


def test_a_bundle_is_measured_again(folder, tmp_path, capsys) -> None:
    out = tmp_path / "deploy"
    arguments = ["--runs", str(folder), "--search", "one", "--budget", "latency<1000%", "--out", str(out)]
    assert run(["pick", *arguments]) == 0
    capsys.readouterr()
    assert run(["measure", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["correct"] == found["expected"]
    assert found["calls"] >= 150
    assert 0 < found["latency_s"] <= found["percentiles"]["p99"]
    assert run(["measure", str(out)]) == 0
    assert "check images" in capsys.readouterr().out
    assert run(["measure", str(tmp_path)]) == 2
    assert "bundle.json" in capsys.readouterr().err


def test_a_bundle_with_engines_falls_back_where_they_cannot_run(folder, tmp_path) -> None:
    from evaluators.runtimes.ssh import worker_file

    out = tmp_path / "deploy"
    arguments = ["--runs", str(folder), "--search", "one", "--budget", "latency<1000%", "--out", str(out)]
    assert run(["pick", *arguments]) == 0
    (out / "runtime.pyz").write_bytes(worker_file())
    (out / "engines.json").write_text(json.dumps({"engines": [{"file": "none.engine", "source": "x", "results": []}]}))
    # In isolated mode nothing of this project can be imported but what the bundle brings.
    command = [sys.executable, "-I", "-S", "-c", "import sys; sys.path += eval(sys.argv.pop(1)); sys.argv.pop(0);"]
    command[-1] += "import runpy; runpy.run_path(sys.argv[0], run_name='__main__')"
    packages = [path for path in sys.path if path.endswith("site-packages")]
    done = subprocess.run(
        [*command, repr(packages), str(out / "run.py")], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "the engines cannot be used here" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_bundle_that_was_damaged_says_so(folder, tmp_path) -> None:
    out = tmp_path / "deploy"
    arguments = ["--runs", str(folder), "--search", "one", "--budget", "latency<1000%", "--out", str(out)]
    assert run(["pick", *arguments]) == 0
    description = json.loads((out / "bundle.json").read_text())
    description["check"]["correct"] -= 1
    (out / "bundle.json").write_text(json.dumps(description))
    done = subprocess.run([sys.executable, str(out / "run.py")], capture_output=True, text=True, check=False)
    assert done.returncode == 1


def start(home: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "search", "--study", str(home / "study.toml"), "--runs", str(home / "runs")]
    return subprocess.Popen(
        [*command, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_trials(journal: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if journal.is_file() and journal.read_bytes().count(b'"evaluation"') > count:  # the dense network's is one too
            return
        time.sleep(0.02)
    raise AssertionError("the search did not get that far")


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_search_goes_on_where_it_was(stop, tmp_path, cache) -> None:
    (tmp_path / "study.toml").write_text(tiny.STUDY)
    process = start(tmp_path, "--search", "one")
    wait_for_trials(tmp_path / "runs" / "one" / "journal.log", 4)
    process.send_signal(stop)
    output, _ = process.communicate(timeout=60)
    if stop == signal.SIGINT:
        assert process.returncode == 130, output
        assert "interrupted" in output
    before = SearchFolder(tmp_path / "runs" / "one").open().trials
    done = {trial.number: trial for trial in before if "evaluation" in trial.user_attrs}
    assert len(done) >= 4
    process = start(tmp_path, "--search", "one")
    output, _ = process.communicate(timeout=120)
    assert process.returncode in (0, 1), output
    after = stored(tmp_path / "runs")
    for number, trial in done.items():
        assert after.trials[number].user_attrs == trial.user_attrs
        assert after.trials[number].values == trial.values
    keys = [version.evaluation.candidate.key for version in after.versions]
    assert len(keys) == len(set(keys))
    counted = [trial for trial in after.trials if trial.state.is_finished() and "interrupted" not in trial.user_attrs]
    assert len(counted) == 12
    assert not [trial for trial in after.trials if trial.state == TrialState.RUNNING]


class Wrecked:
    """A workbench whose evaluations fail as told, and otherwise those of a real one."""

    def __init__(self, bench, reasons) -> None:
        self.study, self.space = bench.study, bench.space
        self.latency_evaluator = bench.latency_evaluator
        self._evaluate, self._reasons = bench.evaluate, reasons

    def evaluate(self, candidate, latency, stop):
        reason = next(self._reasons)
        if reason:
            raise RuntimeError(reason)
        return self._evaluate(candidate, latency, stop)


@pytest.fixture
def coordinate(bench, tmp_path, folder):
    """Returns a function that searches with evaluations that fail for the given reasons."""
    baseline = stored(folder).baseline
    search = SearchFolder(tmp_path / "wrecked")

    def make(reasons, sampler="random"):
        with search.lock():
            return Coordinator(Wrecked(bench, iter(reasons)), search.create(), baseline, sampler, 0, []), search

    return make


def test_a_failed_trial_is_kept_with_its_reason_and_the_search_goes_on(coordinate) -> None:
    coordinator, search = coordinate(["no memory", None, "no luck", None, None])
    assert coordinator.run(5, None).code == 0
    trials = search.open().trials[:5]
    assert [trial.state == TrialState.FAIL for trial in trials] == [True, False, True, False, False]
    assert trials[0].user_attrs["reason"] == "RuntimeError: no memory"


def test_ten_equal_failures_stop_the_search_with_their_reason(coordinate) -> None:
    coordinator, search = coordinate([None, "other", *["disk full"] * 50])
    outcome = coordinator.run(100, None)
    assert outcome.code == 1
    assert "disk full" in outcome.reason
    assert len(finished(search.open().trials)) == 12


def test_ten_different_failures_do_not(coordinate) -> None:
    coordinator, _ = coordinate(f"reason {index}" for index in range(100))
    assert coordinator.run(15, None).code == 0


def test_the_time_limit_ends_a_search(coordinate) -> None:
    coordinator, search = coordinate([None] * 1000)
    begin = time.monotonic()
    assert "2 s are up" in coordinator.run(1000, 2.0).reason
    assert time.monotonic() - begin < 30
    assert 1 <= len(finished(search.open().trials)) < 1000


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "gp", "random"])
def test_every_sampler_proposes_beyond_the_first_guesses(sampler, bench, tmp_path, folder) -> None:
    from search.sampler import first_guesses

    count = len(first_guesses(bench.space)) + 4
    search = SearchFolder(tmp_path / sampler)
    with search.lock():
        coordinator = Coordinator(bench, search.create(), stored(folder).baseline, sampler, 0, [])
        assert coordinator.run(count, None).code == 0
    assert len(finished(search.open().trials)) == count


def test_a_known_candidate_is_told_from_memory(bench, tmp_path, folder) -> None:
    search = SearchFolder(tmp_path / "twice")
    with search.lock():
        study = search.create()
        coordinator = Coordinator(bench, study, stored(folder).baseline, "random", 0, [])
        guess = bench.space.uniform(1.0, "int8", 1.0)
        study.enqueue_trial(guess)
        study.enqueue_trial(guess)
        coordinator.run(2, None)
        first, second = study.trials[:2]
    assert second.user_attrs["duplicate_of"] == first.number
    assert second.values == first.values
    assert second.constraints == first.constraints


def test_compression_recovers_and_the_dense_network_is_left_alone(bench) -> None:
    import copy

    before = copy.deepcopy(bench.network.state_dict())
    candidate = bench.space.candidate(bench.space.uniform(0.5, "fp32", 1.0))
    recovered = bench.compress(candidate)
    plain = bench.space.apply(bench.network, candidate)
    means = [name for name in recovered.state_dict() if name.endswith("running_mean")]
    assert any(not np.allclose(recovered.state_dict()[name], plain.state_dict()[name]) for name in means)
    for name, tensor in bench.network.state_dict().items():
        assert (tensor == before[name]).all(), name
    assert bench.compress(candidate).state_dict().keys() == recovered.state_dict().keys()
    for name, tensor in bench.compress(candidate).state_dict().items():
        assert (tensor == recovered.state_dict()[name]).all(), "recovery repeats bit for bit"


def test_the_trained_network_is_cached_and_training_goes_on_after_a_crash(cache, tmp_path, monkeypatch) -> None:
    from search import training

    monkeypatch.setenv("DEPLOYFRONT_CACHE", str(tmp_path))
    study, data = Study.parse(tiny.STUDY, "test"), tiny.splits()
    steps: list[int] = []

    def crash(step: str, done: int, total: int) -> None:
        if done >= 50:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.trained_network(study, data, crash)
    resumed = training.trained_network(study, data, lambda step, done, total: steps.append(done))
    assert steps[0] == 50, "two of four epochs are not repeated"
    monkeypatch.setenv("DEPLOYFRONT_CACHE", str(tmp_path / "other"))
    straight = training.trained_network(study, data, lambda *_: None)
    for name, tensor in straight.state_dict().items():
        assert np.allclose(tensor, resumed.state_dict()[name], atol=1e-6), name

    def never(*_: object) -> None:
        raise AssertionError("trained again")

    again = training.trained_network(study, data, never)
    assert (again.trunk.classifier.weight == straight.trunk.classifier.weight).all()


def test_versions_are_the_distinct_measured_candidates(folder) -> None:
    versions = stored(folder).versions
    assert versions
    assert all(isinstance(version, Version) for version in versions)
    assert len({version.number for version in versions}) == len(versions)
