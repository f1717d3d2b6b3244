"""The TensorRT runtime, from files to engines, with a tensorrt module that follows a script."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from evaluators.inference.staged import StagedNetwork
from evaluators.runtimes.base import FP32_IN_METADATA, Proof, allows
from evaluators.runtimes.tensorrt_gpu import runtime as trt
from evaluators.runtimes.tensorrt_gpu.capabilities import capabilities
from evaluators.runtimes.tensorrt_gpu.cuda import (
    OutOfDeviceMemoryError,
)
from evaluators.runtimes.tensorrt_gpu.runtime import TensorRT
from tests.helpers.scripted_gpu import first_half, one_line, second_half
from tests.helpers.scripted_tensorrt import layer, v11


@pytest.mark.parametrize("version", ["8.6.1", "10.2.0", "12.0.0.1"])
def test_other_versions_of_tensorrt_are_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__=version))
    reason = TensorRT.missing()
    assert reason is not None
    assert f"got {version}; pip install" in reason


def test_no_tensorrt_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    reason = TensorRT.missing()
    assert reason is not None
    assert "pip install" in reason


def test_the_runtime_builds_loads_and_chains_its_stages(scripted: Any, pictures: Any, tmp_path: Path) -> None:
    assert TensorRT.missing() is None
    runtime = TensorRT()
    assert runtime.device() == "Scripted GPU"
    assert runtime.capabilities().precisions == ("fp32", "fp16", "int8")
    logits, exits = runtime.open([b"first", b"second"], [0.8], 1).answer(pictures, 1)
    wanted, left = StagedNetwork([first_half, second_half], [0.8])(pictures)
    np.testing.assert_array_equal(exits, left)
    np.testing.assert_allclose(logits, wanted, rtol=1e-6)
    assert all(config.cleared == ["TF32"] and "TF32" not in config.set for config in scripted.configs)
    assert all(config.profiling_verbosity == "DETAILED" for config in scripted.configs)
    assert [vars(config.profiles[0])["in"] for config in scripted.configs] == [((1, 1, 2, 2),) * 3] * 2
    (file,) = (tmp_path / "tensorrt").iterdir()
    assert file.read_bytes() == b"tt"


def test_all_outputs_of_a_file_are_told_by_name(scripted: Any, pictures: Any) -> None:
    watch = TensorRT().tensors(b"first")
    for images in (pictures, pictures[:2], pictures):
        features, logits = first_half(images)
        found = watch(images)
        assert set(found) == {"features", "logits"}
        np.testing.assert_allclose(found["features"], features, rtol=1e-6)
        np.testing.assert_allclose(found["logits"], logits, rtol=1e-6)
    assert len(scripted.configs) == 2  # one engine for each size of a batch


def test_tf32_is_on_where_the_file_allows_it(scripted: Any, pictures: Any) -> None:
    model = onnx.helper.make_model(onnx.helper.make_graph([], "stage", [], []))
    onnx.helper.set_model_props(model, {"author": "nobody", **FP32_IN_METADATA["tf32"]})
    assert allows(model.SerializeToString(), "tf32")
    assert not allows(b"allow_tf32", "tf32")
    TensorRT().open([model.SerializeToString()], [], 1).answer(pictures, 1)
    (config,) = scripted.configs
    assert "TF32" in config.set
    assert not config.cleared


def test_capabilities_follow_the_generation() -> None:
    turing, orin, ada = (capabilities(generation) for generation in ((7, 5), (8, 7), (8, 9)))
    assert turing.precisions == orin.precisions == ("fp32", "fp16", "int8")
    assert ada.precisions == ("fp32", "fp16", "fp8", "int8")
    assert [able.fp32_in for able in (turing, orin, ada)] == [(), ("tf32",), ("tf32",)]
    assert turing.channel_steps == {"fp32": 8, "fp16": 8, "int8": 32}
    assert orin.channel_steps == turing.channel_steps | {"tf32": 4, "fp16 2:4": 16}
    assert ada.channel_steps == orin.channel_steps | {"fp8": 16}


def test_the_same_stage_is_built_once_for_each_batch_size(scripted: Any, pictures: Any) -> None:
    runtime = TensorRT()
    for _ in range(3):
        runtime.open([b"second"], [], 1).answer(pictures, 2)
    runtime.open([b"second"], [], 1).answer(pictures, 3)
    assert len(scripted.configs) == 2


def test_a_bundle_gets_the_engines_and_hears_of_refused_graphs(scripted: Any, pictures: Any) -> None:
    runtime = TensorRT()
    files = runtime.extras([b"first", b"second"], pictures[:2])
    told = json.loads(files.pop("engines.json"))
    assert files == {"stage1.engine": b"first", "stage2.engine": b"second"}
    assert [engine["file"] for engine in told["engines"]] == list(files)
    assert told["timing_cache"].startswith("timing-")
    assert [engine["seconds"] for engine in told["engines"]] == [{"/stem/Conv": pytest.approx(1e-3)}] * 2
    assert len(scripted.configs) == 2
    assert runtime.remarks() == []
    scripted.gpu.capturable = False
    for batch in (1, 3):
        runtime.open([b"second"], [], 1).answer(pictures, batch)
    (remark,) = runtime.remarks()
    assert "without" in remark


def test_an_artifact_tells_which_layers_run_in_another_precision(scripted: Any, pictures: Any) -> None:
    scripted.information = json.dumps({"Layers": [layer("/stem/Conv + /stem/Relu", v11("Int8"), v11("Int8"), "Int8")]})
    opened = TensorRT().open([b"second"], [], 1)
    assert opened.proof(pictures[:1], {"/stem/Conv": "int8"}) == Proof()
    assert len(opened.proof(pictures[:1], {"/stem/Conv": "fp32"}).differences) == 2


@pytest.mark.parametrize(
    ("says", "kind", "words"),
    [
        ("Error Code 10: Could not find any\nimplementation for node /a/Conv", trt.EngineError, "node /a/Conv"),
        ("Error Code 1: Cuda Runtime (out of memory)", OutOfDeviceMemoryError, "smaller batch"),
        ("", trt.EngineError, "node '/a/Bogus' (Bogus): no importer"),
    ],
)
def test_what_tensorrt_refuses_is_one_clear_line(
    scripted: Any, pictures: Any, says: str, kind: Any, words: str
) -> None:
    scripted.says = says
    with pytest.raises(kind) as error:
        TensorRT().open([b"second" if says else b"bad"], [], 1).answer(pictures, 2)
    assert words in one_line(error)
