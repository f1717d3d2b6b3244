"""What users keep: a search, its bundle and a study file, all written on 2026-11-30, go on working."""

import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from evaluators.bundle import run as program
from search.cli import run
from search.config.objectives import Objectives
from search.config.renamed import with_present_names
from search.config.study import RecoverySection, Study, load_study
from search.deploy.measure_bundle import measure_bundle
from search.pipeline.pipeline import build_pipeline
from search.results.store import SearchFolder, StoredSearch
from tests.helpers.searches import ROOT

BEFORE = ROOT / "tests" / "data" / "before"
HOME = "/home/user/my-study"
"""Where the study's files lay when the search was run."""
NAME = "before-7f2ec0b7-front-0"
LATER = {"keep_blocks_at_least": 0.25, "sizes": []}
"""Keys of [space] that came later, with their defaults."""
SEARCH_KEY, EVERY_KEY = "19a93451", "56101dc4"
"""The keys that the studies had then: a search is found again by them."""
BEGUN_WITH: Objectives = ("accuracy", "latency", "flops")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A run directory with the search, its study's files where the journal says."""
    shutil.copytree(BEFORE / "my-study", tmp_path / "my-study")
    folder = tmp_path / "runs" / NAME
    shutil.copytree(BEFORE / "search", folder)
    for file in folder.iterdir():
        file.write_text(file.read_text().replace(HOME, str(tmp_path / "my-study")))
    return tmp_path / "runs"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(BEFORE / "bundle", tmp_path / "deploy"))


def test_a_search_of_before_is_read(runs: Path) -> None:
    search = StoredSearch.read(SearchFolder(runs / NAME))
    assert search.finished == 8
    assert str(search.budget) == "latency<1500%,size<1MB,accuracy_drop<9%,energy<2mJ@50pJ"
    assert len(search.versions) == 8
    assert search.report


