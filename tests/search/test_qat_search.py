"""Searches whose trainings feel int8: what is trained, said, stored and rebuilt."""

import json
import os
from pathlib import Path

import pytest

from search.cli import run
from search.config.study import Study, StudyError
from search.pipeline.pipeline import CompressionPipeline, build_pipeline
from search.results.store import SearchFolder, StoredSearch
from tests.helpers import tiny

QAT = "qat = {epochs = 1, batch = 50}"


def study_of(recovery: str, name: str) -> str:
    text = tiny.STUDY.replace('budget = ["latency<1000%", "size<80%"]', 'budget = ["latency<1000%"]')
    text = text.replace('name = "tiny"', f'name = "{name}"')
    return text.replace(tiny.RECOVERY, f"recovery = {{images = 64, {recovery}}}")


def bench_of(recovery: str) -> CompressionPipeline:
    return build_pipeline(Study.parse(study_of(recovery, "tiny"), "test"), lambda *_: None)


def test_a_version_is_trained_in_its_own_precisions_and_rebuilt_byte_for_byte(cache) -> None:
    level = f'level = "finetune", finetune = {{epochs = 1, batch = 50}}, {QAT}'
    pipeline = bench_of(level)
    dense, half = (pipeline.space.candidate(pipeline.space.uniform(keep, "int8", 0.8)) for keep in (1.0, 0.5))
    floating = pipeline.space.candidate(pipeline.space.uniform(0.5, "fp32", 0.8))
    assert pipeline.compressor.plan(pipeline.space.dense()).effort == "as given"
    assert pipeline.compressor.plan(dense).effort == "as given + qat 1 epoch (lsq)"
    assert pipeline.compressor.plan(half).effort == "finetune 1 epoch + qat 1 epoch (lsq)"
    assert pipeline.compressor.plan(floating).effort == "finetune 1 epoch"
    plain = bench_of('level = "bn"')
    assert (
        pipeline.deployed(pipeline.space.dense()).artifact.digest
        == plain.deployed(pipeline.space.dense()).artifact.digest
    )
    again = bench_of(level)
    for candidate in (dense, half):
        digest = pipeline.deployed(candidate).artifact.digest
        assert digest != plain.deployed(candidate).artifact.digest
        assert again.deployed(candidate).artifact.digest == digest
    assert all(
        (value == again.network.state_dict()[name]).all() for name, value in pipeline.network.state_dict().items()
    )


def test_more_fine_tuning_feels_int8_at_any_level(cache) -> None:
    from search.config.study import FinetuneSection

    more = FinetuneSection(epochs=2, batch=50)
    pipeline, plain = bench_of(f'level = "bn", {QAT}'), bench_of('level = "bn"')
    dense, half = (pipeline.space.candidate(pipeline.space.uniform(keep, "int8")) for keep in (1.0, 0.5))
    assert pipeline.compressor.plan(half).effort == "bn"
    assert pipeline.compressor.plan(half, more).effort == "bn + finetune 2 epochs + qat 1 epoch (lsq)"
    assert pipeline.compressor.plan(dense, more).effort == "as given + qat 1 epoch (lsq)"
    assert pipeline.compressor.may_recover(dense)
    assert not pipeline.compressor.may_recover(pipeline.space.dense())
    assert not plain.compressor.may_recover(dense)
    assert pipeline.deployed(half).artifact.digest == plain.deployed(half).artifact.digest
    assert pipeline.deployed(dense, more).artifact.digest != pipeline.deployed(dense).artifact.digest


@pytest.fixture(scope="module")
def runs(tmp_path_factory, cache) -> Path:
    """A finished search on shared weights that feel int8, recovered in full."""
    home = tmp_path_factory.mktemp("qat")
    final = "final = {epochs = 1, batch = 50, versions = 3}"
    (home / "study.toml").write_text(
        study_of(f'level = "elastic", elastic = {{epochs = 1, batch = 50}}, {final}, {QAT}', "mixed")
    )
    here = Path.cwd()
    os.chdir(home)
    try:
        assert run(["--study", "./study.toml", "--search", "one", "--trials", "10", "--runs", "runs"]) == 0
    finally:
        os.chdir(here)
    return home / "runs"


def test_a_search_on_shared_weights_says_so_and_goes_on_in_full(runs) -> None:
    search = StoredSearch.read(SearchFolder(runs / "one"))
    for trial in search.trials:
        evaluation = trial.user_attrs.get("evaluation")
        if evaluation is not None:
            int8 = "int8" in evaluation["candidate"]["precision"].values()
            shared = int8 or evaluation["effort"] != "as given"
            assert evaluation["effort"] == ("elastic 1 epoch or 30 CPU min with qat (lsq)" if shared else "as given")
    assert search.recovered
    for evaluation in search.recovered.values():
        assert evaluation.finetune["epochs"] == 1
        if "int8" in evaluation.candidate.precision.values():
            assert evaluation.effort.endswith("+ qat 1 epoch (lsq)")


def test_a_pick_ships_what_was_trained(runs, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(runs.parent)
    assert run(["pick", "--prefer", "flops", "--runs", "runs", "--out", str(tmp_path / "out")]) == 0
    told = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert told["confirmed"]["same_artifact"]


def test_the_section_is_stored_and_read_again() -> None:
    study = Study.parse(study_of('level = "bn", qat = {quantizer = "pact"}', "tiny"), "test")
    assert study.recovery.qat.learning_rate == 0.002
    assert Study.parse(study.to_toml(), "again") == study
    assert Study.parse(study_of('level = "bn"', "tiny"), "test").recovery.qat is None
    with pytest.raises(StudyError, match="quantizer"):
        Study.parse(study_of('level = "bn", qat = {quantizer = "lsqq"}', "tiny"), "test")
