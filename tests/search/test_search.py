"""Whole searches on the tests' study: real training, real sessions, real crashes."""

import csv
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from optuna.trial import TrialState

from search.cli import run
from search.config.budget import Budget
from search.results.evaluation import Evaluation
from search.results.pareto import Version, front_within
from search.results.store import SearchFolder
from tests.helpers import tiny
from tests.helpers.searches import ROOT, finished, stored


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
    budget, lines = Budget.parse(["latency<1000%"]), search.baseline.versions_to_beat
    front = front_within(
        search.versions, lines, budget, search.baseline.evaluation.measurements, search.objectives
    ).versions
    names = [version.trial for version in front]
    below = [line.trial for line in [*lines[1:], lines[0]] if line not in front]
    assert [entry["trial"] for entry in as_json["front"]] == names
    assert [(each["trial"], each["on_front"]) for each in as_json["simple"]] == [
        (line.trial, line in front) for line in lines
    ]
    assert [row["trial"] for row in as_csv] == [str(name) if isinstance(name, int) else "" for name in [*names, *below]]
    assert as_csv[-1]["version"] == ("dense" if "dense" in below else as_csv[-1]["version"])
    told = {entry["trial"]: entry for entry in [*as_json["front"], *as_json["simple"]]}
    assert told["dense"]["measurements"] == as_json["dense"]["measurements"]
    for row, entry in zip(as_csv, [told[name] for name in [*names, *below]], strict=True):
        numbers_of = {name: float(value) for name, value in row.items() if name not in ("trial", "version")}
        measured, candidate = entry["measurements"], entry["candidate"]
        assert numbers_of["latency_ms"] == pytest.approx(measured["latency"]["value"] * 1e3, abs=1e-4)
        assert numbers_of["size_mb"] == pytest.approx(measured["size"]["value"] / 1e6, abs=1e-4)
        assert numbers_of["int8_layers"] == list(candidate["precision"].values()).count("int8")
        assert 0 <= numbers_of["leave_at_exit1_pct"] <= 100
    dense = next(row for row in as_csv if row["version"] == "dense")
    assert [float(dense[name]) for name in ("points", "speedup", "channels_pct")] == [0, 1, 100]
    assert run(["front", *loose]) == 0
    shown = capsys.readouterr().out
    assert re.search(rf"\b{len(names)} versions? within", shown)
    assert [line.split()[0] for line in shown.splitlines() if line.split()].count("dense") == 1


def test_every_trial_is_a_row_with_one_type_a_column(folder, capsys) -> None:
    every = ["front", "--runs", str(folder), "--search", "one", "--all"]
    assert run([*every, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    search = stored(folder)
    assert [row["trial"] for row in rows if row["trial"] is not None] == [
        each.number for each in finished(search.trials)
    ]
    for column in rows[0]:
        kinds = {type(row[column]) for row in rows if row[column] is not None}
        assert len(kinds) <= 1, (column, kinds)
    assert all(row.keys() == rows[0].keys() for row in rows)
    by_trial = {row["trial"]: row for row in rows}
    for trial, version in {version.number: version for version in search.versions}.items():
        assert by_trial[trial]["latency_ms"] == pytest.approx(version.measured["latency"].value * 1e3, abs=1e-4)
        assert by_trial[trial].items() >= search.trials[trial].params.items()
    assert run([*every, "--csv"]) == 0
    as_csv = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [list(row.values()) for row in as_csv] == [
        ["" if value is None else str(value) for value in row.values()] for row in rows
    ]
    assert run(every) == 0
    assert "trial 11" in capsys.readouterr().out


def test_the_searches_of_a_folder_are_listed(folder, tmp_path, capsys) -> None:
    shutil.copytree(folder / "one", tmp_path / "one")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "journal.log").write_text("nothing\n")
    with SearchFolder(tmp_path / "fresh").lock():
        SearchFolder(tmp_path / "fresh").create()
        assert run(["list", "--runs", str(tmp_path), "--json"]) == 0
        found = {each["search"]: each for each in json.loads(capsys.readouterr().out)}
    assert {name: each["state"] for name, each in found.items()} == {
        "one": "ended",
        "torn": "unreadable",
        "fresh": "running",
    }
    assert (found["one"]["trials"], found["one"]["budget"]) == (12, "latency<1000%,size<80%")
    assert "line 1" in found["torn"]["reason"]
    assert run(["list", "--runs", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "12/12" in text
    assert "no trial yet" in text
    assert run(["list", "--runs", str(tmp_path / "empty")]) == 0
    assert "start one with" in capsys.readouterr().out
    assert not (tmp_path / "empty").exists()


def test_a_budget_that_nothing_meets_names_the_nearest_miss(folder, tmp_path, capsys) -> None:
    arguments = ["--runs", str(folder), "--search", "one", "--budget", "latency<1us"]
    assert run(["front", *arguments]) == 1
    assert run(["pick", *arguments, "--out", str(tmp_path / "deploy")]) == 1
    text = capsys.readouterr().out
    assert "No version keeps latency<1us" in text
    assert "over latency<1us" in text
    assert not (tmp_path / "deploy").exists()


def test_a_busy_machine_is_said_once_and_in_a_line(folder, tmp_path, capsys) -> None:
    shutil.copytree(folder / "one", tmp_path / "one")
    search = SearchFolder(tmp_path / "one")
    with search.lock():
        journal = search.create()
        baseline = journal.user_attrs["baseline"]
        baseline["evaluation"]["measurements"]["latency"]["notes"]["half_width"] = 0.12
        journal.set_user_attr("baseline", baseline | {"same_twice": 1.08})
    run(["--study", str(folder.parent / "study.toml"), "--search", "one", "--runs", str(tmp_path)])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Careful")]
    assert "this machine is busy: timings repeat within 12%" in line
    assert "threads" not in line  # there is one


def start(home: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "search", "--study", str(home / "study.toml"), "--runs", str(home / "runs")]
    return subprocess.Popen(
        [*command, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_trials(journal: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        lines = journal.read_bytes().splitlines() if journal.is_file() else []
        if sum(b'"trial_id"' in line and b'"evaluation"' in line for line in lines) >= count:
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
        assert "the same command goes on" in output
    before = SearchFolder(tmp_path / "runs" / "one").open().trials
    done = {trial.number: trial for trial in before if "evaluation" in trial.user_attrs}
    assert len(done) >= 4
    process = start(tmp_path, "--search", "one")
    output, _ = process.communicate(timeout=120)
    assert process.returncode in (0, 1), output
    after = stored(tmp_path / "runs")
    for number, trial in done.items():
        assert after.trials[number].user_attrs == trial.user_attrs
        # One that was stopped between its measurement and the journal's last word is finished by the next run.
        assert after.trials[number].values == trial.values or trial.state == TrialState.RUNNING
    keys = [version.evaluation.candidate.key for version in after.versions]
    assert len(keys) == len(set(keys))
    counted = [trial for trial in after.trials if trial.state.is_finished() and "interrupted" not in trial.user_attrs]
    assert len(counted) == 12
    assert not [trial for trial in after.trials if trial.state == TrialState.RUNNING]


def test_versions_are_the_distinct_measured_candidates(folder) -> None:
    versions = stored(folder).versions
    assert versions
    assert all(isinstance(version, Version) for version in versions)
    assert len({version.number for version in versions}) == len(versions)
