"""Early exits: cutting, gating and what they save."""

import tempfile
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, numpy_helper
from torch import nn

from evaluators.artifact_builder import ArtifactBuilder
from evaluators.data import LabelledImages
from evaluators.deployed import predict
from evaluators.exits.exit_outputs import ExitOutputs
from evaluators.inference.staged import StagedNetwork, largest_probability
from evaluators.runtimes.base import deployed_stages
from evaluators.runtimes.onnxruntime_cpu import OnnxRuntime, load
from spaces.candidate import Candidate
from spaces.dynamic.exit_network import ExitHead, ExitNetwork, feature_channels
from spaces.errors import StructureError
from spaces.thresholds import Thresholds
from tests.helpers import tiny


def staged(builder, network, space, thresholds, precision="fp32"):
    values = space.uniform(1.0, precision) | {
        f"threshold.exit{index + 1}": value for index, value in enumerate(thresholds)
    }
    candidate = space.candidate(values)
    artifact = builder.build(network, candidate)
    return artifact, StagedNetwork([load(stage, 1) for stage in artifact.deployed], artifact.thresholds)


def by_hand(network: ExitNetwork, images: torch.Tensor, thresholds: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Returns what the gates should answer, from all exits' logits at once."""
    with torch.no_grad():
        *exits, last = network(images)
    answer, left = last.clone(), torch.full((len(images),), len(thresholds))
    for index in reversed(range(len(thresholds))):
        fires = exits[index].softmax(1).max(1).values >= thresholds[index]
        answer[fires], left[fires] = exits[index][fires], index
    return answer.numpy(), left.numpy()


@pytest.mark.parametrize("thresholds", [[0.5, 0.5], [0.7, 0.55], [0.95, 0.6], [0.5, 0.95]])
def test_stages_answer_what_the_gates_say(thresholds, builder, network, space, images) -> None:
    _, run = staged(builder, network, space, thresholds)
    logits, left = run(images.numpy())
    expected, exits = by_hand(network, images, thresholds)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    np.testing.assert_array_equal(left, exits)


def test_an_exit_at_one_is_not_deployed(builder, network, space) -> None:
    assert len(staged(builder, network, space, [1.0, 1.0])[0].stages) == 1
    artifact, _ = staged(builder, network, space, [1.0, 0.8])
    assert artifact.exits == ("exit2",)
    assert len(artifact.stages) == 2
    assert b"exits.exit1" not in b"".join(artifact.stages)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_cutting_does_not_change_the_answer(precision, builder, network, space, images) -> None:
    whole = staged(builder, network, space, [1.0, 1.0], precision)[1]
    cut = staged(builder, network, space, [0.95, 0.95], precision)[1]
    never = StagedNetwork(cut.stages, [2.0, 2.0])
    np.testing.assert_allclose(
        never(images.numpy())[0], whole(images.numpy())[0], atol=1e-5 if precision == "fp32" else 0.2
    )


@settings(deadline=None)
@given(
    hnp.arrays(np.float32, (6, 4), elements=st.floats(-5, 5, width=32)),
    st.lists(st.floats(0.3, 1.0), min_size=0, max_size=2),
)
def test_survivors_go_on_and_every_input_is_answered_once(features: np.ndarray, thresholds: list[float]) -> None:
    seen: list[int] = []

    def stage(index: int, last: bool):
        def run(batch: np.ndarray) -> list[np.ndarray]:
            seen.append(len(batch))
            return [batch + index] if last else [batch, batch * (index + 1)]

        return run

    count = len(thresholds)
    network = StagedNetwork([stage(index, index == count) for index in range(count + 1)], thresholds)
    logits, left = network(features.copy())
    assert sorted(seen, reverse=True) == seen
    assert len(seen) <= count + 1
    for row, exit_index in enumerate(left):
        expected = features[row] + count if exit_index == count else features[row] * (exit_index + 1)
        np.testing.assert_allclose(logits[row], expected, rtol=1e-6)
        for earlier in range(exit_index):
            assert largest_probability(features[row : row + 1] * (earlier + 1))[0] < thresholds[earlier]


@pytest.mark.parametrize("thresholds", [[0.5, 0.5], [0.7, 0.55], [0.95, None], [None, 0.6], [None, None]])
def test_what_all_exits_said_tells_the_answers_with_any_thresholds(thresholds, builder, network, space, images) -> None:
    _, whole = staged(builder, network, space, [0.5, 0.5])
    outputs = ExitOutputs(whole.all_logits(images.numpy()), "softmax")
    assert outputs.confidences.shape == outputs.correct(np.zeros(len(images), np.int64)).shape == (len(images), 3)
    _, run = staged(builder, network, space, [1.0 if value is None else value for value in thresholds])
    wanted, wanted_routes = run(images.numpy())
    logits, routes = outputs.answers(thresholds)
    np.testing.assert_allclose(logits, wanted, atol=1e-5)
    np.testing.assert_array_equal(routes, wanted_routes)


def test_thresholds_and_stages_have_to_fit() -> None:
    with pytest.raises(ValueError, match="one threshold per exit"):
        StagedNetwork([lambda batch: [batch]], [0.5])


def test_answers_know_who_got_how_far(builder, network, space, images) -> None:
    artifact, _ = staged(builder, network, space, [0.6, 0.6])
    opened = OnnxRuntime().open(artifact.deployed, artifact.thresholds, 1)
    answers = predict(opened, 3, LabelledImages(images.numpy(), np.zeros(len(images), np.int64)), batch=4)
    assert answers.reach_shares[0] == 1.0
    assert list(answers.reach_shares) == sorted(answers.reach_shares, reverse=True)
    assert answers.reach_shares[2] == pytest.approx(np.mean(answers.exits == 2))
    assert sum(count for _, count in answers.profiles) == 3
    assert len(answers.classes) == len(images)


def test_an_exit_inside_a_residual_block_is_refused(images) -> None:
    bypassed = ExitNetwork(tiny.randomized(), ["inner"], [ExitHead(24, 4, 2)]).eval()
    with pytest.raises(StructureError, match="one tensor separates the network in two"):
        ArtifactBuilder(bypassed, images.numpy(), OnnxRuntime())


def test_an_exit_needs_a_module_with_a_feature_map(image) -> None:
    with pytest.raises(StructureError, match="'nowhere'"):
        feature_channels(tiny.randomized(), ["nowhere"], image)
    with pytest.raises(StructureError, match="feature map"):
        feature_channels(tiny.randomized(), ["hidden"], image)


class Shared(nn.Module):
    """Runs one activation twice, another never, and gives a pair in between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 16, 3)
        self.act, self.spare, self.largest = nn.ReLU(), nn.ReLU(), nn.MaxPool2d(2, return_indices=True)
        self.classifier = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, _ = self.largest(self.act(self.first(x)))
        return self.classifier(self.act(self.second(x)).mean((2, 3)))


@pytest.mark.parametrize(
    ("after", "words"),
    [
        (["act"], "a module that runs once, got 'act', which runs 2 times; name the module before it"),
        (["spare"], "got 'spare', which does not run"),
        (["largest"], r"a feature map \(n, c, h, w\), got tuple at 'largest'"),
        (["second", "first"], "in the order in which they run, got 'second', 'first'; that is 'first', 'second'"),
        (["first", "first"], "named once each, .* got 'first', 'first'; that is 'first'$"),
    ],
)
def test_exits_sit_at_places_that_are_passed_once_in_order(after, words, image) -> None:
    with pytest.raises(StructureError, match=words):
        feature_channels(Shared(), after, image)
    assert feature_channels(Shared(), ["first", "second"], image) == [8, 16]


def test_deepcopies_capture_their_own_features(network, images) -> None:
    import copy

    twin = copy.deepcopy(network)
    with torch.no_grad():
        twin.trunk.stem[0].weight.mul_(2.0)
        assert not torch.allclose(twin(images)[0], network(images)[0])


def converted(stage: bytes) -> Counter[str]:
    """Returns how many nodes of each kind change the type or the order of a stage's tensors once it is loaded."""
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = f"{folder}/optimized.onnx"
        onnxruntime.InferenceSession(stage, options, providers=["CPUExecutionProvider"])
        nodes = onnx.load(options.optimized_model_filepath).graph.node
    return Counter(node.op_type for node in nodes)


@pytest.fixture
def residual():
    """A network whose exit lies between two residual blocks, with heads that sound neither sure nor unsure."""
    torch.manual_seed(0)
    trunk = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 4),
    )
    return ExitNetwork(trunk, ["1"], [ExitHead(16, 4, 2)]).eval()


