"""TensorRT's own parser and builder take every kind of file that the writer makes.

No GPU is needed, because engines are built and never run: TensorRT for RTX builds on a CPU, and the Python bindings of
TensorRT find its libraries under the names that they ask for. A test aid only; nothing of it is shipped.
"""

import copy
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import platformdirs
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from evaluators.artifact_builder import ArtifactBuilder
from evaluators.inference.resizing import resized
from evaluators.latency.cache import is_two_in_four
from evaluators.runtimes.onnx_rewrites.unsigned_activations import unsigned_activations
from evaluators.runtimes.onnxruntime_cpu import open_session
from spaces.candidate import Candidate
from spaces.depth import shortened
from spaces.dynamic.exit_network import ExitNetwork
from spaces.input_size import at_size
from spaces.thresholds import Thresholds
from studies.digits.model import resnet20
from tests.evaluators.test_fp16 import MobileNetwork
from tests.evaluators.test_quantization import Accelerator
from tests.helpers import deep

pytestmark = pytest.mark.slow

WHEELS = ("onnxruntime-ep-nv-tensorrt-rtx-cu13==0.5.0", "tensorrt-cu13-bindings==11.4.0.106")
WANTED = ("libtensorrt_rtx.so.", "libtensorrt_onnxparser_rtx.so.")
LINKS = {
    "libnvinfer.so.11": "libtensorrt_rtx.so.",
    "libtensorrt_rtx.so": "libtensorrt_rtx.so.",
    "libtensorrt_rtx.so.1": "libtensorrt_rtx.so.",
    "libnvonnxparser.so.11": "libtensorrt_onnxparser_rtx.so.",
}
PLUGINS = """
void *getPluginRegistry(void) { return 0; }
void *getBuilderPluginRegistry(int capability) { (void)capability; return 0; }
int initLibNvInferPlugins(void *logger, const char *space) { (void)logger; (void)space; return 1; }
"""
"""What the bindings ask of the plugin library, which TensorRT for RTX has not."""
SCRIPT = """
import json, sys
import tensorrt_bindings as trt

logger = trt.Logger(trt.Logger.ERROR)

def build(path, shape):
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(path):
        return "; ".join(str(parser.get_error(index)) for index in range(parser.num_errors))
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)  # takes effect where weights are 2:4, and nowhere else
    config.avg_timing_iterations = 8
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    profile = builder.create_optimization_profile()
    profile.set_shape(network.get_input(0).name, shape, shape, shape)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    return "not built" if plan is None else plan.nbytes

print(json.dumps([build(path, tuple(shape)) for path, shape in json.loads(sys.argv[1])]))
"""


def fetched(folder: Path) -> Path:
    """Returns a folder with the libraries and the bindings, taken from their wheels once."""
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            wheels, complete = Path(scratch, "wheels"), Path(scratch, "complete")
            download(wheels)
            complete.mkdir()
            for wheel in wheels.iterdir():
                unpack(wheel, complete)
            complete.rename(folder)
    return folder


def download(folder: Path) -> None:
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--retries", "1", "--timeout", "15"]
    command = [*pip, "--quiet", "--only-binary", ":all:", "--dest", str(folder), *WHEELS]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=80, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip("TensorRT's wheels were not fetched within 80 s")
    if run.returncode:
        pytest.skip(f"TensorRT's wheels cannot be had here: {(run.stderr.strip() or 'pip failed').splitlines()[-1]}")


def unpack(wheel: Path, folder: Path) -> None:
    """Takes the bindings, and of the libraries those that a build needs."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith("tensorrt_bindings/"):
                archive.extract(name, folder)
            elif Path(name).name.startswith(WANTED):
                (folder / Path(name).name).write_bytes(archive.read(name))


class CpuBuilder:
    """Builds engines in a process of its own."""

    def __init__(self, libraries: Path, packages: Path, files: Path) -> None:
        self._environment = {**os.environ, "LD_LIBRARY_PATH": str(libraries), "PYTHONPATH": str(packages)}
        self._files = files

    def __call__(self, stages: list[bytes], shapes: list[tuple[int, ...]]) -> list[int | str]:
        """Returns the bytes of each file's engine, or why TensorRT refused it."""
        jobs = []
        for index, (stage, shape) in enumerate(zip(stages, shapes, strict=True)):
            path = self._files / f"{index}.onnx"
            path.write_bytes(stage)
            jobs.append([str(path), shape])
        command = [sys.executable, "-c", SCRIPT, json.dumps(jobs)]
        run = subprocess.run(command, env=self._environment, capture_output=True, text=True, timeout=60, check=False)
        assert run.returncode == 0, run.stderr[-2000:]
        answers: list[int | str] = json.loads(run.stdout.splitlines()[-1])
        return answers


