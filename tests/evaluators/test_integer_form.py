"""What remains in float of an int8 file on ONNX Runtime, and that the exported graph holds nothing idle."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from evaluators.artifact_builder import ArtifactBuilder
from evaluators.runtimes.onnx_rewrites.integer_operators import integer_form
from evaluators.runtimes.onnx_rewrites.unsigned_activations import unsigned_activations
from evaluators.runtimes.onnxruntime_cpu import OnnxRuntime, load
from spaces.candidate import Candidate
from spaces.dynamic.exit_network import ExitHead, ExitNetwork
from spaces.thresholds import Thresholds

IMAGES = np.random.default_rng(0).normal(size=(8, 3, 16, 16)).astype(np.float32)


class Gate(nn.Module):
    """Squeeze-and-excitation with hard or soft gates."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.pool, self.shrink, self.grow = nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.relu, self.gate = nn.ReLU(), gate

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.grow(self.relu(self.shrink(self.pool(x)))))


class Shuffled(nn.Module):
    """Channels are halved, joined again and dealt like cards."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = x.chunk(2, 1)
        x = torch.cat([kept, self.branch(changed)], 1)
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class Padded(nn.Module):
    """A convolution whose input is padded before it, unevenly, as TensorFlow's "same" does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(F.pad(x, (0, 1, 0, 1))))


class OptionA(nn.Module):
    """A residual block whose shortcut takes every second pixel and pads the channels with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.shrink = nn.Conv2d(16, 32, 3, 2, 1), nn.Conv2d(32, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shrink(F.relu(self.conv(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8)))))


class FromItsInput(nn.Module):
    """Flattens by a batch size that it reads from the images."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Linear(8 * 16 * 16, 5)

    def forward(self, images: Tensor) -> Tensor:
        features = F.relu(self.second(F.relu(self.first(images))))
        return self.last(features.view(images.size(0), -1))


def network(*inner: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), *inner, nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
    made = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    made.train()(torch.from_numpy(IMAGES))
    return made.eval()


def files(trunk: nn.Module) -> tuple[bytes, bytes, bytes]:
    """Returns the float file, the portable int8 one and the deployed int8 one."""
    dense = ExitNetwork(trunk, [], []).eval()
    builder = ArtifactBuilder(dense, IMAGES, OnnxRuntime())
    int8 = builder.build(dense, Candidate({}, dict.fromkeys(builder.layers, "int8")))
    return builder.build(dense, Candidate({}, {})).stages[0], int8.stages[0], int8.deployed[0]