def test_int8_stages_hand_integers_on_and_answer_as_the_whole_does(residual, images) -> None:
    builder = ArtifactBuilder(residual, images.numpy(), OnnxRuntime())
    precision = dict.fromkeys(builder.layers, "int8")
    cut = builder.build(residual, Candidate({}, precision, Thresholds({"exit1": 0.5})))
    (whole,) = builder.build(residual, Candidate({}, precision, Thresholds({"exit1": None}))).deployed
    first, second = (onnx.load_from_string(stage) for stage in cut.deployed)
    returned, read = first.graph.output[0], second.graph.input[0]
    assert returned.name == read.name
    assert returned.type.tensor_type.elem_type == read.type.tensor_type.elem_type == TensorProto.UINT8
    scales = [
        {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer} for model in (first, second)
    ]
    for part in ("scale", "zero_point"):
        np.testing.assert_array_equal(*(each[f"exit1_features/{part}"] for each in scales))
    assert not any(node.op_type == "QuantizeLinear" and node.input[0] == read.name for node in second.graph.node)
    assert "QuantizeLinear" not in converted(cut.deployed[1]), "nothing is left that makes integers of floats"
    assert converted(cut.deployed[1])["Transpose"] <= converted(whole)["Transpose"], "nor that turns features around"
    never = StagedNetwork([load(stage, 1) for stage in cut.deployed], [2.0])
    for count in (1, len(images)):
        batch = images.numpy()[:count]
        np.testing.assert_array_equal(never(batch)[0], load(whole, 1)(batch)[0])


