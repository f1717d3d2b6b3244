import ctypes
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evaluators.artifact_builder import ArtifactBuilder
from evaluators.runtimes.onnxruntime_cpu import OnnxRuntime
from evaluators.runtimes.tensorrt_gpu import runtime as trt
from evaluators.testing import space_of
from search.cli import run
from search.commands.libraries import set_up_libraries
from search.config.study import Study
from search.pipeline.pipeline import CompressionPipeline, build_pipeline
from spaces.dynamic.exit_network import ExitNetwork
from spaces.joint import JointSpace
from spaces.testing import exit_network
from tests.helpers import tiny
from tests.helpers.scripted_gpu import ScriptedGpu
from tests.helpers.scripted_tensorrt import ScriptedTensorRT

set_up_libraries()  # before a test imports MLflow
if "PYTEST_XDIST_WORKER" in os.environ:  # there are as many workers as cores, so one thread each, for commands too
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")

_WHOLE_SEARCHES = {
    "test_board",
    "test_browser",
    "test_bundle",
    "test_coordinator",
    "test_depth_search",
    "test_early_stopping",
    "test_frames",
    "test_fresh_timing",
    "test_input_size_search",
    "test_killed_training",
    "test_loading_flow",
    "test_mask_training",
    "test_masking",
    "test_mirror",
    "test_objectives",
    "test_openvino",
    "test_other_budget",
    "test_patterns",
    "test_pyfunc_model",
    "test_qat_search",
    "test_recovered_search",
    "test_sampler_names",
    "test_search",
    "test_search_only",
    "test_simple_versions",
    "test_skipping_search",
    "test_slow_layers",
    "test_streams",
    "test_written_before",
}
"""Files whose tests search, train or serve for real: together they take nine tenths of the suite's time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem in _WHOLE_SEARCHES:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def image() -> torch.Tensor:
    return torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def images() -> torch.Tensor:
    return torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="session")
def network() -> ExitNetwork:
    return exit_network()


@pytest.fixture(scope="session")
def builder(network: ExitNetwork, images: torch.Tensor) -> ArtifactBuilder:
    return ArtifactBuilder(network, images.numpy(), OnnxRuntime())


@pytest.fixture(scope="session")
def space(network: ExitNetwork, builder: ArtifactBuilder) -> JointSpace:
    return space_of(network, builder.layers)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of trained networks that only the tests use."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["DEPLOYFRONT_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def pipeline(cache: Path) -> CompressionPipeline:
    return build_pipeline(Study.parse(tiny.STUDY, "the tests' study"), lambda *_: None)


@pytest.fixture
def gpu() -> ScriptedGpu:
    return ScriptedGpu()


@pytest.fixture
def pictures() -> Any:
    return np.random.default_rng(0).normal(size=(6, 1, 2, 2)).astype(np.float32)


@pytest.fixture
def scripted(gpu: ScriptedGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    def load(name: str) -> ScriptedGpu:
        return gpu

    module = ScriptedTensorRT(gpu)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.setenv("DEPLOYFRONT_CACHE", str(tmp_path))
    trt._log.cache_clear()
    yield module
    trt._log.cache_clear()


@pytest.fixture(scope="session")
def folder(tmp_path_factory, cache) -> Path:
    """A finished search of twelve trials, and where it lies."""
    home = tmp_path_factory.mktemp("search")
    (home / "study.toml").write_text(tiny.STUDY)
    (home / "mlruns").mkdir()  # a folder that MLflow would take for a store of its own
    here = Path.cwd()
    os.chdir(home)
    try:
        assert run(["--study", "./study.toml", "--search", "one", "--runs", "runs"]) in (0, 1)
    finally:
        os.chdir(here)
    return home / "runs"
