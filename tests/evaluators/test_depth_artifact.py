"""Files without some residual blocks: their answers, what is not in them, their FLOPs, and every precision."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluators.artifact_builder import ArtifactBuilder
from evaluators.data import LabelledImages
from evaluators.deployed import DeployedCandidate
from evaluators.flops.evaluator import FlopsEvaluator, count_by_module
from evaluators.graph.exporter import ExportError
from evaluators.inference.staged import skipped_of
from evaluators.quantization.adaround import Learning
from evaluators.quantization.scheme import Scheme
from evaluators.runtimes.base import Runtime, Target, TargetError
from evaluators.runtimes.onnxruntime_cpu import OnnxRuntime, load
from evaluators.runtimes.registry import runtime
from evaluators.size import ParamsEvaluator, SizeEvaluator
from evaluators.testing import space_of
from spaces.candidate import Candidate
from spaces.depth import find_stages, shortened
from spaces.dynamic.exit_network import ExitNetwork
from spaces.dynamic.masks import MASKS
from spaces.dynamic.masks.base import insert_masks, masks_of
from spaces.dynamic.masks.residual_blocks import find_sites
from spaces.joint import JointSpace
from spaces.patterns import PatternSpace, zeros_of
from spaces.testing import pictures
from spaces.thresholds import Thresholds
from studies.benchmarks.coverage import random_network
from tests.evaluators.test_quantization import Accelerator
from tests.helpers import deep, skippable
from tests.helpers.deep import REMOVABLE

IMAGES = pictures(12)
REMOVED = st.lists(st.sampled_from(REMOVABLE), unique=True).map(tuple)
WELL_KNOWN = (
    "resnet18",
    "resnet50",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "convnext_tiny",
    "regnet_x_400mf",
)
PATTERNS = {"stage1.1.conv1": "50%", "stage2.0.conv1": "75%"}


@pytest.fixture(scope="module")
def network() -> ExitNetwork:
    return deep.with_exits()


@pytest.fixture(scope="module")
def builder(network: ExitNetwork) -> ArtifactBuilder:
    return deep.builder_of(network)


@pytest.fixture(scope="module")
def space(network: ExitNetwork, builder: ArtifactBuilder) -> JointSpace:
    plain = space_of(network, builder.layers)
    patterns = PatternSpace({layer: (pattern,) for layer, pattern in PATTERNS.items()})
    return JointSpace(plain.sparsity, plain.precision, plain.thresholds, patterns)


def all_answers(artifact, images=IMAGES) -> list[np.ndarray]:
    """Returns the logits of each exit and of the trunk, every image run through all stages."""
    answers, features = [], images.numpy()
    for stage in artifact.stages:
        features, *logits = load(stage, 1)(features)
        answers += logits or [features]
    return answers


def torch_answers(network: ExitNetwork, images=IMAGES) -> list[np.ndarray]:
    with torch.no_grad():
        return [logits.numpy() for logits in network.answers(images)]


def signal_to_noise(found: np.ndarray, expected: np.ndarray) -> float:
    """Returns the ratio in decibels."""
    return float(10 * np.log10(np.square(expected).sum() / np.square(found - expected).sum()))


def weights_in(stages) -> dict[str, int]:
    """Returns the values of each initializer that files hold, by its name."""
    return {
        tensor.name: int(np.prod(tensor.dims))
        for stage in stages
        for tensor in onnx.load_from_string(stage).graph.initializer
    }


@settings(deadline=None, max_examples=25)
@given(blocks=REMOVED, keep=st.sampled_from([0.25, 0.5, 0.75, 1.0]), confidence=st.sampled_from([None, 0.8]))
def test_files_answer_as_torch_does(network, builder, space, blocks, keep, confidence) -> None:
    candidate = replace(space.candidate(space.uniform(keep, "fp32", confidence)), removed_blocks=blocks)
    smaller = space.apply(network, candidate)
    artifact = builder.build(smaller, candidate)
    expected = torch_answers(smaller) if confidence else torch_answers(smaller)[-1:]
    for found, logits in zip(all_answers(artifact), expected, strict=True):
        np.testing.assert_allclose(found, logits, atol=1e-5)


@settings(deadline=None, max_examples=15)
@given(blocks=REMOVED, keep=st.sampled_from([0.5, 1.0]), confidence=st.sampled_from([None, 0.8]))
def test_int8_files_are_close_to_torch(network, builder, space, blocks, keep, confidence) -> None:
    candidate = replace(space.candidate(space.uniform(keep, "int8", confidence)), removed_blocks=blocks)
    smaller = space.apply(network, candidate)
    artifact = builder.build(smaller, candidate, builder.read_ranges(smaller, IMAGES.numpy()))
    found, expected = all_answers(artifact)[-1], torch_answers(smaller)[-1]
    assert signal_to_noise(found, expected) > 15


@settings(deadline=None, max_examples=5)
@given(blocks=REMOVED, data=st.data())
def test_layers_of_any_precision_stand_around_the_gap(network, space, blocks, data) -> None:
    builder = deep.builder_of(network, Accelerator())
    choice = st.sampled_from(["fp32", "fp16", "int8"])
    precision = {layer: data.draw(choice) for layer in builder.layers}
    candidate = replace(space.dense(), precision=precision, removed_blocks=blocks)
    smaller = space.apply(network, candidate)
    artifact = builder.build(smaller, candidate, builder.read_ranges(smaller, IMAGES.numpy()))
    assert signal_to_noise(all_answers(artifact)[-1], torch_answers(smaller)[-1]) > 15
    nodes = {node.name for stage in artifact.stages for node in onnx.load_from_string(stage).graph.node}
    assert artifact.precisions.keys() <= nodes
    assert not any(f"/{block.replace('.', '/')}/" in name for name in artifact.precisions for block in blocks)


@pytest.mark.parametrize("blocks", [REMOVABLE[:1], REMOVABLE[1:4], REMOVABLE])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_what_is_left_out_is_in_no_file_and_in_no_count(network, builder, space, blocks, precision) -> None:
    dense = space.candidate(space.uniform(1.0, precision))
    candidate = replace(dense, removed_blocks=blocks)
    subject, whole = (
        DeployedCandidate(
            space.apply(network, each),
            each,
            builder.build(space.apply(network, each), each),
            LabelledImages(IMAGES.numpy(), np.zeros(12, dtype=np.int64)),
            OnnxRuntime(),
            Target("onnxruntime", "here", 1, 1),
        )
        for each in (candidate, dense)
    )
    before, after = weights_in(whole.artifact.stages), weights_in(subject.artifact.stages)
    gone = {name for name in before if any(f"trunk.{block}." in name for block in blocks)}
    assert gone
    assert not any(f"trunk.{block}." in name for name in after for block in blocks)
    weights = {name: count for name, count in before.items() if name in gone and name.endswith("weight")}
    kept = {name for name in before if name.startswith("trunk.") and name not in gone}
    assert kept <= after.keys(), "all others are there"
    bytes_of_weights = sum(weights.values()) * (4 if precision == "fp32" else 1)
    saved = SizeEvaluator().measure(whole).value - SizeEvaluator().measure(subject).value
    assert saved > bytes_of_weights
    parameters = sum(
        parameter.numel() for block in blocks for parameter in network.trunk.get_submodule(block).parameters()
    )
    counted = ParamsEvaluator().measure(whole).value - ParamsEvaluator().measure(subject).value
    assert counted == parameters


@settings(deadline=None, max_examples=6)
@given(blocks=REMOVED, keep=st.sampled_from([0.5, 1.0]))
def test_flops_are_less_by_those_of_the_blocks(network, builder, space, blocks, keep) -> None:
    flops = FlopsEvaluator(network, pictures(1))
    candidate = space.candidate(space.uniform(keep, "fp32"))
    counts = count_by_module(space.apply(network, candidate), pictures(1))
    values = []
    for each in (candidate, replace(candidate, removed_blocks=blocks)):
        smaller = space.apply(network, each)
        images = LabelledImages(IMAGES.numpy(), np.zeros(12, dtype=np.int64))
        target = Target("onnxruntime", "here", 1, 1)
        subject = DeployedCandidate(smaller, each, builder.build(smaller, each), images, OnnxRuntime(), target)
        values.append(flops.measure(subject).value)
    gone = sum(n for path, n in counts.items() if path.startswith(tuple(f"trunk.{block}." for block in blocks)))
    assert values[0] - values[1] == pytest.approx(gone)
    assert (gone > 0) == bool(blocks)


@pytest.mark.parametrize("blocks", [("first",), ("second", "last"), ("first", "second", "last")])
@pytest.mark.parametrize("exits", [(), ("down",)])
def test_gates_of_the_other_blocks_go_on_deciding(blocks, exits) -> None:
    network = skippable.gated(exits=exits)
    builder = deep.builder_of(network, images=pictures(40))
    smaller = shortened(network, blocks)
    gates = dict.fromkeys(smaller.skip_blocks, 0.0)
    heads = dict.fromkeys(network.exit_names, 0.999999)
    candidate = Candidate({}, dict.fromkeys(builder.layers, "fp32"), Thresholds(heads, gates), {}, blocks)
    artifact = builder.build(smaller, candidate)
    assert set(artifact.blocks) == set(gates)
    runs: dict[str, np.ndarray] = {}

    def decide(block: str, logits: torch.Tensor) -> torch.Tensor:
        runs[block] = (logits >= 0).flatten().numpy()
        return (logits >= 0).float()

    images = pictures(40)
    with torch.no_grad():
        _, expected = smaller.run_trunk(images, decide)
    found, routes = OnnxRuntime().open(artifact.deployed, artifact.plan, 1).answer(images.numpy(), 8)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
    for column, block in enumerate(artifact.blocks):
        np.testing.assert_array_equal(~skipped_of(routes, len(artifact.blocks))[:, column], runs[block])


@pytest.mark.parametrize("kind", ["dgnet", "lccl"])
def test_masks_of_the_other_blocks_go_on_masking(kind: str) -> None:
    torch.manual_seed(3)
    trunk, images = deep.settled(skippable.network()), IMAGES
    insert_masks(trunk, find_sites(trunk, images[:1]), MASKS[kind], 0.5)
    network = ExitNetwork(trunk, (), ()).eval()
    builder = deep.builder_of(network, images=images)
    space = space_of(network, builder.layers)
    for blocks in (("second",), ("first", "last")):
        candidate = replace(space.candidate(space.uniform(0.5, "fp32")), removed_blocks=blocks)
        smaller = space.apply(network, candidate)
        assert {mask.site.block for mask in masks_of(smaller)}.isdisjoint(blocks)
        artifact = builder.build(smaller, candidate)
        (found,), (expected,) = all_answers(artifact, images), torch_answers(smaller, images)
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_patterns_stay_in_the_layers_that_are_left(network, builder, space) -> None:
    candidate = replace(space.dense(), patterns=PATTERNS, removed_blocks=("stage1.0", "stage2.1"))
    smaller = space.apply(network, candidate)
    artifact = builder.build(smaller, candidate)
    np.testing.assert_allclose(all_answers(artifact)[-1], torch_answers(smaller)[-1], atol=1e-5)
    arrays = {
        tensor.name: onnx.numpy_helper.to_array(tensor)
        for tensor in onnx.load_from_string(artifact.stages[0]).graph.initializer
    }
    for layer, pattern in PATTERNS.items():
        zeros = np.mean(arrays[f"trunk.{layer}.weight"] == 0)
        assert zeros == pytest.approx(zeros_of(pattern), abs=0.02)


def test_a_tensor_that_is_rounded_without_the_blocks_only_has_a_range() -> None:
    torch.manual_seed(0)
    network = ExitNetwork(deep.settled(deep.normalising()), (), ()).eval()
    builder = deep.builder_of(network)
    smaller = shortened(network, ["blocks.0", "blocks.1"])
    ranges = builder.read_ranges(smaller, IMAGES.numpy())
    assert ranges.keys() - builder.ranges.keys(), "or the test says nothing"
    candidate = Candidate({}, dict.fromkeys(builder.layers, "int8"), removed_blocks=smaller.removed_blocks)
    artifact = builder.build(smaller, candidate, ranges)
    assert signal_to_noise(all_answers(artifact)[-1], torch_answers(smaller)[-1]) > 20
    scales = builder.trainable(smaller).scales()
    assert set(scales) <= ranges.keys()


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(ranges="batchnorm", bias_correction="batchnorm"),
        Scheme(bias_correction="data", calibrator="entropy"),
        Scheme(weights="per-tensor", calibrator="mse"),
    ],
    ids=["batchnorm", "data", "per-tensor"],
)
def test_every_scheme_quantizes_a_shortened_network(scheme: Scheme) -> None:
    network = deep.stages()
    blocks = ("stage1.0", "stage1.2", "stage2.1")
    builder = ArtifactBuilder(network, IMAGES.numpy(), OnnxRuntime(), scheme=scheme, removable=blocks)
    smaller = shortened(network, blocks)
    candidate = Candidate({}, dict.fromkeys(builder.layers, "int8"), removed_blocks=blocks)
    artifact = builder.build(smaller, candidate, builder.read_ranges(smaller, IMAGES.numpy()))
    assert signal_to_noise(all_answers(artifact)[-1], torch_answers(smaller)[-1]) > 8


def test_rounding_is_learned_for_the_layers_that_are_left(network, builder, space) -> None:
    blocks = ("stage1.1", "stage2.2")
    candidate = replace(space.candidate(space.uniform(0.5, "int8")), removed_blocks=blocks)
    smaller = space.apply(network, candidate)
    ranges = builder.read_ranges(smaller, IMAGES.numpy())
    grids = builder.learn_rounding(smaller, candidate, IMAGES.numpy(), Learning(20), ranges)
    assert grids
    assert not any(name.startswith(tuple(f"trunk.{block}." for block in blocks)) for name in grids)
    artifact = builder.build(smaller, candidate, ranges, grids)
    assert signal_to_noise(all_answers(artifact)[-1], torch_answers(smaller)[-1]) > 10


def test_boundaries_in_what_is_left_out_do_not_count(builder, space) -> None:
    dense = space.dense()
    mixed = replace(dense, precision={**dense.precision, "stage1.1.conv1": "int8"})
    assert builder.boundaries(mixed) > 0
    assert builder.boundaries(replace(mixed, removed_blocks=("stage1.1",))) == 0


def test_graphs_are_made_from_the_dense_one_and_leave_it_as_it_was(network, builder, space) -> None:
    dense = builder.build(network, space.dense()).digest
    candidate = replace(space.dense(), removed_blocks=REMOVABLE)
    first = builder.build(space.apply(network, candidate), candidate).digest
    assert builder.build(network, space.dense()).digest == dense
    again = deep.builder_of(network)
    assert again.build(space.apply(network, candidate), candidate).digest == first
    plain = ArtifactBuilder(network, IMAGES.numpy(), OnnxRuntime())
    assert plain.build(network, space.dense()).digest == dense, "that blocks may go changes no file"


def test_a_block_that_was_not_announced_is_refused(network, space) -> None:
    builder = ArtifactBuilder(network, IMAGES.numpy(), OnnxRuntime(), removable=("stage1.0",))
    refusal = builder.disagreement(shortened(network, ["stage1.1"]))
    assert refusal is not None
    assert builder.disagreement(shortened(network, ["stage1.0"])) is None
    with pytest.raises(ExportError, match=r"may be left out.*stage1\.1"):
        builder.build(shortened(network, ["stage1.1"]), replace(space.dense(), removed_blocks=("stage1.1",)))


def openvino() -> Runtime:
    try:
        return runtime("openvino")
    except TargetError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_openvino_answers_as_torch_does(network, space, precision: str) -> None:
    library = openvino()
    builder = deep.builder_of(network, library)
    blocks = ("stage1.0", "stage2.1", "stage2.2")
    candidate = replace(space.candidate(space.uniform(0.5, precision)), removed_blocks=blocks)
    smaller = space.apply(network, candidate)
    artifact = builder.build(smaller, candidate, builder.read_ranges(smaller, IMAGES.numpy()))
    found, _ = library.open(artifact.deployed, artifact.plan, 1).answer(IMAGES.numpy(), 4)
    expected = torch_answers(smaller)[-1]
    if precision == "fp32":
        np.testing.assert_allclose(found, expected, atol=1e-4)
    assert signal_to_noise(found, expected) > 15


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        "resnet18",
        "resnet50",
        "mobilenet_v2",
        "mobilenet_v3_small",
        "efficientnet_b0",
        "convnext_tiny",
        "regnet_x_400mf",
    ],
)
def test_well_known_networks_lose_any_of_their_blocks(model: str) -> None:
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    network = ExitNetwork(random_network(model, 64), (), ()).eval()
    builder = deep.builder_of(network, images=images)
    stages = find_stages(network, images[:1], builder.disagreement)
    blocks = [block for stage in stages for block in stage.blocks]
    assert len(blocks) >= 5
    rng = np.random.default_rng(0)
    for share in (0.3, 0.7, 1.0):
        gone = tuple(block for block in blocks if rng.random() <= share)
        smaller = shortened(network, gone)
        candidate = Candidate({}, dict.fromkeys(builder.layers, "fp32"), removed_blocks=gone)
        found, expected = all_answers(builder.build(smaller, candidate), images)[-1], torch_answers(smaller, images)[-1]
        assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
