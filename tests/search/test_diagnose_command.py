"""`diagnose` on the command line: what it shows, what it writes, and what it refuses."""

import json

import pytest
from onnx import helper

from search.cli import run
from search.results.store import SearchFolder, StoredSearch
from tests.helpers import tiny


@pytest.fixture
def study(tmp_path):
    (tmp_path / "study.toml").write_text(tiny.STUDY)
    return ["diagnose", "--study", str(tmp_path / "study.toml"), "--runs", str(tmp_path / "runs")]


def test_the_command_shows_findings_and_layers_within_80_columns(study, pipeline, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run(study) == 0
    text = capsys.readouterr().out
    assert "int8 against fp32, 64 validation images; onnxruntime" in text
    assert "No alarm" in text
    assert "accuracy" in text
    for name in ("stem.0", "inner.0", "outer.0", "depthwise.0", "hidden", "classifier"):
        assert name in text
    table = text[text.index("\nall tensors") :].splitlines()
    assert max(map(len, table)) <= 80


def test_the_command_as_json_has_every_layer(study, pipeline, capsys) -> None:
    assert run([*study, "--precision", "fp16", "--images", "20", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert (content["reference"], content["version"], content["images"]) == ("fp32", "fp16", 20)
    assert "would not offer fp16" in content["remarks"][0]
    assert {"stem.0", "Add", "classifier"} <= {layer["name"] for layer in content["layers"]}
    assert min(layer["sqnr_db"] for layer in content["layers"]) > 40
    assert content["unmatched"] == []


def test_the_same_file_on_the_same_target_twice_is_exact(study, pipeline, capsys) -> None:
    arguments = ["--precision", "int8", "--against-target", "onnxruntime", "--json"]
    assert run([*study, *arguments]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["version"] == "int8 on onnxruntime"
    assert content["accuracy"]["same_answers"] == 1
    assert all(layer["sqnr_db"] is None and layer["cosine"] > 1 - 1e-9 for layer in content["layers"])
    assert not any(finding["alarm"] for finding in content["findings"])


def test_a_trial_and_its_bundle_are_compared_with_their_own_float_selves(folder, tmp_path, capsys) -> None:
    search = StoredSearch.read(SearchFolder(folder / "one"))
    version = next(v for v in search.versions if "int8" in v.evaluation.candidate.precision.values())
    arguments = ["--search", "one", "--runs", str(folder), "--json"]
    assert run(["diagnose", "--trial", str(version.number), *arguments]) == 0
    trial = json.loads(capsys.readouterr().out)
    assert trial["version"].startswith(f"trial {version.number} (")
    assert trial["unmatched"] == []
    assert run(["pick", "--search", "one", "--runs", str(folder), "--out", str(tmp_path / "deploy")]) == 0
    capsys.readouterr()
    assert run(["diagnose", "--file", str(tmp_path / "deploy"), "--json"]) == 0
    bundle = json.loads(capsys.readouterr().out)
    assert bundle["unmatched"] == []
    assert min(layer["sqnr_db"] or 99 for layer in bundle["layers"]) > 10


def test_somebody_elses_file_is_compared_with_the_study(study, pipeline, tmp_path, capsys) -> None:
    file = tmp_path / "net.onnx"
    file.write_bytes(pipeline.builder.build(pipeline.network, pipeline.space.dense()).stages[0])
    assert run([*study, "--file", str(file), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["version"] == "net.onnx"
    assert content["accuracy"]["same_answers"] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--precision", "int4"], ["int8, fp16, fp8, fp32", "'int4'"]),
        (["--precision", "fp32"], ["--against-target"]),
        (["--precision", "int8", "--trial", "1"], ["--precision and --trial"]),
        (["--precision", "int8", "--file", "x.onnx"], ["--precision and --file"]),
        (["--file", "no/such.onnx"], ["no/such.onnx", "bundle"]),
        (["--file", "."], ["evaluation.json"]),
        (["--trial", "1"], ["no search in"]),
        (["--trial", "1", "--study", "digits"], ["a search has a study"]),
        (["--search", "none", "--model", "torchvision:resnet18"], ["a search has a study"]),
        (["--search", "none"], ["journal.log"]),
        (["--images", "1"], ["--images"]),
        (["--target", "abacus"], ["onnxruntime"]),
    ],
)
def test_a_mistake_is_one_line(arguments, words, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["diagnose", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    for word in words:
        assert word in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("content", "words"), [(b"nothing", ["valid ONNX"]), (None, ["logits", "(64, 4)"])])
def test_a_file_that_cannot_be_compared_is_named(content, words, study, pipeline, tmp_path, capsys) -> None:
    file = tmp_path / "other.onnx"
    info = [helper.make_tensor_value_info(name, 1, ["n", 1, 8, 8]) for name in ("in", "out")]
    graph = helper.make_graph([helper.make_node("Relu", ["in"], ["out"])], "other", info[:1], info[1:])
    other = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    file.write_bytes(other if content is None else content)
    assert run([*study, "--file", str(file)]) == 2
    error = capsys.readouterr().err
    for word in words:
        assert word in error


def test_a_trial_that_is_not_there_names_those_that_are(folder, capsys) -> None:
    assert run(["diagnose", "--search", "one", "--runs", str(folder), "--trial", "999"]) == 2
    assert "got 999; the latest: " in capsys.readouterr().err