def test_a_head_answers_in_float_where_its_answer_is_float(residual, images) -> None:
    builder = ArtifactBuilder(residual, images.numpy(), OnnxRuntime())
    candidate = Candidate({}, dict.fromkeys(builder.layers, "int8"), Thresholds({"exit1": 0.5}))
    cut = builder.build(residual, candidate)
    assert cut.precisions["/exit1/classifier/Gemm"] == "fp32"
    assert {given for node, given in cut.precisions.items() if "exit1" not in node} == {"int8"}
    made = converted(cut.deployed[0])
    assert (made["QLinearAveragePool"], made["AveragePool"]) == (0, 1), (
        "pooled in float too: nothing quantizes behind it"
    )


def test_features_of_which_a_block_may_be_skipped_stay_float(residual, images) -> None:
    builder = ArtifactBuilder(residual, images.numpy(), OnnxRuntime())
    stages = builder.build(
        residual, Candidate({}, dict.fromkeys(builder.layers, "int8"), Thresholds({"exit1": 0.5}))
    ).stages
    kinds = {
        skips: onnx.load_from_string(deployed_stages(OnnxRuntime(), stages, skips)[1]).graph.input[0].type.tensor_type
        for skips in (True, False)
    }
    assert kinds[True].elem_type == TensorProto.FLOAT
    assert kinds[False].elem_type == TensorProto.UINT8


@pytest.mark.parametrize("precisions", [("int8", "fp32"), ("fp32", "int8"), ("fp32", "fp32")])
def test_features_between_precisions_are_handed_on_without_loss(precisions, residual, images) -> None:
    builder = ArtifactBuilder(residual, images.numpy(), OnnxRuntime())
    before, after = precisions
    given = {layer: before if layer in ("0.0", "1.0") else after for layer in builder.layers}
    cut = builder.build(residual, Candidate({}, given, Thresholds({"exit1": 0.5})))
    (whole,) = builder.build(residual, Candidate({}, given, Thresholds({"exit1": None}))).deployed
    kind = onnx.load_from_string(cut.deployed[1]).graph.input[0].type.tensor_type.elem_type
    assert kind == (TensorProto.UINT8 if "int8" in precisions else TensorProto.FLOAT)
    never = StagedNetwork([load(stage, 1) for stage in cut.deployed], [2.0])
    np.testing.assert_allclose(never(images.numpy())[0], load(whole, 1)(images.numpy())[0], atol=1e-5)
