"""FP8: what the file says, and that the runtime answers as the formula does."""

import copy

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto
from torch import nn

from evaluators.artifact_builder import ArtifactBuilder
from evaluators.bundle import run as run_bundle
from evaluators.bundle.manifest import DeploymentTarget, Manifest
from evaluators.latency.cache import structure_key
from evaluators.quantization.fp8 import LARGEST, fp8_weight
from evaluators.runtimes.base import allows
from evaluators.runtimes.onnx_rewrites.unsigned_activations import unsigned_activations
from evaluators.runtimes.onnxruntime_cpu import OnnxRuntime, load
from spaces.candidate import Candidate
from spaces.dynamic.exit_network import ExitNetwork
from spaces.thresholds import Thresholds
from tests.evaluators.test_fp16 import MobileNetwork, assert_is_sound, error_of
from tests.evaluators.test_quantization import Accelerator

OFF = Thresholds({"exit1": None, "exit2": None})


def rounded(values: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """Returns values as E4M3 holds them, by torch's own type."""
    return (values / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).float() * scale


@settings(deadline=None)
@given(hnp.arrays(np.float32, (4, 3, 2), elements=st.floats(-100, 100, width=32)), st.sampled_from([0, 1]))
def test_a_weight_is_scaled_by_its_channels_largest_and_rounded_as_torch_does(weight: np.ndarray, axis: int) -> None:
    quantized, scale = fp8_weight(weight, axis)
    shape = [-1 if index == axis else 1 for index in range(3)]
    others = tuple(index for index in range(3) if index != axis)
    np.testing.assert_allclose(scale, np.maximum(np.abs(weight).max(axis=others) / 448, 1e-8), rtol=1e-6)
    wanted = rounded(torch.from_numpy(weight), torch.from_numpy(scale.reshape(shape)))
    np.testing.assert_array_equal(quantized.astype(np.float32) * scale.reshape(shape), wanted.numpy())


def candidate_of(builder: ArtifactBuilder, precision: str, **others: str) -> Candidate:
    return Candidate({}, dict.fromkeys(builder.layers, precision) | others, OFF)


@pytest.mark.parametrize("layer", ["inner.0", "pointwise.0", "hidden"])
def test_a_layer_in_fp8_is_the_formula(layer: str, builder, network, images) -> None:
    (stage,) = builder.build(network, candidate_of(builder, "fp32", **{layer: "fp8"})).stages
    quantizers = [node for node in onnx.load_from_string(stage).graph.node if node.op_type == "QuantizeLinear"]
    low, high = builder.ranges[quantizers[0].input[0]]
    module = network.trunk.get_submodule(layer)
    exact = module.weight.data
    largest = exact.flatten(1).abs().amax(1).reshape(-1, *[1] * (exact.ndim - 1))
    hook = module.register_forward_pre_hook(lambda _, args: (rounded(args[0], max(-low, high) / LARGEST),))
    module.weight.data = rounded(exact, largest / LARGEST)
    try:
        with torch.no_grad():
            wanted = network(images)[-1].numpy()
    finally:
        hook.remove()
        module.weight.data = exact
    with torch.no_grad():
        plain = network(images)[-1].numpy()
    found = load(stage, 1)(images.numpy())[0]
    assert len(quantizers) == 1
    assert error_of(found, wanted) < 0.1 * error_of(plain, wanted)  # what is left are values on the edge of two steps


def test_a_network_in_fp8_is_symmetric_and_keeps_float_biases(builder, network, images) -> None:
    (stage,) = builder.build(network, candidate_of(builder, "fp8")).stages
    assert_is_sound(stage)
    model = onnx.load_from_string(stage)
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    assert model.opset_import[0].version == 19
    pairs = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert {values[node.input[2]].data_type for node in pairs} == {TensorProto.FLOAT8E4M3FN}
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            assert all(name.endswith("/dq") for name in node.input[:2])
            assert values[node.input[2]].data_type == TensorProto.FLOAT
    with torch.no_grad():
        exact = network(images)[-1].numpy()
    assert 0 < error_of(load(stage, 1)(images.numpy())[0], exact) < 0.15
    assert unsigned_activations(stage) == stage


def test_only_stages_with_an_fp8_layer_need_its_opset(builder, network) -> None:
    precision = dict.fromkeys(builder.layers, "fp32") | {"stem.0": "fp8"}
    stages = builder.build(network, Candidate({}, precision, Thresholds({"exit1": 0.6, "exit2": 0.6}))).stages
    assert [onnx.load_from_string(stage).opset_import[0].version for stage in stages] == [19, 17, 17]


@pytest.mark.parametrize("layers", [["gate", "branch.0"], ["classifier"], None])
def test_readers_share_a_pair_and_reductions_take_their_axes(layers: list[str] | None) -> None:
    torch.manual_seed(0)
    network, images = ExitNetwork(MobileNetwork().eval(), [], []).eval(), torch.randn(6, 3, 8, 8)
    builder = ArtifactBuilder(network, images.numpy(), OnnxRuntime())
    (stage,) = builder.build(network, Candidate({}, dict.fromkeys(layers or builder.layers, "fp8"))).stages
    assert_is_sound(stage)
    kinds = [node.op_type for node in onnx.load_from_string(stage).graph.node]
    assert kinds.count("QuantizeLinear") == (3 if layers is None else 1)
    with torch.no_grad():
        exact = network(images)[-1].numpy()
    assert 0 < error_of(load(stage, 1)(images.numpy())[0], exact) < 0.1


class Tokens(nn.Module):
    """Linear layers on tokens, which become products instead of Gemm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 24), nn.Linear(24, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(torch.relu(self.first(x.flatten(1, 2)))).mean(1))


def test_linear_layers_on_tokens_run_in_fp8() -> None:
    torch.manual_seed(0)
    network, images = ExitNetwork(Tokens().eval(), [], []).eval(), torch.randn(6, 3, 8, 8)
    builder = ArtifactBuilder(network, images.numpy(), OnnxRuntime())
    (stage,) = builder.build(network, Candidate({}, dict.fromkeys(builder.layers, "fp8"))).stages
    assert_is_sound(stage)
    nodes = onnx.load_from_string(stage).graph.node
    weights = {node.input[1]: node for node in nodes if node.op_type == "MatMul"}
    assert len(weights) == 2
    assert all(node.attribute[0].i == 1 for node in nodes if node.output[0] in weights)
    with torch.no_grad():
        exact = network(images)[-1].numpy()
    assert 0 < error_of(load(stage, 1)(images.numpy())[0], exact) < 0.1


class Joined(nn.Module):
    """A residual addition whose ReLU is quantized, as in every ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.after, self.head = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(self.after(torch.relu(x + self.branch(x))).mean((2, 3)))


def test_no_optimization_drops_the_relu_behind_an_addition(tmp_path) -> None:
    torch.manual_seed(0)
    network, images = ExitNetwork(Joined().eval(), [], []).eval(), torch.randn(6, 3, 8, 8)
    builder = ArtifactBuilder(network, images.numpy(), OnnxRuntime())
    (stage,) = builder.build(network, Candidate({}, dict.fromkeys(builder.layers, "fp8"))).stages
    with torch.no_grad():
        exact = network(images)[-1].numpy()
    assert 0 < error_of(load(stage, 1)(images.numpy())[0], exact) < 0.1
    Manifest(deployed=("model.onnx",), target=DeploymentTarget(threads=1)).write(tmp_path)
    (tmp_path / "model.onnx").write_bytes(stage)
    np.testing.assert_array_equal(run_bundle.load(tmp_path)(images.numpy())[0], load(stage, 1)(images.numpy())[0])


def test_narrow_and_grouped_layers_are_not_written_in_fp8(network, images) -> None:
    builder = ArtifactBuilder(network, images.numpy(), Accelerator(("fp32", "fp16", "fp8", "int8"), int8_channels=16))
    written = builder.written_precisions(network, candidate_of(builder, "fp8"))
    assert {written[layer] for layer in ("stem.0", "depthwise.0", "classifier")} == {"fp16"}
    assert {written[layer] for layer in ("inner.0", "outer.0", "pointwise.0", "hidden")} == {"fp8"}


def test_boundaries_count_fp8_too(builder) -> None:
    assert builder.boundaries(candidate_of(builder, "fp32", **{"inner.0": "fp8"})) == 2


def test_other_weights_are_the_same_structure(builder, network) -> None:
    other = copy.deepcopy(network)
    other.trunk.hidden.weight.data *= 3
    other.trunk.inner[0].weight.data += 0.01
    (first,), (second,) = (builder.build(each, candidate_of(builder, "fp8")).stages for each in (network, other))
    (int8,) = builder.build(network, candidate_of(builder, "int8")).stages
    assert first != second
    assert structure_key([first]) == structure_key([second]) != structure_key([int8])


def test_tf32_is_said_in_the_file(network, images, builder) -> None:
    allowing = ArtifactBuilder(network, images.numpy(), OnnxRuntime(), fp32_in="tf32")
    candidate = candidate_of(builder, "fp32")
    (plain,), (tf32,) = builder.build(network, candidate).stages, allowing.build(network, candidate).stages
    assert not allows(plain, "tf32")
    assert allows(tf32, "tf32")
    assert structure_key([plain]) != structure_key([tf32])
    np.testing.assert_array_equal(load(plain, 1)(images.numpy())[0], load(tf32, 1)(images.numpy())[0])


def test_the_scale_of_an_activation_is_its_largest_value_over_448(builder, network) -> None:
    (stage,) = builder.build(network, candidate_of(builder, "fp32", hidden="fp8")).stages
    values = {
        tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load_from_string(stage).graph.initializer
    }
    (scale,) = [value for name, value in values.items() if name.endswith("/fp8/scale") and value.ndim == 0]
    (tensor,) = [name.removesuffix("/fp8/scale") for name, value in values.items() if value is scale]
    assert float(scale) == pytest.approx(max(-builder.ranges[tensor][0], builder.ranges[tensor][1]) / 448)
