"""Searches of some dimensions alone: nothing else varies, and nothing is trained for what does not."""

from pathlib import Path

import pytest

from search.cli import run
from search.config.overrides import Request
from search.config.sections import BEFORE_DEPTH
from search.config.study import Study, StudyError
from search.loop.baseline import find_slow_layers
from search.pipeline.pipeline import CompressionPipeline, build_pipeline
from search.pipeline.search_space import without_fixed_dimensions
from spaces.thresholds import UNSOLVED
from tests.helpers import deep, tiny
from tests.helpers.searches import finished, stored

ELASTIC = tiny.STUDY.replace('level = "bn"', 'level = "elastic"')


def study(only: str, text: str = tiny.STUDY, more: str = "") -> Study:
    return Study.parse(f"{text}\n[space]\nonly = [{only}]\n{more}", "the tests' study")


def bench_of(asked: Study) -> tuple[CompressionPipeline, list[str]]:
    """Returns what a search of it builds on, and the steps that were told."""
    told: list[str] = []
    return build_pipeline(asked, lambda step, *_: told.append(step)), told


def kinds(pipeline: CompressionPipeline) -> set[str]:
    return {name.partition(".")[0] for name in pipeline.space.dimensions()}


def test_precisions_alone_train_no_shared_weights_and_no_exits(cache: Path) -> None:
    pipeline, told = bench_of(study('"precision"', ELASTIC))
    assert kinds(pipeline) == {"precision"}
    assert pipeline.network.exit_names == ()
    assert pipeline.compressor.recovery.effort == "none"
    assert not {"Training shared weights, once", "Training the exits, once"} & set(told)


def test_keeping_all_channels_is_the_same_as_not_searching_them(cache: Path) -> None:
    pipeline, told = bench_of(Study.parse(f"{ELASTIC}\n[space]\nkeep_at_least = 1", "the tests' study"))
    assert kinds(pipeline) == {"precision"}
    assert pipeline.compressor.recovery.effort == "none"
    assert "Training shared weights, once" not in told


def test_shared_weights_are_trained_where_they_feel_int8(cache: Path) -> None:
    text = ELASTIC.replace("images = 64", "images = 64, qat = {}, elastic = {epochs = 1, batch = 50}")
    pipeline, told = bench_of(study('"precision"', text))
    assert pipeline.compressor.recovery.effort == "elastic 1 epoch or 30 CPU min with qat (lsq)"
    assert "Training shared weights, once" in told
    assert not bench_of(study('"channels"', text))[0].compressor.recovery.effort.endswith("(lsq)"), (
        "no layer can be int8"
    )


def test_widths_alone_are_in_the_reference_precision(cache: Path) -> None:
    pipeline, _ = bench_of(study('"channels"'))
    assert kinds(pipeline) == {"channels"}
    assert set(pipeline.space.candidate(pipeline.space.uniform(0.5, "int8", 0.9)).precision.values()) == {"fp32"}
    assert find_slow_layers(pipeline, lambda *_: None, 1.0) is None, "no layer has a precision to lose"


def test_widths_alone_may_be_in_another_precision(cache: Path) -> None:
    pipeline, _ = bench_of(study('"channels"', more='precision = "int8"'))
    assert kinds(pipeline) == {"channels"}
    assert set(pipeline.space.candidate(pipeline.space.uniform(0.5, "fp32", 0.9)).precision.values()) == {"int8"}
    assert set(pipeline.space.dense().precision.values()) == {"fp32"}


def test_depth_alone_is_in_the_reference_precision_and_as_wide_as_it_was(cache: Path) -> None:
    pipeline, _ = bench_of(study('"depth"', deep.STUDY.replace("space = {keep_blocks_at_least = 0.0}", "")))
    assert kinds(pipeline) == {"depth"}
    shortest = pipeline.space.candidate(pipeline.space.uniform(0.5, "int8", 0.9, depth=0.0))
    assert shortest.removed_blocks
    assert shortest.channels == pipeline.space.dense().channels
    assert set(shortest.precision.values()) == {"fp32"}


def test_a_precision_that_the_target_does_not_compute_in_is_refused(cache: Path) -> None:
    with pytest.raises(StudyError, match=r"space.precision is one that onnxruntime .* got 'fp8'; leave it out"):
        bench_of(study('"channels"', more='precision = "fp8"'))


def test_exits_alone_have_their_thresholds_searched(cache: Path) -> None:
    pipeline, _ = bench_of(study('"exits"'))
    assert kinds(pipeline) == {"threshold"}
    assert len(pipeline.scored) == len(pipeline.data.validation)
    assert any("searched, not solved: nothing else varies" in remark for remark in pipeline.remarks)
    both, _ = bench_of(study('"exits", "precision"'))
    assert kinds(both) == {"precision"}
    assert set(both.space.candidate(both.space.uniform(1.0, "int8", 0.9)).thresholds.exits.values()) == {UNSOLVED}