def optimized(model: bytes, folder: Path) -> Counter[str]:
    """Returns the operators of what ONNX Runtime makes of a file."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(folder / "optimized.onnx"), 3
    onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


def decibels(exact: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(np.square(exact).sum() / np.square(other - exact).sum()))


BETWEEN = {
    "ReLU": [nn.ReLU()],
    "ReLU6": [nn.ReLU6()],
    "Hardtanh": [nn.Hardtanh()],
    "Hardtanh of odd bounds": [nn.Hardtanh(-0.3, 1.7)],
    "LeakyReLU": [nn.LeakyReLU(0.1)],
    "PReLU with one slope": [nn.PReLU()],
    "SiLU": [nn.SiLU()],
    "Hardswish": [nn.Hardswish()],
    "Sigmoid": [nn.Sigmoid()],
    "hard gates": [nn.Hardswish(), Gate(nn.Hardsigmoid())],
    "soft gates": [nn.SiLU(), Gate(nn.Sigmoid())],
    "padding of its own": [nn.ReLU6(), Padded()],
    "a shortcut that pads channels": [nn.ReLU(), OptionA()],
    "shuffled channels": [nn.ReLU(), Shuffled()],
}


@pytest.mark.parametrize("name", BETWEEN)
def test_nothing_of_an_int8_network_runs_in_float_but_its_ends(name: str, tmp_path: Path) -> None:
    dense, portable, deployed = files(network(*BETWEEN[name]))
    found = optimized(deployed, tmp_path)
    assert found["QuantizeLinear"] == 1  # the images
    assert found["DequantizeLinear"] == 0
    floats = {"Conv", "FusedConv", "Gemm", "Relu", "Sigmoid", "HardSigmoid", "HardSwish", "Mul", "Add", "Concat"}
    sizes = {"Add", "Mul", "Concat"} if found["Shape"] else set()  # of what is reshaped
    assert (floats - sizes).isdisjoint(found)
    exact, other, answer = (np.asarray(load(file, 1)(IMAGES)[0]) for file in (dense, portable, deployed))
    assert decibels(exact, answer) > min(decibels(exact, other), 30) - 3


def test_no_weight_is_dequantized_with_every_call_where_an_activation_has_no_integer_kernel(tmp_path: Path) -> None:
    found = optimized(files(network(nn.PReLU(16)))[2], tmp_path)
    assert found["PRelu"] == 1
    assert found["QLinearConv"] == 2
    assert found["DequantizeLinear"] == 1  # in front of it


def test_an_exported_graph_has_no_pads_constants_or_copies() -> None:
    model = onnx.load_from_string(files(network(nn.Dropout(), Padded(), nn.Identity()))[0])
    kinds = {node.op_type for node in model.graph.node}
    assert kinds.isdisjoint({"Pad", "Constant", "ConstantOfShape", "Identity", "Dropout", "Cast", "Slice", "Transpose"})
    assert [2, 1] in [
        [attribute.ints[-1], attribute.ints[0]]
        for node in model.graph.node
        for attribute in node.attribute
        if attribute.name == "pads"
    ]


def test_pads_that_a_convolution_cannot_take_in_stay() -> None:
    for mode, value in (("reflect", None), ("constant", 1.0)):

        class Other(nn.Module):
            def forward(self, x: Tensor, mode: str = mode, value: float | None = value) -> Tensor:
                return F.pad(x, (1, 1, 1, 1), mode, value)

        kinds = [node.op_type for node in onnx.load_from_string(files(network(nn.ReLU(), Other()))[0]).graph.node]
        assert kinds.count("Pad") == 1


def test_a_batch_size_read_from_the_images_ties_nothing_to_them() -> None:
    torch.manual_seed(0)
    trunk = FromItsInput().eval()
    dense = ExitNetwork(trunk, ["first"], [ExitHead(8, 5, 2)]).eval()
    builder = ArtifactBuilder(dense, IMAGES, OnnxRuntime())
    artifact = builder.build(dense, Candidate({}, {}, Thresholds({"exit1": 0.5})))
    assert len(artifact.stages) == 2
    features, _ = load(artifact.stages[0], 1)(IMAGES[:3])
    with torch.no_grad():
        expected = trunk(torch.from_numpy(IMAGES[:3])).numpy()
    assert load(artifact.stages[1], 1)(features)[0] == pytest.approx(expected, abs=1e-5)


def graph(*nodes: onnx.NodeProto) -> bytes:
    """Returns a file that quantizes the tensor `y` of some nodes, which read the images `x` and the constants below."""
    constants = {"low": 0.0, "below": -1.0, "six": 6.0, "scale": 0.1}
    stored = [numpy_helper.from_array(np.float32(value), name) for name, value in constants.items()]
    stored.append(numpy_helper.from_array(np.int8(0), "zero"))
    stored.append(numpy_helper.from_array(np.array([0, 0, 1, 1, 0, 0, 1, 1]), "pads"))
    pair = [
        helper.make_node("QuantizeLinear", ["y", "scale", "zero"], ["y/q"], "quantize"),
        helper.make_node("DequantizeLinear", ["y/q", "scale", "zero"], ["z"], "dequantize"),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4, 4, 4]) for name in ("x", "z")]
    made = helper.make_graph([*nodes, *pair], "graph", ends[:1], ends[1:], stored)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


def node(kind: str, *inputs: str, out: str = "y", **attributes: object) -> onnx.NodeProto:
    return helper.make_node(kind, list(inputs), [out], out, **attributes)


@pytest.mark.parametrize(
    ("nodes", "zero_point"),
    [
        ([node("Clip", "x", "low", "six")], 0),
        ([node("Clip", "x", "below", "six")], 128),
        ([node("Clip", "x", "", "six")], 128),
        ([node("Sigmoid", "x")], 0),
        ([node("HardSigmoid", "x")], 0),
        ([node("Softmax", "x", axis=1)], 0),
        ([node("HardSwish", "x")], 128),
        ([node("LeakyRelu", "x")], 128),
        ([node("Tanh", "x")], 128),
        ([node("Identity", "x")], 128),
        ([node("Relu", "x", out="a"), node("Sigmoid", "x", out="b"), node("Add", "a", "b")], 0),
        ([node("Relu", "x", out="a"), node("Add", "a", "x")], 128),
        ([node("Relu", "x", out="a"), node("Sigmoid", "x", out="b"), node("Mul", "a", "b")], 0),
        ([node("Sigmoid", "x", out="a"), node("Mul", "a", "x")], 128),
        ([node("Relu", "x", out="a"), node("Concat", "a", "a", axis=1)], 0),
        ([node("Relu", "x", out="a"), node("Concat", "a", "x", axis=1)], 128),
        ([node("Relu", "x", out="a"), node("Max", "a", "x")], 0),
        ([node("Relu", "x", out="a"), node("Min", "a", "x")], 128),
        ([node("Relu", "x", out="a"), node("ReduceMean", "a", axes=[2, 3])], 0),
        ([node("Relu", "x", out="a"), node("GlobalAveragePool", "a")], 0),
        ([node("Relu", "x", out="a"), node("MaxPool", "a", kernel_shape=[2, 2])], 0),
        ([node("Relu", "x", out="a"), node("Pad", "a", "pads")], 0),
        ([node("Relu", "x", out="a"), node("Pad", "a", "pads", "below")], 128),
    ],
)
def test_what_is_never_negative_has_all_steps_above_zero(nodes: list[onnx.NodeProto], zero_point: int) -> None:
    made = onnx.load_from_string(unsigned_activations(graph(*nodes)))
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in made.graph.initializer}
    assert values["zero"] == zero_point
    assert values["scale"] == pytest.approx(0.1 * (127 / 255 if zero_point == 0 else 1))  # the range is the same


def test_integers_are_clipped_where_their_range_reaches_beyond_a_clip() -> None:
    images = np.linspace(-9, 9, 256, dtype=np.float32).reshape(4, 4, 4, 4)
    given = graph(node("Clip", "x", "below", "six"))
    made = unsigned_activations(given)
    before, after = (np.asarray(load(file, 1)(images)[0]) for file in (given, made))
    assert np.abs(after - before).max() <= 0.05 + 1e-6  # half a step
    assert after.min() == pytest.approx(-1)
    assert after.max() == pytest.approx(6)


def test_a_bias_that_32_bits_cannot_hold_stays_in_float() -> None:
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 5)).eval()
    with torch.no_grad():
        trunk[1].weight[2] = 0.0
        trunk[1].bias[2] = 100.0
    exact, _, deployed = files(trunk)
    expected, answer = (np.asarray(load(file, 1)(IMAGES)[0]) for file in (exact, deployed))
    assert answer[:, 2] == pytest.approx(expected[:, 2], rel=1e-3)


def test_float_files_are_left_alone() -> None:
    dense = files(network(nn.Hardswish()))[0]
    assert integer_form(dense) == dense
    assert unsigned_activations(dense) == dense
