"""Masks from their training to a search."""

import copy
import json
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from evaluators.artifact_builder import ArtifactBuilder
from evaluators.flops.masked import MaskedFlops, measure_need
from evaluators.quantization.torch_operators import OPERATORS, Operation
from evaluators.runtimes.onnxruntime_cpu import OnnxRuntime
from search.cli import run
from search.config.sections import MasksSection
from search.config.study import Study, StudyError
from search.pipeline.pipeline import CompressionPipeline, build_pipeline
from search.training.loop import TrainingBatches
from search.training.masks import bounds_loss, train_masks, with_masks
from spaces.candidate import Candidate
from spaces.dynamic.exit_network import ExitNetwork, is_of_gate
from spaces.dynamic.masks.base import masks_of
from spaces.precision import uniform
from spaces.pruning.prunable import find_groups, halves
from spaces.pruning.slicing import sliced
from spaces.testing import MaskContract
from tests.helpers import skippable, tiny
from tests.helpers.searches import finished, stored

STUDY = """
name = "masked"
question = "What of each block does which image need?"
budget = ["flops<90%"]
model.source = "tests.helpers.skippable:network"
data.source = "tests.helpers.tiny:splits"
training = {epochs = 2, batch = 50, learning_rate = 0.05}
exits = {after = ["second"], grid = 2, epochs = 5}
masks = {method = "dgnet", keep = 0.6, epochs = 2, batch = 50}
target = {batch = 4}
recovery = {level = "bn", images = 64, final = {versions = 0}}
search = {trials = 4}
"""
BLOCKS = ("first", "second", "down", "last")


@pytest.fixture(scope="module")
def pipeline(cache) -> CompressionPipeline:
    return build_pipeline(Study.parse(STUDY, "the tests' study"), lambda *_: None)


def moved(pipeline: CompressionPipeline, threshold: float | None) -> Candidate:
    dense = pipeline.space.dense()
    thresholds = replace(dense.thresholds, masks=dict.fromkeys(BLOCKS, threshold))
    return Candidate(dense.channels, dense.precision, thresholds)


def test_a_training_brings_flops_to_what_is_asked_for() -> None:
    settings = MasksSection(method="dgnet", keep=0.5, weight=50, epochs=12, batch=50, learning_rate=0.05)
    torch.manual_seed(0)
    plain, data = skippable.network().eval(), tiny.splits()
    network = with_masks(plain, settings, torch.zeros(1, 1, 8, 8))
    train_masks(network, plain, TrainingBatches(data.train, 50, 0), settings)
    flops = MaskedFlops(plain, network, torch.zeros(1, 1, 8, 8))
    need = measure_need(network, flops, data.validation.images[:])
    assert need.flops.mean() / flops.dense == pytest.approx(0.5, abs=0.12)
    assert all(gate.noise is None for mask in masks_of(network) for gate in mask.gates)


def test_gates_are_held_alike_at_first_and_free_at_last() -> None:
    plain = skippable.network().eval()
    network = MaskContract.undecided(with_masks(plain, MasksSection(method="dgnet"), torch.zeros(1, 1, 8, 8)))
    with torch.no_grad():
        network(torch.randn(8, 1, 8, 8))
    masks = masks_of(network)
    shares = [float(share.mean()) for mask in masks for share in mask.opened.values()]
    at_first = np.mean([(share - 0.25**0.5) ** 2 for share in shares])
    assert float(bounds_loss(masks, 0.25, 0.0)) == pytest.approx(at_first, rel=1e-5)
    assert float(bounds_loss(masks, 0.25, 1.0)) < 0.1 * at_first


def test_masks_with_skipped_blocks_or_joint_exits_are_refused(cache) -> None:
    for more in ('skips = {blocks = "all"}', None):
        text = f"{STUDY}\n{more}" if more else STUDY.replace("epochs = 5}", 'epochs = 5, training = "joint"}')
        with pytest.raises(StudyError, match="leave"):
            build_pipeline(Study.parse(text, "the tests' study"), lambda *_: None)


def test_a_study_says_that_masks_save_no_time(pipeline: CompressionPipeline) -> None:
    assert any("[masks] save FLOPs only" in remark for remark in pipeline.remarks)


def test_thresholds_move_the_flops_and_the_answers_are_the_files(pipeline: CompressionPipeline) -> None:
    assert {f"threshold.mask.{block}" for block in BLOCKS} <= set(pipeline.space.dimensions())
    means = []
    for threshold in (None, 0.0, 4.0):
        subject = pipeline.deployed(moved(pipeline, threshold))
        found = pipeline.flops.measure(subject)
        means.append(found.value)
        assert "no runtime for dense" in found.protocol
        with torch.no_grad():
            _, logits = subject.network.run_trunk(torch.from_numpy(pipeline.scored.images[:]))
        assert np.mean(subject.answers.classes == logits.argmax(dim=1).numpy()) > 0.99
    assert means[0] == pytest.approx(pipeline.flops.measure(pipeline.deployed(pipeline.space.dense())).value)
    assert means[0] > means[1] > means[2]


def test_gates_decide_in_the_reference_precision(pipeline: CompressionPipeline) -> None:
    space = pipeline.space.precision
    gates = [layer for layer in space.layers if is_of_gate(layer)]
    assert len(gates) >= len(BLOCKS)
    assert len(gates) < len(space.layers)
    assert not any(is_of_gate(name) for name in space.dimensions())
    assert {layer for layer, left in space.allowed.items() if left == ("fp32",)} == set(gates)
    assert space.without(dict.fromkeys(space.layers, space.computed)).allowed == space.allowed
    assert uniform(space.layers, "int8") == {layer: left[-1] for layer, left in space.allowed.items()}