def test_what_is_not_named_is_not_there() -> None:
    text = tiny.STUDY.replace("[space]", "") + '\nskips = {blocks = "all"}\nmasks = {method = "dgnet"}\nframes = {}'
    asked = without_fixed_dimensions(study('"channels"', text))
    assert asked.exits.after == ()
    assert asked.skips.blocks == ()
    assert asked.masks.method is None
    assert asked.frames is not None, "versions are scored on the stream all the same"
    assert without_fixed_dimensions(Study.parse(text, "test")) == Study.parse(text, "test")


def test_frames_stay_computed_where_only_widths_vary(cache: Path) -> None:
    text = tiny.STUDY.replace("target = {batch = 4}", "target = {batch = 1}\nframes = {frames = 120}")
    pipeline, _ = bench_of(study('"channels", "exits"', text))
    assert kinds(pipeline) == {"channels", "threshold"}
    assert "threshold.frames" not in pipeline.space.dimensions()
    assert pipeline.space.dense().active_exits == ()


def test_the_question_is_another_and_the_old_one_keeps_its_name() -> None:
    before = tiny.STUDY.replace("tests.helpers.tiny", "tests.tiny")  # where the network of the tests was then
    before = before.replace("final = {versions = 0}", "elastic = {random_candidates = 1}")  # two defaults of then
    names = ", ".join(f'"{name}"' for name in BEFORE_DEPTH)
    plain = study(names, before)
    assert plain.question_key == "f62005b9", "as it was before there was a choice"
    assert Study.parse(before, "test").question_key != plain.question_key, "which searches depth, too"
    keys = {plain.question_key, study('"precision"').question_key, study('"channels"').question_key}
    assert len(keys) == 3
    assert study('"precision", "channels"') == study('"channels", "precision", "channels"')
    fixed = study('"channels"', more='precision = "int8"')
    assert fixed.question_key not in keys
    assert Study.stored(fixed.model_dump(mode="json")) == fixed
    assert Study.parse(fixed.to_toml(), "again") == fixed


def test_the_command_line_says_it_for_any_study() -> None:
    assert Request(only=("precision",)).to_study().space.only == ("precision",)


@pytest.mark.parametrize("sampler", ["ehvi", "tpe", "nsga2", "random"])
def test_a_space_of_few_versions_ends_by_itself(sampler: str, tmp_path: Path, cache: Path, capsys) -> None:
    text = f"{tiny.STUDY}\n[space]\ndrop_slower = false".replace(
        "tests.helpers.tiny:network", "tests.helpers.tiny:short"
    )
    (tmp_path / "study.toml").write_text(text)
    asked = ["--study", str(tmp_path / "study.toml"), "--runs", str(tmp_path), "--search", "one", "--sampler", sampler]
    assert run([*asked, "--search-only", "precision", "--trials", "60", "--budget", "latency<10000%"]) == 0
    assert "all 4 versions that the space offers were tried" in " ".join(capsys.readouterr().out.split())
    search = stored(tmp_path)
    assert len({version.evaluation.candidate.key for version in search.versions}) == 4, "two layers, two precisions"
    assert all(set(version.evaluation.candidate.channels.values()) == {16} for version in search.versions)


def test_exits_alone_are_a_search(tmp_path: Path, cache: Path, capsys) -> None:
    text = tiny.STUDY.replace("exits = {", "space = {threshold_step = 0.25}\nexits = {")
    (tmp_path / "study.toml").write_text(text)
    asked = ["--study", str(tmp_path / "study.toml"), "--runs", str(tmp_path), "--search", "one"]
    assert run([*asked, "--search-only", "exits", "--budget", "latency<10000%"]) == 0
    assert "all 3 versions that the space offers were tried" in " ".join(capsys.readouterr().out.split())
    assert {trial.params["threshold.exit1"] for trial in finished(stored(tmp_path).trials)} == {0.5, 0.75, 1.0}


def test_a_search_of_nothing_measures_the_network_and_ends(tmp_path: Path, cache: Path, capsys) -> None:
    (tmp_path / "study.toml").write_text(tiny.STUDY)
    asked = ["--study", str(tmp_path / "study.toml"), "--runs", str(tmp_path), "--search", "one"]
    run([*asked, "--search-only", "skips", "--budget", "latency<10000%"])
    assert "the one version of the space was tried" in " ".join(capsys.readouterr().out.split())
    assert len(finished(stored(tmp_path).trials)) == 1
