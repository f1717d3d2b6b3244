"""What a bundle says of itself: the same keys in the same order, now and before."""

import ast
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from evaluators.bundle import manifest
from evaluators.bundle.manifest import Check, DenseReference, DeploymentTarget, Frames, Manifest
from tests.helpers.searches import ROOT

BEFORE = ROOT / "tests" / "data" / "before" / "bundle"
SMALL = Manifest(deployed=("model.onnx",), target=DeploymentTarget())


def test_a_manifest_of_before_is_read_and_written_alike(tmp_path: Path) -> None:
    found = Manifest.read(BEFORE)
    assert found.target == DeploymentTarget("onnxruntime", "AMD EPYC", 8, 1)
    assert (found.exits, found.ends) == (("exit1",), ("exit1", "end"))
    assert found.check == Check(350, 265)
    assert found.image_shape == (1, 16, 16)
    found.write(tmp_path)
    assert (tmp_path / manifest.FILE).read_text() == (BEFORE / manifest.FILE).read_text()


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    whole = Manifest(
        deployed=("stage1.onnx", "stage2.onnx"),
        target=DeploymentTarget("openvino", "a CPU", 1, 2, "bf16"),
        library="openvino 2026.1",
        blocks=("layer1.0",),
        steps=({"stage": 0, "exit": 0.5, "skip": None, "gate": None, "keeps": False},),
        preprocessing={"size": 32, "resize": 40, "mean": [0.5], "std": [0.25], "interpolation": "BILINEAR"},
        frames=Frames(0.1, 30),
        reference=DenseReference("reference.onnx", "int8", 0.001),
        leaving=(0.25, 0.75),
    )
    whole.write(tmp_path)
    assert Manifest.read(tmp_path) == whole
    assert whole.library_name == "openvino"
    assert whole.plan == whole.steps


def test_frames_and_names_are_keys_only_where_there_are_some() -> None:
    assert not {"frames", "class_names"} & SMALL.to_dict().keys()
    named = replace(SMALL, classes=2, class_names=("cat", "dog"))
    assert Manifest.from_dict(named.to_dict()) == named
    assert (named.class_name(1), SMALL.class_name(1)) == ("dog", "1")
    assert SMALL.plan == ()


def test_what_is_lacking_has_its_default_and_what_is_unknown_is_passed_over() -> None:
    content = {"deployed": ["model.onnx"], "target": {"threads": 2, "nodes": 3}, "colour": "red"}
    assert Manifest.from_dict(content) == Manifest(deployed=("model.onnx",), target=DeploymentTarget(threads=2))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"deployed": ["a"]}', '{"deployed": ["a"], "target": 3}'])
def test_what_pick_did_not_write_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / manifest.FILE).write_text(text)
    with pytest.raises(ValueError, match=r"Expecting|pick again"):
        Manifest.read(tmp_path)


def test_the_portable_form_of_a_file_is_preferred(tmp_path: Path) -> None:
    assert SMALL.portable_files(tmp_path) == [tmp_path / "model.onnx"]
    (tmp_path / "portable").mkdir()
    (tmp_path / "portable" / "model.onnx").touch()
    assert SMALL.portable_files(tmp_path) == [tmp_path / "portable" / "model.onnx"]


def test_it_needs_no_package() -> None:
    tree = ast.parse(Path(str(manifest.__file__)).read_text())
    found = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    found |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert {str(name).split(".")[0] for name in found} <= sys.stdlib_module_names
    assert json.loads(json.dumps(SMALL.to_dict()))["format"] == manifest.FORMAT
