"""The exported graph in torch: it answers as the network, and rounds what the file rounds."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from evaluators.artifact_builder import ArtifactBuilder
from evaluators.graph.template import Template
from evaluators.quantization.int8 import Quantizer
from evaluators.quantization.torch_operators import Operation
from evaluators.quantization.trainable_graph import TrainableGraph
from evaluators.runtimes.onnxruntime_cpu import OnnxRuntime, load
from spaces.dynamic.exit_network import ExitNetwork
from spaces.errors import QuantizationError
from tests.helpers import tiny, zoo


def graph_of(network: ExitNetwork, image: torch.Tensor) -> TrainableGraph:
    template = Template(network, image)
    return TrainableGraph(template, Quantizer(template.nodes, template.layers, ["logits"], 8))


@pytest.mark.parametrize("name", zoo.NETWORKS)
@pytest.mark.parametrize("batch_statistics", [False, True])
def test_it_answers_as_the_network_does(name: str, batch_statistics: bool) -> None:
    network = ExitNetwork(zoo.build(name), [], []).eval()
    images = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    graph = graph_of(network, images[:1])
    state = network.state_dict(keep_vars=True)
    found = graph.logits(state, images, batch_statistics=batch_statistics)[-1]
    network.train(batch_statistics)
    expected = network(images)[-1]
    assert torch.allclose(found, expected, atol=1e-5 * float(expected.detach().abs().max()))


@pytest.mark.parametrize("name", ["option-a", "grouped", "concat", "squeeze-excite"])
def test_gradients_are_the_networks_own(name: str) -> None:
    network = ExitNetwork(zoo.build(name), [], []).eval()
    images = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    graph = graph_of(network, images[:1])
    network(images)[-1].square().sum().backward()
    expected = {key: parameter.grad.clone() for key, parameter in network.named_parameters()}
    network.zero_grad()
    graph.logits(network.state_dict(keep_vars=True), images)[-1].square().sum().backward()
    for key, parameter in network.named_parameters():
        largest = float(expected[key].abs().max())
        assert torch.allclose(parameter.grad, expected[key], atol=1e-4 * largest + 1e-6), key


def test_sliced_and_grouped_networks_need_no_other_graph(network, space, builder, images) -> None:
    graph = builder.trainable()
    smaller = space.sparsity.apply(network, {group.name: 4 for group in space.sparsity.groups})
    assert smaller.trunk.depthwise[0].groups == 4
    with torch.no_grad():
        for found, expected in zip(graph.logits(smaller.state_dict(), images), smaller(images), strict=True):
            assert torch.allclose(found, expected, atol=1e-5)


def test_the_losses_of_exits_end_at_their_heads(network, builder, images) -> None:
    graph = builder.trainable()
    parameters = dict(network.named_parameters())
    first, *_ = graph.logits(network.state_dict(keep_vars=True), images)
    reached = torch.autograd.grad(first.sum(), list(parameters.values()), allow_unused=True)
    found = {name for name, gradient in zip(parameters, reached, strict=True) if gradient is not None}
    assert found == {name for name in parameters if name.startswith("exits.exit1.")}


def test_what_is_rounded_is_what_has_qdq_in_the_file(network, builder, space) -> None:
    candidate = space.candidate(space.uniform(1.0, "int8", 0.8))
    graph, placement = builder.trainable(), builder.int8_placement(network, candidate)
    stages = builder.build(network, candidate).stages
    nodes = [node for stage in stages for node in onnx.load_from_string(stage).graph.node]
    written = {node.name.removesuffix("/QuantizeLinear") for node in nodes if node.op_type == "QuantizeLinear"}
    rounded = graph.rounded_tensors(placement)
    assert set(rounded) <= written
    moved = {node.output[0] for node in nodes if node.op_type in ("MaxPool", "Flatten")}
    assert {name.removesuffix("/float") for name in moved} >= written - set(rounded)
    assert set(rounded.values()) <= set(graph.scales())


OPERATIONS = [
    ("Clip", {}, [np.float32([-3, 0.5, 9]), np.float32(0), np.float32(6)]),
    ("Div", {}, [np.int64([7, -7]), np.int64([2, 2])]),
    ("Div", {}, [np.float32([7, -7]), np.float32([2, 2])]),
    ("Gather", {"axis": 1}, [np.arange(12).reshape(3, 4), np.int64([[0, -1]])]),
    ("Slice", {}, [np.arange(12).reshape(3, 4), np.int64([-1]), np.int64([-(2**62)]), np.int64([1]), np.int64([-2])]),
    ("Slice", {}, [np.arange(12).reshape(3, 4), np.int64([0, 1]), np.int64([2, 2**62])]),
    ("Pad", {}, [np.float32([[1, 2]]), np.int64([1, 0, 0, 2]), np.float32(5)]),
    (
        "Pad",
        {"mode": "reflect"},
        [np.arange(9, dtype=np.float32).reshape(1, 1, 3, 3), np.int64([0, 0, 1, 2, 0, 0, 0, 1])],
    ),
    ("Reshape", {}, [np.arange(12).reshape(3, 4), np.int64([0, 2, -1])]),
    ("Unsqueeze", {}, [np.arange(3), np.int64([0, -1])]),
    ("Squeeze", {}, [np.arange(3).reshape(1, 3, 1), np.int64([-1])]),
    ("ReduceMean", {"axes": [1], "keepdims": 0}, [np.float32([[1, 2], [3, 5]])]),
    ("Flatten", {"axis": 2}, [np.zeros((2, 3, 4, 5), np.float32)]),
    ("Cast", {"to": TensorProto.INT64}, [np.float32([1.7, -1.7])]),
    ("Mod", {}, [np.int64([7, -7]), np.int64([3, 3])]),
    ("Softmax", {"axis": 0}, [np.float32([[1, 2], [3, 5]])]),
    ("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}, [np.float32([-9, 0.5, 9])]),
    ("HardSwish", {}, [np.float32([-9, 0.5, 9])]),
    (
        "Gemm",
        {"transA": 1, "alpha": 2.0, "beta": 0.5},
        [np.float32([[1, 2]]), np.float32([[3, 4]]), np.float32([7, 8])],
    ),
    (
        "MaxPool",
        {"kernel_shape": [2, 2], "strides": [2, 2], "pads": [0, 1, 1, 0], "ceil_mode": 0},
        [-np.arange(1, 17, dtype=np.float32).reshape(1, 1, 4, 4)],
    ),
    (
        "AveragePool",
        {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1], "count_include_pad": 0},
        [np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)],
    ),
    (
        "Conv",
        {"kernel_shape": [2, 2], "strides": [1, 2], "pads": [0, 0, 1, 1], "group": 2},
        [np.arange(32, dtype=np.float32).reshape(1, 2, 4, 4), np.ones((4, 1, 2, 2), np.float32)],
    ),
    ("Expand", {}, [np.float32([[1], [2]]), np.int64([2, 3])]),
    ("ConstantOfShape", {"value": numpy_helper.from_array(np.int64([3]))}, [np.int64([2, 2])]),
    ("GreaterOrEqual", {}, [np.float32([1, 2, 3]), np.float32([2, 2, 2])]),
    ("Where", {}, [np.array([True, False]), np.float32([1, 2]), np.float32([3, 4])]),
    ("Einsum", {"equation": "ij,jk->ik"}, [np.float32([[1, 2]]), np.float32([[3], [4]])]),
]


@pytest.mark.parametrize(("kind", "attributes", "inputs"), OPERATIONS, ids=[kind for kind, _, _ in OPERATIONS])
def test_an_operator_does_what_the_runtime_does(kind, attributes, inputs) -> None:
    names = [f"in{index}" for index in range(len(inputs))]
    node = helper.make_node(kind, names, ["out"], **attributes)
    first = helper.make_tensor_value_info("in0", helper.np_dtype_to_tensor_dtype(inputs[0].dtype), inputs[0].shape)
    kept = [numpy_helper.from_array(np.asarray(value), name) for name, value in zip(names[1:], inputs[1:], strict=True)]
    found = Operation.of(node)
    answer = found.run([torch.from_numpy(np.array(value)) for value in inputs], found.attributes).numpy()
    output = helper.make_tensor_value_info("out", helper.np_dtype_to_tensor_dtype(answer.dtype), None)
    graph = helper.make_graph([node], "one", [first], [output], kept)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (expected,) = load(model.SerializeToString(), 1)(inputs[0])
    np.testing.assert_allclose(answer, expected, rtol=1e-6)
    assert answer.shape == expected.shape


def test_a_graph_that_answers_otherwise_is_not_trained() -> None:
    class Scaled(zoo.Head):
        scale = 1.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * self.scale

    torch.manual_seed(0)
    network = ExitNetwork(Scaled(), [], []).eval()
    builder = ArtifactBuilder(network, torch.randn(6, 3, 8, 8).numpy(), OnnxRuntime())
    builder.check_trainable()
    network.trunk.scale = 1.5  # the graph has the scale of its export
    with pytest.raises(QuantizationError, match=r"by 0\.33 of the largest logit; leave \[recovery\.qat\] out"):
        builder.check_trainable()


def test_an_unknown_operator_is_named() -> None:
    node = helper.make_node("GridSample", ["x", "grid"], ["y"], name="/warp/GridSample")
    with pytest.raises(QuantizationError, match=r"got GridSample at '/warp/GridSample'; leave \[recovery.qat\] out"):
        Operation.of(node)


def test_a_linear_layer_behind_a_product_keeps_its_channels_last() -> None:
    """MatMul's weight is stored the other way round in the file."""
    from spaces.candidate import Candidate

    network = ExitNetwork(zoo.build("tokens"), [], []).eval()
    images = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    builder = ArtifactBuilder(network, images.numpy(), OnnxRuntime())
    candidate = Candidate({}, dict.fromkeys(builder.layers, "int8"))
    graph = builder.trainable()
    weights = graph.rounded_weights(builder.int8_placement(network, candidate))
    (hidden,) = (name for name in weights if "mlp.0" in name)
    assert weights[hidden] == 1
    assert tuple(graph.folded_weight(hidden, network.state_dict()).shape) == (16, 32)


def test_tiny_networks_run_too(image) -> None:
    network = ExitNetwork(tiny.randomized(), [], []).eval()
    with torch.no_grad():
        assert torch.allclose(
            graph_of(network, image).logits(network.state_dict(), image)[-1], network(image)[-1], atol=1e-5
        )
