"""What TensorRT's inspector and the system's tools tell, read in every form that they have."""

import json
from typing import Any

import pytest

from evaluators.runtimes.base import Proof
from evaluators.runtimes.tensorrt_gpu import inspector as trt_report
from tests.helpers.scripted_gpu import one_line
from tests.helpers.scripted_tensorrt import layer, v10, v11

INT8_10 = "Thirty-two wide channel vectorized row major Int8 format"
FP32_10 = "Row major linear FP32"
FP16_10 = "Channel major FP16 format where channel % 8 == 0"


TEN = [
    layer("Reformatting CopyNode for Input Tensor 0 to /stem/Conv", v10(FP32_10), v10(INT8_10), None, "Reformat"),
    layer("/stem/Conv + /stem/Relu", v10(INT8_10), v10(INT8_10), "Int8"),
    layer("/inner/Conv", v10(FP16_10), v10(FP16_10), "Half"),
    layer("/head/Gemm", v10("N/A due to dynamic shapes"), v10(FP32_10), "Float", "MatrixMultiply"),
]
ELEVEN = [
    layer("Reformatting CopyNode for Input Tensor 0 to /stem/Conv", v11("Float"), v11("Int8"), None, "Reformat"),
    layer("/stem/Conv + /stem/Relu", v11("Int8"), v11("Int8"), "Int8"),
    layer("/inner/Conv", v11("Half"), v11("Half"), "Half"),
    layer("/head/Gemm", v11("Float"), v11("Float"), "Float", "MatrixMultiply"),
]


def rows(layers: Any) -> Any:
    return trt_report.layer_rows(json.dumps({"Layers": layers, "Bindings": ["images", "logits"]}))


@pytest.mark.parametrize("layers", [TEN, ELEVEN], ids=["10", "11"])
def test_both_forms_of_the_inspector_are_read(layers: Any) -> None:
    found = rows(layers)
    assert [row.kind for row in found] == ["Reformat", "CaskConvolution", "CaskConvolution", "MatrixMultiply"]
    assert [row.inputs for row in found[:3]] == [("fp32",), ("int8",), ("fp16",)]
    assert [row.weights for row in found] == [None, "int8", "fp16", "fp32"]
    assert found[-1].outputs == ("fp32",)


def test_precisions_that_are_as_asked_leave_nothing_to_report() -> None:
    asked = {"/stem/Conv": "int8", "/inner/Conv": "fp16", "/head/Gemm": "fp32"}
    assert trt_report.precision_proof(rows(ELEVEN), asked) == Proof()


def test_every_mismatch_is_told_in_words() -> None:
    asked = {"/stem/Conv": "fp16", "/inner/Conv": "fp16", "/gone/Conv": "int8", "/ste": "int8"}
    found = trt_report.precision_proof(rows(TEN), asked)
    where = "in '/stem/Conv + /stem/Relu' (CaskConvolution)"
    assert found.differences == (
        f"/stem/Conv: asked for fp16, but reads int8 {where}",
        f"/stem/Conv: asked for fp16, but has int8 weights {where}",
        "/gone/Conv: asked for int8, but no layer of the engine names it",
        "/ste: asked for int8, but no layer of the engine names it",
    )
    assert found.remarks() == list(found.differences)


def test_what_is_inside_a_fused_region_is_not_taken_for_a_proof() -> None:
    region = layer("{ForeignNode[/a/Conv.../b/Gemm]}", v11("Int8"), v11("Float"), None, "Myelin")
    region["Metadata"] = "[ONNX Layer: /a/Conv]\x1e[ONNX Layer: /b/Gemm]"
    found = trt_report.precision_proof(rows([region, *ELEVEN]), {"/a/Conv": "int8", "/b/Gemm": "int8", "/gone": "fp16"})
    assert found.unproven == ("/a/Conv", "/b/Gemm")
    lost, line = found.remarks()
    assert "no layer of the engine names it" in lost
    assert line == "2 layers run inside a fused region whose precision the runtime does not tell"


def test_an_engine_without_detailed_profiling_is_refused() -> None:
    with pytest.raises(trt_report.InspectionError) as error:
        rows(["/stem/Conv + /stem/Relu"])
    assert "DETAILED" in one_line(error)


@pytest.mark.parametrize(
    ("text", "precision"),
    [("BFloat16", "bf16"), ("BF16", "bf16"), ("FP8", "fp8"), ("Int64", "int64"), ("Int32", "int32"), ("", None)],
)
def test_datatypes_whose_names_contain_others(text: str, precision: str | None) -> None:
    assert trt_report.precision_of(text) == precision