@pytest.fixture(scope="module")
def build_engines(tmp_path_factory: pytest.TempPathFactory) -> CpuBuilder:
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("the stand-in for TensorRT's plugin library is compiled with gcc, which is not installed")
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        pytest.skip(f"TensorRT for RTX is for Linux on x86_64, got {platform.system()} on {platform.machine()}")
    tag = f"{sys.implementation.cache_tag}-11.4"
    cache = platformdirs.user_cache_path("deployfront-tests", ensure_exists=True)
    wheels = fetched(cache / f"tensorrt-{tag}")
    libraries, files = tmp_path_factory.mktemp("libraries"), tmp_path_factory.mktemp("files")
    for link, start in LINKS.items():
        (libraries / link).symlink_to(next(wheels.glob(f"{start}*")))
    source = libraries / "plugins.c"
    source.write_text(PLUGINS)
    stub = str(libraries / "libnvinfer_plugin.so.11")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", stub, str(source)], check=True, timeout=60)
    return CpuBuilder(libraries, wheels, files)


def shapes_of(stages: tuple[bytes, ...], images: np.ndarray) -> list[tuple[int, ...]]:
    """Returns the shape that each stage's input has, found by running the stages one after the other."""
    shapes, features = [], images
    for stage in stages:
        shapes.append(features.shape)
        session = open_session(stage, 1)
        features = session.run(None, {session.get_inputs()[0].name: features})[0]
    return shapes


def assert_builds(
    build_engines: CpuBuilder, builder: ArtifactBuilder, network: ExitNetwork, candidate: Candidate, images: np.ndarray
) -> None:
    stages = builder.build(network, candidate).stages
    answers = build_engines(list(stages), shapes_of(stages, images))
    assert len(answers) == len(candidate.active_exits) + 1
    assert all(isinstance(answer, int) and answer > 1000 for answer in answers), answers


MIXES: Mapping[str, tuple[str, ...]] = {
    "fp32": ("fp32",),
    "fp16": ("fp16",),
    "int8": ("int8",),
    "fp8": ("fp8",),
    "float-half": ("fp32", "fp16"),
    "half-int8": ("fp16", "int8"),
    "half-fp8": ("fp16", "fp8"),
    "fp8-int8": ("fp8", "int8"),
    "all": ("int8", "fp16", "fp32", "int8", "fp8"),
}


NO_EXITS = Thresholds()


def candidate_of(layers: tuple[str, ...], mix: str, thresholds: Thresholds = NO_EXITS) -> Candidate:
    cycle = MIXES[mix]
    return Candidate({}, {layer: cycle[index % len(cycle)] for index, layer in enumerate(layers)}, thresholds)


@pytest.mark.parametrize("fewest", [1, 16], ids=["every layer", "wide layers"])
@pytest.mark.parametrize("threshold", [None, 0.8], ids=["whole", "stages"])
@pytest.mark.parametrize("mix", MIXES)
def test_each_kind_of_file_builds(mix, threshold, fewest, build_engines, network, images) -> None:
    builder = ArtifactBuilder(network, images.numpy(), Accelerator(int8_channels=fewest))
    candidate = candidate_of(builder.layers, mix, Thresholds(dict.fromkeys(network.exit_names, threshold)))
    assert_builds(build_engines, builder, network, candidate, images.numpy()[:4])


@pytest.mark.parametrize("mix", ["int8", "half-int8", "fp8", "half-fp8", "all"])
def test_residual_blocks_with_downsampling_build(mix, build_engines) -> None:
    torch.manual_seed(0)
    network, images = ExitNetwork(resnet20().eval(), [], []).eval(), torch.randn(2, 1, 32, 32).numpy()
    builder = ArtifactBuilder(network, images, Accelerator(int8_channels=16))
    assert_builds(build_engines, builder, network, candidate_of(builder.layers, mix), images)


@pytest.mark.parametrize("mix", ["fp16", "float-half", "fp8", "all"])
def test_activations_with_constants_build(mix, build_engines) -> None:
    torch.manual_seed(0)
    network, images = ExitNetwork(MobileNetwork().eval(), [], []).eval(), torch.randn(2, 3, 8, 8).numpy()
    builder = ArtifactBuilder(network, images, Accelerator())
    assert_builds(build_engines, builder, network, candidate_of(builder.layers, mix), images)