def test_a_search_of_before_keeps_its_three_objectives(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search = StoredSearch.read(SearchFolder(runs / NAME))
    assert search.objectives == search.study.objectives == BEGUN_WITH
    assert all(len(trial.values) == 3 for trial in search.trials if trial.values)
    assert run(["report", "--runs", str(runs)]) == 0
    assert "no other beats in accuracy, latency and FLOPs together" in (runs / NAME / "report.md").read_text()
    asked = ["--runs", str(runs), "--search", NAME, "--study", str(runs / NAME / "study.toml")]
    before = search.folder.journal.read_bytes()
    assert run([*asked, "--objectives", "accuracy,latency"]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "a search goes on with the objectives that it began with, got accuracy, latency for" in told
    assert "which has accuracy, latency, flops; give another --search" in told
    assert search.folder.journal.read_bytes() == before


def test_the_key_of_a_study_of_before_is_that_of_the_usual_objectives() -> None:
    study = load_study(str(BEFORE / "search" / "study.toml"))
    assert study.with_objectives(("accuracy", "latency")).question_key == study.question_key
    assert study.with_objectives(BEGUN_WITH).question_key != study.question_key
    folder = SearchFolder(BEFORE / "search")
    assert folder.objectives(None) == folder.objectives(BEGUN_WITH) == BEGUN_WITH


@pytest.mark.slow
@pytest.mark.parametrize("asked", [[], ["--objectives", "accuracy,latency,flops"]])
def test_a_search_of_before_goes_on_with_its_three_objectives(asked: list[str], runs: Path, cache: Path) -> None:
    search = StoredSearch.read(SearchFolder(runs / NAME))
    journal = search.folder.journal  # the training of this machine, which other machines round otherwise
    now = build_pipeline(search.study, lambda *_: None).fingerprint
    journal.write_text(journal.read_text().replace(search.folder.open().user_attrs["fingerprint"], now))
    again = load_study(str(runs / NAME / "study.toml")).with_objectives(None)
    (runs / "again.toml").write_text(again.to_toml())
    name = f"{again.name}-{again.question_key}-ehvi-0"  # where the program looks for it by itself
    (runs / NAME).rename(runs / name)
    assert run(["--runs", str(runs), "--study", str(runs / "again.toml"), "--trials", "11", *asked]) == 0
    went_on = StoredSearch.read(SearchFolder(runs / name))
    assert went_on.finished == 11
    assert went_on.objectives == BEGUN_WITH
    assert all(len(trial.values) == 3 for trial in went_on.trials if trial.values)


def test_a_search_of_before_shows_its_front_and_its_report(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["front", "--runs", str(runs), "--json"]) == 0
    front = json.loads(capsys.readouterr().out)
    assert [version["trial"] for version in front["front"]] == [1, "int8", 2]
    assert run(["report", "--runs", str(runs)]) == 0
    assert "latency<1500%" in (runs / NAME / "report.md").read_text()
    assert run(["compare", "1", "2", "--runs", str(runs)]) == 0


@pytest.mark.slow
def test_a_version_of_a_search_of_before_is_picked(runs: Path, cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "picked"
    search = StoredSearch.read(SearchFolder(runs / NAME))
    journal = search.folder.journal  # the training of this machine, which other machines round otherwise
    now = build_pipeline(search.study, lambda *_: None).fingerprint
    journal.write_text(journal.read_text().replace(search.folder.open().user_attrs["fingerprint"], now))
    options = ["--runs", str(runs), "--prefer", "accuracy", "--budget", "latency<9999%", "--out", str(out)]
    assert run(["pick", *options]) == 0
    before = json.loads((BEFORE / "bundle" / "bundle.json").read_text())
    now = json.loads((out / "bundle.json").read_text())
    assert list(now) == list(before)


def test_a_bundle_of_before_answers_by_its_own_program(bundle: Path) -> None:
    done = subprocess.run([sys.executable, "-I", str(bundle / "run.py")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "accuracy: 75.7143% (265/350)" in done.stdout


def test_a_bundle_of_before_is_measured(bundle: Path) -> None:
    found = measure_bundle(bundle, None)
    assert (found.images, found.expected) == (350, 265)
    assert abs(found.correct - found.expected) <= 4, "other processors round otherwise"
    assert found.latency_s > 0


def test_a_bundle_of_before_answers_by_the_program_of_today(bundle: Path) -> None:
    with np.load(bundle / "check.npz") as check:
        logits, routes = program.load(bundle)(check["images"])
        correct = int((logits.argmax(axis=1) == check["labels"]).sum())
    assert abs(correct - 265) <= 4
    assert set(program.exits_of(routes)) <= {0, 1}


@pytest.mark.parametrize(("file", "key"), [("search/study.toml", SEARCH_KEY), ("every_key.toml", EVERY_KEY)])
def test_a_study_file_of_before_means_the_same(file: str, key: str) -> None:
    study = load_study(str(BEFORE / file))
    content, _ = with_present_names(tomllib.loads((BEFORE / file).read_text()))
    content["space"] |= LATER
    default = RecoverySection().final.model_dump(mode="json", exclude_none=True)
    content["recovery"] = {"final": default, **content["recovery"]}
    assert study.model_dump(mode="json", exclude_none=True) == content
    assert tomllib.loads(study.to_toml()) == content
    assert study.question_key == key, "the same question is the same search"
    assert Study.stored(json.loads(study.model_dump_json())) == study


def test_a_search_of_before_goes_on_without_depth(runs: Path) -> None:
    study = StoredSearch.read(SearchFolder(runs / NAME)).study
    assert "depth" not in study.space.only
    written = json.loads(study.model_dump_json())
    for later in ("only", *LATER):  # there was a time when no dimensions could be chosen
        del written["space"][later]
    assert Study.stored(written) == study


def test_a_study_that_searches_depth_is_another_question(tmp_path: Path) -> None:
    text = (BEFORE / "search" / "study.toml").read_text()
    line = next(line for line in text.splitlines() if line.startswith("only = "))
    (tmp_path / "study.toml").write_text(text.replace(line, ""))
    now = load_study(str(tmp_path / "study.toml"))
    assert "depth" in now.space.only
    assert now.question_key != SEARCH_KEY
