"""Half precision: what the file says, and that the runtime answers as torch does."""

import copy

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

from evaluators.artifact_builder import ArtifactBuilder
from evaluators.inference.staged import StagedNetwork
from evaluators.runtimes.onnxruntime_cpu import OnnxRuntime, load
from spaces.candidate import Candidate
from spaces.dynamic.exit_network import ExitNetwork
from spaces.errors import QuantizationError
from spaces.thresholds import Thresholds

OFF = Thresholds({"exit1": None, "exit2": None})
PRECISIONS = ("fp32", "fp16", "fp8", "int8")


class MobileNetwork(nn.Module):
    """Activations with constants, a gate that multiplies, a concatenation, and a flattening by view."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU6())
        self.gate = nn.Conv2d(16, 16, 1)
        self.branch = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.Hardswish())
        self.classifier = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x * torch.sigmoid(self.gate(x)), self.branch(x)], 1).mean((2, 3))
        return self.classifier(x.view(x.size(0), -1)) * 0.5


def error_of(logits: np.ndarray, exact: np.ndarray) -> float:
    """Returns the root mean square of the error, as a share of that of the exact logits."""
    return float(np.sqrt(np.mean((logits - exact) ** 2) / np.mean(exact**2)))


def uniform(builder: ArtifactBuilder, precision: str, **others: str) -> Candidate:
    return Candidate({}, dict.fromkeys(builder.layers, precision) | others, OFF)


def casts(graph: onnx.GraphProto) -> list[tuple[str, int]]:
    """Returns the input and the target type of each Cast."""
    return [(node.input[0], node.attribute[0].i) for node in graph.node if node.op_type == "Cast"]


def assert_is_sound(stage: bytes) -> None:
    """Checks that a file is valid, float at its ends but for u8 features, and casts nothing twice or back and forth."""
    model = onnx.load_from_string(stage)
    onnx.checker.check_model(model, full_check=True)
    for info in [*model.graph.input, *model.graph.output]:
        between = {TensorProto.UINT8} if "_features" in info.name else set()
        assert info.type.tensor_type.elem_type in {TensorProto.FLOAT, *between}
    made_by_cast = {node.output[0] for node in model.graph.node if node.op_type == "Cast"}
    sources = [name for name, _ in casts(model.graph)]
    assert len(sources) == len(set(sources))
    assert not made_by_cast & set(sources)
    read = {name for node in model.graph.node for name in node.input} | {info.name for info in model.graph.output}
    assert made_by_cast <= read


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_mix_of_precisions_is_valid_and_answers(data, builder, network, images) -> None:
    precision = {layer: data.draw(st.sampled_from(PRECISIONS)) for layer in builder.layers}
    exits = {name: data.draw(st.sampled_from([None, 0.8])) for name in network.exit_names}
    candidate = Candidate({}, precision, Thresholds(exits))
    artifact = builder.build(network, candidate)
    for stage in (*artifact.stages, *artifact.deployed):
        assert_is_sound(stage)
    assert builder.build(network, candidate).digest == artifact.digest
    staged = StagedNetwork([load(stage, 1) for stage in artifact.deployed], [2.0] * len(artifact.exits))
    with torch.no_grad():
        exact = network(images)[-1].numpy()
    error = error_of(staged(images.numpy())[0], exact)
    assert error < (0.15 if {"int8", "fp8"} & set(precision.values()) else 5e-3)


def test_a_network_in_half_has_one_cast_in_and_one_out(builder, network, images) -> None:
    (stage,) = builder.build(network, uniform(builder, "fp16")).stages
    graph = onnx.load_from_string(stage).graph
    assert casts(graph) == [("images", TensorProto.FLOAT16), ("logits/fp16", TensorProto.FLOAT)]
    assert {numpy_helper.to_array(tensor).dtype for tensor in graph.initializer} == {np.dtype(np.float16)}
    with torch.no_grad():
        exact = network(images)[-1].numpy()
    assert 0 < error_of(load(stage, 1)(images.numpy())[0], exact) < 5e-3


def test_the_weights_are_those_of_float_rounded(builder, network) -> None:
    def values(precision: str) -> dict[str, np.ndarray]:
        (stage,) = builder.build(network, uniform(builder, precision)).stages
        tensors = onnx.load_from_string(stage).graph.initializer
        return {tensor.name.removesuffix("/fp16"): numpy_helper.to_array(tensor) for tensor in tensors}

    exact, half = values("fp32"), values("fp16")
    assert set(exact) == set(half)
    for name, value in exact.items():
        np.testing.assert_array_equal(half[name], value.astype(np.float16))


def test_each_stage_takes_and_returns_float(builder, network, images) -> None:
    candidate = Candidate({}, dict.fromkeys(builder.layers, "fp16"), Thresholds({"exit1": 0.6, "exit2": 0.6}))
    artifact = builder.build(network, candidate)
    assert len(artifact.stages) == 3
    for stage in artifact.stages:
        assert_is_sound(stage)
    features, logits = load(artifact.stages[0], 1)(images.numpy())
    assert features.dtype == logits.dtype == np.float32
    with torch.no_grad():
        exact = network(images)[0].numpy()
    assert error_of(logits, exact) < 5e-3
    # A stage reads its features once and writes them once, for whatever is on the other side.
    graph = onnx.load_from_string(artifact.stages[1]).graph
    assert casts(graph)[0] == ("exit1_features", TensorProto.FLOAT16)
    assert sorted(to for _, to in casts(graph)) == [TensorProto.FLOAT, TensorProto.FLOAT, TensorProto.FLOAT16]


def test_an_addition_is_half_only_where_both_inputs_are(builder, network) -> None:
    def kind(**precisions: str) -> str:
        layers = {name.replace("_", "."): precision for name, precision in precisions.items()}
        (stage,) = builder.build(network, uniform(builder, "fp32", **layers)).stages
        (node,) = [node for node in onnx.load_from_string(stage).graph.node if node.op_type == "Add"]
        return "fp16" if node.output[0].endswith("/fp16") else "fp32"

    assert kind(stem_0="fp16", outer_0="fp16") == "fp16"
    assert kind(stem_0="fp16") == kind(outer_0="fp16") == "fp32"
    assert kind(stem_0="fp16", inner_0="int8", outer_0="fp16") == "fp32"  # the shortcut carries Q/DQ, which is float


def test_boundaries_count_half_precision_too(builder) -> None:
    assert builder.boundaries(uniform(builder, "fp32", **{"inner.0": "fp16"})) == 2
    assert builder.boundaries(uniform(builder, "int8", **{"inner.0": "fp16"})) == 3
    assert builder.boundaries(uniform(builder, "fp16")) == 1  # the image


@pytest.mark.parametrize("half", [["stem.0"], ["stem.0", "gate", "branch.0"], ["classifier"], None])
def test_constants_and_shapes_follow_their_nodes(half: list[str] | None) -> None:
    torch.manual_seed(0)
    network = ExitNetwork(MobileNetwork().eval(), [], []).eval()
    images = torch.randn(6, 3, 8, 8)
    builder = ArtifactBuilder(network, images.numpy(), OnnxRuntime())
    candidate = Candidate({}, dict.fromkeys(half or builder.layers, "fp16"))
    (stage,) = builder.build(network, candidate).stages
    assert_is_sound(stage)
    with torch.no_grad():
        exact = network(images)[-1].numpy()
    assert 0 < error_of(load(stage, 1)(images.numpy())[0], exact) < 5e-3


@pytest.mark.parametrize(("tensor", "value"), [("weight", 70000.0), ("weight", float("nan")), ("bias", -1e6)])
def test_a_weight_that_half_cannot_hold_names_its_layer(tensor, value, builder, network) -> None:
    huge = copy.deepcopy(network)
    getattr(huge.trunk.hidden, tensor).data.flatten()[3] = value
    with pytest.raises(QuantizationError, match=r"between -65504 and 65504, got (70000|nan|1e\+06) in 'hidden'; give"):
        builder.build(huge, uniform(builder, "fp16"))
    builder.build(huge, uniform(builder, "fp16", hidden="fp32"))


@given(st.floats(-65504, 65504, width=32))
def test_every_weight_up_to_the_largest_is_held(builder, network, value) -> None:
    large = copy.deepcopy(network)
    large.trunk.hidden.weight.data.flatten()[0] = value
    (stage,) = builder.build(large, uniform(builder, "fp32", hidden="fp16")).stages
    (held,) = [
        numpy_helper.to_array(tensor)
        for tensor in onnx.load_from_string(stage).graph.initializer
        if tensor.name == "trunk.hidden.weight/fp16"
    ]
    assert held.flat[0] == np.float16(value)
    assert np.isfinite(held).all()