def test_a_file_that_allows_tf32_builds(build_engines, network, images) -> None:
    builder = ArtifactBuilder(network, images.numpy(), Accelerator(), fp32_in="tf32")
    assert_builds(build_engines, builder, network, candidate_of(builder.layers, "fp32"), images.numpy()[:4])


def test_a_sliced_network_builds(build_engines, network, space, images) -> None:
    sliced = space.candidate(space.uniform(0.5, "int8", 0.8))
    builder = ArtifactBuilder(network, images.numpy(), Accelerator(int8_channels=8))
    assert_builds(build_engines, builder, space.apply(network, sliced), sliced, images.numpy()[:4])


@pytest.mark.parametrize("mix", ["fp32", "int8", "half-int8", "half-fp8", "all"])
@pytest.mark.parametrize("threshold", [None, 0.8], ids=["whole", "stages"])
def test_a_network_without_some_of_its_blocks_builds(mix, threshold, build_engines, images) -> None:
    network = deep.with_exits()
    builder = deep.builder_of(network, Accelerator(int8_channels=8), images)
    exits = Thresholds(dict.fromkeys(network.exit_names, threshold))
    for blocks in (deep.REMOVABLE[1:4], deep.REMOVABLE):
        candidate = replace(candidate_of(builder.layers, mix, exits), removed_blocks=blocks)
        assert_builds(build_engines, builder, shortened(network, blocks), candidate, images.numpy()[:4])


@pytest.mark.parametrize("mix", ["fp32", "int8", "half-int8"])
def test_a_network_for_smaller_images_builds(mix, build_engines, images) -> None:
    dense = deep.with_exits()
    network = at_size(dense, 6)
    builder = deep.builder_of(dense, Accelerator(int8_channels=8), images)
    exits = Thresholds(dict.fromkeys(network.exit_names, 0.8))
    candidate = replace(candidate_of(builder.layers, mix, exits), input_size=6)
    assert_builds(build_engines, builder, network, candidate, resized(images.numpy()[:4], 6))


def test_weights_with_two_zeros_in_four_build(build_engines, network, space, images) -> None:
    sparse = copy.deepcopy(network)
    for module in sparse.modules():
        if isinstance(module, nn.Conv2d) and module.weight.shape[1] % 4 == 0:
            module.weight.data[:, torch.arange(module.weight.shape[1]) % 4 < 2] = 0
    for mix in ("fp16", "int8"):
        builder = ArtifactBuilder(sparse, images.numpy(), Accelerator())
        candidate = candidate_of(builder.layers, mix)
        (stage,) = builder.build(sparse, candidate).stages
        weights = [numpy_helper.to_array(found) for found in onnx.load_from_string(stage).graph.initializer]
        assert any(is_two_in_four(weight) and weight.any() for weight in weights if weight.ndim == 4)
        assert_builds(build_engines, builder, sparse, candidate, images.numpy()[:4])


def without_casts(stage: bytes) -> bytes:
    """Returns a file whose nodes read what the casts between them read."""
    model = onnx.load_from_string(stage)
    sources = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Cast"}
    kept = [node for node in model.graph.node if node.op_type != "Cast"]
    for node in kept:
        for index, name in enumerate(node.input):
            node.input[index] = sources.get(name, name)
        for index, name in enumerate(node.output):
            node.output[index] = "logits" if name == sources["logits"] else name
    del model.graph.node[:]
    model.graph.node.extend(kept)
    return bytes(model.SerializeToString())


def test_an_illegal_graph_is_refused_with_tensorrts_reason(build_engines, network, images) -> None:
    builder = ArtifactBuilder(network, images.numpy(), Accelerator())
    off = Thresholds(dict.fromkeys(network.exit_names))
    (half,) = builder.build(network, candidate_of(builder.layers, "fp16", off)).stages
    (int8,) = builder.build(network, candidate_of(builder.layers, "int8", off)).stages
    illegal = [without_casts(half), unsigned_activations(int8)]
    untyped, asymmetric = build_engines(illegal, [(4, 1, 8, 8)] * 2)
    assert "`input` and `kernel` must be of same type" in str(untyped)
    assert "Non-zero zero point is not supported" in str(asymmetric)
