"""Images resized before a network: the same in torch, in the run loop and in a session."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluators.artifact import Artifact
from evaluators.artifact_builder import ArtifactBuilder
from evaluators.data import LabelledImages
from evaluators.deployed import DeployedCandidate
from evaluators.flops.evaluator import FlopsEvaluator
from evaluators.inference.resizing import resized
from evaluators.latency.evaluator import LatencyEvaluator, Reference
from evaluators.latency.remeasure import remeasure, write_job
from evaluators.runtimes.base import Runtime, Target
from evaluators.runtimes.onnxruntime_cpu import OnnxRuntime
from evaluators.runtimes.registry import runtime
from spaces.candidate import Candidate
from spaces.depth import shortened
from spaces.dynamic.exit_network import ExitHead, ExitNetwork
from spaces.dynamic.exit_network import resized as resized_in_torch
from spaces.input_size import at_size
from spaces.testing import skippable_network
from spaces.thresholds import Thresholds

TARGET = Target("onnxruntime", "this CPU", batch=4, threads=1)


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40))
def test_numpy_resizes_as_torch_does(before: int, after: int) -> None:
    images = torch.rand(2, 3, before, before, generator=torch.Generator().manual_seed(before))
    expected = resized_in_torch(images, after).numpy()
    np.testing.assert_allclose(resized(images.numpy(), after), expected, atol=2e-5)


def test_images_of_the_size_are_the_same_images() -> None:
    images = np.zeros((2, 1, 8, 8), np.float32)
    assert resized(images, 8) is images
    assert resized(images, None) is images


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(12, 1, 16, 16, generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def network() -> ExitNetwork:
    torch.manual_seed(6)
    return ExitNetwork(skippable_network(), ["first"], [ExitHead(8, 4, 2)]).eval()


@pytest.fixture(scope="module")
def builder(network: ExitNetwork, images: torch.Tensor) -> ArtifactBuilder:
    return ArtifactBuilder(network, images.numpy(), OnnxRuntime(), removable=["second", "last"])


def built(builder: ArtifactBuilder, version: ExitNetwork, images, precision: str = "fp32", **exits) -> Artifact:
    layers = dict.fromkeys(builder.layers, precision)
    thresholds = Thresholds({"exit1": None} | exits)
    candidate = Candidate({}, layers, thresholds, removed_blocks=version.removed_blocks, input_size=version.input_size)
    return builder.build(version, candidate, builder.read_ranges(version, images.numpy()))


def open_on(library: Runtime, artifact: Artifact):
    files = [library.deployable(stage) for stage in artifact.stages]
    return library.open(files, artifact.plan, 1, input_size=artifact.input_size)


@pytest.mark.parametrize("library", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("removed", [(), ("second",), ("last", "second")])
@pytest.mark.parametrize("size", [8, 11])
def test_a_file_answers_as_torch_does_at_its_size(size, removed, library, network, builder, images) -> None:
    if library == "openvino":
        pytest.importorskip("openvino")
    version = at_size(shortened(network, removed), size)
    session = open_on(runtime(library), built(builder, version, images))
    with torch.no_grad():
        expected = version(images)[-1].numpy()
    found, _ = session.answer(images.numpy(), 5)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    assert builder.disagreement(version) is None


def test_int8_and_exits_work_at_a_smaller_size(network, builder, images) -> None:
    version = at_size(network, 8)
    exact = built(builder, version, images, exit1=0.5)
    rounded = built(builder, version, images, "int8", exit1=0.5)
    logits = [
        OnnxRuntime().open(each.deployed, each.plan, 1, input_size=8).all_logits(images.numpy(), 4)
        for each in (exact, rounded)
    ]
    with torch.no_grad():
        expected = torch.stack(version.answers(images), 1).numpy()
    np.testing.assert_allclose(logits[0], expected, atol=1e-4)
    assert np.abs(logits[1] - logits[0]).max() < 0.2 * np.abs(logits[0]).max()
    assert exact.digest != built(builder, network, images, exit1=0.5).digest


@pytest.fixture
def smaller(network, builder, images) -> DeployedCandidate:
    version = at_size(network, 8)
    artifact = built(builder, version, images)
    candidate = Candidate({}, dict.fromkeys(builder.layers, "fp32"), Thresholds({"exit1": None}), input_size=8)
    data = LabelledImages(images.numpy(), np.zeros(len(images), np.int64))
    return DeployedCandidate(version, candidate, artifact, data, OnnxRuntime(), TARGET)


def test_flops_are_those_of_the_smaller_image(smaller, network, builder, images) -> None:
    flops = FlopsEvaluator(network, images[:1])
    artifact = built(builder, network, images)
    candidate = Candidate({}, dict.fromkeys(builder.layers, "fp32"), Thresholds({"exit1": None}))
    own = DeployedCandidate(network, candidate, artifact, smaller.validation, OnnxRuntime(), TARGET)
    assert flops.measure(smaller).value == pytest.approx(flops.measure(own).value / 4, rel=0.01)


def test_a_smaller_version_is_timed_against_a_reference_at_the_images_own_size(
    smaller, network, builder, images, tmp_path
) -> None:
    reference = Reference(built(builder, network, images).deployed[0], 1e-3)
    latency = LatencyEvaluator({"fp32": reference}, OnnxRuntime(), TARGET)
    assert latency.measure(smaller).notes["ratio"] > 0
    write_job(tmp_path, smaller, latency)
    assert remeasure(tmp_path).latency.value > 0