def test_an_image_that_leaves_early_needs_only_what_lies_before(pipeline: CompressionPipeline) -> None:
    candidate = moved(pipeline, 0.0)
    leaving = replace(candidate, thresholds=candidate.thresholds.with_exits({"exit1": 0.0}))
    stays, leaves = (pipeline.flops.measure(pipeline.deployed(each)) for each in (candidate, leaving))
    assert leaves.value < 0.8 * stays.value


def test_masked_and_pruned_and_quantized_decide_in_the_runtime_as_in_torch() -> None:
    torch.manual_seed(4)
    plain = skippable.network().eval()
    rng = np.random.default_rng(0)
    images = rng.normal(size=(64, 1, 16, 16)).astype(np.float32)
    masked = MaskContract.undecided(with_masks(plain, MasksSection(method="dgnet"), torch.from_numpy(images[:1])))
    network = ExitNetwork(masked, (), ()).eval()
    groups = find_groups(network, torch.from_numpy(images[:1]))
    assert groups.free
    pruned = sliced(network, groups.free, halves(groups.free))
    builder = ArtifactBuilder(network, images, OnnxRuntime())
    ranges = builder.read_ranges(pruned, images)
    artifact = builder.build(pruned, Candidate({}, dict.fromkeys(builder.layers, "int8")), ranges)
    deployed = onnx.load_from_string(artifact.deployed[0])
    model = copy.deepcopy(deployed)
    assert sum(node.op_type == "QuantizeLinear" for node in model.graph.node) > 4
    names = [node.output[0] for node in model.graph.node if node.op_type == "GreaterOrEqual"]
    assert len(names) == 2 * len(BLOCKS)
    expected = in_torch(model, torch.from_numpy(images), names)
    deployed.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.BOOL, None) for name in names)
    session = onnxruntime.InferenceSession(deployed.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(names, {session.get_inputs()[0].name: images})
    same = np.concatenate([(one == two.numpy()).ravel() for one, two in zip(found, expected, strict=True)])
    opened = np.concatenate([one.ravel() for one in found])
    assert same.mean() >= 0.995
    assert 0.1 < opened.mean() < 0.9, "the test says nothing where all gates agree"


def in_torch(model: onnx.ModelProto, images: Tensor, names: list[str]) -> list[Tensor]:
    """Returns tensors of a file with Q/DQ, computed in torch."""
    values = {tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in model.graph.initializer}
    values |= {model.graph.input[0].name: images, "": torch.empty(0)}
    for node in model.graph.node:
        attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        inputs = [values[name] for name in node.input]
        if node.op_type == "Constant":
            found = torch.from_numpy(numpy_helper.to_array(attributes["value"]).copy())
        elif node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            found = on_grid(node.op_type, inputs, attributes.get("axis", 1))
        elif node.op_type == "Resize":
            found = F.interpolate(inputs[0], size=[int(each) for each in inputs[3][2:]], mode="nearest")
        elif node.op_type == "GreaterOrEqual":
            found = inputs[0] >= inputs[1]
        elif node.op_type == "Cast":
            found = inputs[0].to({TensorProto.FLOAT: torch.float32, TensorProto.INT64: torch.int64}[attributes["to"]])
        else:
            assert node.op_type in OPERATORS, node.op_type
            operation = Operation.of(node)
            found = operation.run(inputs, operation.attributes)
        values[node.output[0]] = found
    return [values[name] for name in names]


def on_grid(kind: str, inputs: list[Tensor], axis: int) -> Tensor:
    scale = inputs[1]
    zero = inputs[2].float() if len(inputs) > 2 else torch.zeros_like(scale)
    if scale.ndim:
        shape = [-1 if place == axis else 1 for place in range(inputs[0].ndim)]
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    if kind == "DequantizeLinear":
        return (inputs[0].float() - zero) * scale
    low, high = (-128, 127) if inputs[2].dtype == torch.int8 else (0, 255)
    return (torch.round(inputs[0] / scale) + zero).clamp(low, high).to(inputs[2].dtype)


def test_a_copy_after_a_step_of_training_is_whole() -> None:
    plain = skippable.network().eval()
    network = with_masks(plain, MasksSection(method="dgnet"), torch.zeros(1, 1, 8, 8)).train()
    network(torch.randn(8, 1, 8, 8)).sum().backward()
    other = copy.deepcopy(network).eval()
    network.eval()
    with torch.no_grad():
        assert torch.equal(other(torch.ones(1, 1, 8, 8)), network(torch.ones(1, 1, 8, 8)))


def test_a_search_uses_masks_for_a_budget_in_flops(cache, tmp_path, capsys) -> None:
    study = tmp_path / "study.toml"
    study.write_text(STUDY)
    command = ["--study", str(study), "--runs", str(tmp_path / "runs"), "--search", "one", "--trials", "8", "--quiet"]
    assert run([*command, "--json"]) == 0, capsys.readouterr().err
    told = json.loads(capsys.readouterr().out)
    assert told["front"]
    trials = finished(stored(tmp_path / "runs").trials)
    assert len(trials) == 8
    assert any("threshold.mask.first" in trial.params for trial in trials)
