"""OpenVINO: it keeps the contract, fp32 means fp32, and a search, its pick and its bundle run on it."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluators.artifact_builder import ArtifactBuilder
from evaluators.bundle.run import BatchSizes, PaddedStage
from evaluators.runtimes.base import TargetError
from evaluators.runtimes.onnxruntime_cpu import OnnxRuntime
from evaluators.runtimes.registry import runtime
from evaluators.testing import RuntimeContract
from search.cli import run
from search.config.study import Study, StudyError
from search.pipeline.pipeline import build_pipeline
from spaces.candidate import Candidate
from spaces.thresholds import Thresholds
from tests.helpers import tiny
from tests.helpers.searches import finished, stored

try:
    LIBRARY = runtime("openvino")
except TargetError as error:
    pytest.skip(str(error), allow_module_level=True)
needs_bf16 = pytest.mark.skipif("bf16" not in LIBRARY.capabilities().fp32_in, reason="this CPU does not multiply bf16")
OFF = Thresholds({"exit1": None, "exit2": None})


class TestOpenVino(RuntimeContract):
    @pytest.fixture
    def runtime(self):
        return LIBRARY


def answers(stages, images, library=LIBRARY) -> np.ndarray:
    return library.open([library.deployable(stage) for stage in stages], [], 1).answer(images.numpy(), 4)[0]


def uniform(builder, precision: str) -> Candidate:
    return Candidate({}, dict.fromkeys(builder.layers, precision), OFF)


@pytest.fixture(scope="module")
def in_bf16(network, images) -> ArtifactBuilder:
    return ArtifactBuilder(network, images.numpy(), LIBRARY, fp32_in="bf16")


@needs_bf16
def test_fp32_means_fp32_and_bf16_is_another_type(builder, in_bf16, network, images) -> None:
    (plain,), (allowing,) = (each.build(network, uniform(each, "fp32")).stages for each in (builder, in_bf16))
    exact = answers([plain], images, OnnxRuntime())
    np.testing.assert_allclose(answers([plain], images), exact, atol=1e-4)
    np.testing.assert_array_equal(answers([allowing], images, OnnxRuntime()), exact)
    difference = np.abs(answers([allowing], images) - exact).max() / np.abs(exact).max()
    assert 2**-12 < difference < 2**-4  # bf16 has eight bits of mantissa


@needs_bf16
def test_int8_layers_stay_int8_in_a_file_that_allows_bf16(in_bf16, network, images) -> None:
    for precision, kinds in (("int8", {"u8", "i8"}), ("fp32", {"bf16"})):
        artifact = in_bf16.build(network, uniform(in_bf16, precision))
        opened = LIBRARY.open(artifact.deployed, [], 1)
        wrong = dict.fromkeys(artifact.precisions, "fp32" if precision == "int8" else "int8")
        assert not opened.proof(images.numpy(), artifact.precisions).differences
        told = opened.proof(images.numpy(), wrong).differences
        assert {line.rpartition(" ")[2] for line in told} <= kinds
        assert len(told) >= 4


def test_a_layer_that_runs_in_another_precision_than_written_is_told(builder, network, images) -> None:
    artifact = builder.build(network, uniform(builder, "fp32"))
    opened = LIBRARY.open(artifact.deployed, [], 1)
    assert opened.proof(images.numpy(), {"/trunk/inner/inner.0/Conv": "int8"}).differences == (
        "/trunk/inner/inner.0/Conv: asked for int8, but runs in f32",
    )
    assert opened.proof(images.numpy(), {"nowhere": "int8"}).unproven == ("nowhere",)


def test_one_thread_s_work_is_the_cpu_time_of_the_caller(builder, network, images) -> None:
    many = np.repeat(images.numpy(), 100, axis=0)
    opened = LIBRARY.open(builder.build(network, uniform(builder, "fp32")).deployed, [], 1)
    opened.answer(many, len(many))
    whole, own = time.process_time(), time.thread_time()
    for _ in range(10):
        opened.answer(many, len(many))
    whole, own = time.process_time() - whole, time.thread_time() - own
    assert own == pytest.approx(whole, rel=0.1)


def test_staged_batches_of_any_size_answer_as_in_onnx_runtime(builder, network, space, images) -> None:
    candidate = space.candidate(space.uniform(1.0, "fp32", 0.6))
    artifact = builder.build(network, candidate)
    for batch in (1, 5, 7, 12):
        (here, left), (there, also) = (
            library.open(artifact.deployed, artifact.thresholds, 1).answer(images.numpy(), batch)
            for library in (LIBRARY, OnnxRuntime())
        )
        np.testing.assert_allclose(here, there, atol=1e-4)
        np.testing.assert_array_equal(left, also)


@given(st.integers(1, 100), st.integers(1, 100))
def test_a_batch_fits_and_few_sizes_are_compiled(whole: int, count: int) -> None:
    sizes = BatchSizes()
    assert sizes.fitting(whole) == whole
    assert count <= sizes.fitting(count) < 2 * count + (count > whole)
    assert len({sizes.fitting(other) for other in range(1, whole + 1)}) <= whole.bit_length() + 1


def test_padding_leaves_no_trace(builder, network, images) -> None:
    (stage,) = builder.build(network, uniform(builder, "fp32")).stages
    opened = LIBRARY.open([stage], [], 1)
    whole, _ = opened.answer(images.numpy(), 12)
    padded, _ = opened.answer(images.numpy(), 7)  # of seven, and of five in eight or in seven
    np.testing.assert_allclose(padded, whole, atol=1e-5)
    assert isinstance(opened._stages[0], PaddedStage)
    assert {shape[0] for shape in opened._stages[0].requests} == {12, 8}


def test_what_is_opened_again_answers_the_same(builder, network, images) -> None:
    (stage,) = builder.build(network, uniform(builder, "int8")).stages
    np.testing.assert_array_equal(answers([stage], images), answers([stage], images))


STUDY = tiny.STUDY.replace("batch = 4", 'batch = 4, runtime = "openvino"').replace("trials = 12", "trials = 6")


@pytest.fixture(scope="module")
def searched(tmp_path_factory, cache) -> Path:
    home = tmp_path_factory.mktemp("openvino")
    (home / "study.toml").write_text(STUDY)
    assert run(["--study", str(home / "study.toml"), "--search", "one", "--runs", str(home / "runs")]) in (0, 1)
    return home / "runs"


def test_a_search_runs_on_it(searched) -> None:
    search = stored(searched)
    assert len(finished(search.trials)) == 6
    latencies = [version.measured["latency"] for version in search.versions if "latency" in version.measured]
    assert latencies
    assert all(latency.target.startswith("openvino on ") for latency in latencies)
    assert not [remark for latency in latencies for remark in latency.remarks if "asked for" in remark]
    assert search.baseline.reference_self_ratio == pytest.approx(1.0, abs=0.3)
    assert "openvino" in search.baseline.environment


def test_its_bundle_runs_on_it_and_elsewhere(searched, tmp_path, capsys) -> None:
    out = tmp_path / "deploy"
    arguments = ["--runs", str(searched), "--search", "one", "--budget", "latency<1000%", "--out", str(out)]
    assert run(["pick", *arguments]) == 0
    assert json.loads((out / "bundle.json").read_text())["library"] == LIBRARY.version()

    def ran(*options: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, *options], capture_output=True, text=True, check=False)

    with_it = ran("-I", str(out / "run.py"))
    assert with_it.returncode == 0, with_it.stderr
    assert "(median here, openvino)" in with_it.stdout
    hidden = "import sys, runpy; sys.modules['openvino'] = None; sys.argv = ['run.py'];"
    hidden += f" runpy.run_path({str(out / 'run.py')!r}, run_name='__main__')"
    without = ran("-c", hidden)
    assert without.returncode == 0, without.stderr
    assert "(median here, onnxruntime)" in without.stdout
    assert "OpenVINO cannot be used here" in without.stderr
    capsys.readouterr()
    for target in (["--target", "openvino"], ["--target", "onnxruntime"], []):
        assert run(["measure", str(out), *target, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["target"].startswith(target[-1] if target else "openvino")
        assert abs(found["correct"] - found["expected"]) <= 1


def test_doctor_shows_it(capsys) -> None:
    assert run(["doctor", "--target", "openvino"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert LIBRARY.version() in shown
    assert ("target.fp32_in" in shown) == ("bf16" in LIBRARY.capabilities().fp32_in)


def test_bf16_is_refused_where_the_runtime_has_none() -> None:
    study = Study.parse(tiny.STUDY.replace("batch = 4", 'batch = 4, fp32_in = "bf16"'), "test")
    with pytest.raises(
        StudyError, match=r"target\.fp32_in = 'bf16' wants OpenVINO on a CPU .*, got onnxruntime on .*; leave it"
    ):
        build_pipeline(study, lambda *_: None)


def test_fp32_layers_run_in_one_type() -> None:
    with pytest.raises(StudyError, match="run in one type, got tf32 and bf16"):
        Study.parse(tiny.STUDY.replace("batch = 4", "batch = 4, tf32 = true, bf16 = true"), "test")


@needs_bf16
def test_bf16_is_part_of_every_record_and_file(cache) -> None:
    pipeline = build_pipeline(
        Study.parse(STUDY.replace("batch = 4", 'batch = 4, fp32_in = "bf16"'), "test"), lambda *_: None
    )
    assert str(pipeline.target).endswith(", fp32 in BF16")
    for artifact in pipeline.references.artifacts.values():
        properties = {pair.key: pair.value for pair in onnx.load_from_string(artifact.deployed[0]).metadata_props}
        assert properties == {"allow_bf16": "1"}
