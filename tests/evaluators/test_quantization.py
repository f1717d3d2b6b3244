"""Q/DQ: what the file says, and what the runtime makes of it."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import NodeProto, numpy_helper

from evaluators.artifact_builder import ArtifactBuilder
from evaluators.inference.staged import StagedNetwork
from evaluators.quantization.int8 import quantize_weight
from evaluators.runtimes.base import Capabilities
from evaluators.runtimes.onnx_rewrites.unsigned_activations import unsigned_activations
from evaluators.runtimes.onnxruntime_cpu import OnnxRuntime, load, open_session
from spaces.candidate import Candidate
from spaces.dynamic.exit_network import ExitNetwork
from spaces.thresholds import Thresholds
from studies.digits.model import resnet20


@settings(deadline=None)
@given(
    hnp.arrays(np.float32, (4, 3, 2), elements=st.floats(-100, 100, width=32)),
    st.sampled_from([0, 1]),
    st.sampled_from([127, 63]),
)
def test_a_weight_is_within_half_a_step_of_its_quantized_form(weight: np.ndarray, axis: int, limit: int) -> None:
    grid = quantize_weight(weight, axis, limit)
    quantized, scale = grid.values, grid.scale
    assert quantized.dtype == np.int8
    assert np.abs(quantized.astype(int)).max() <= limit
    shape = [-1 if index == axis else 1 for index in range(3)]
    restored = quantized * scale.reshape(shape)
    assert (np.abs(restored - weight) <= scale.reshape(shape) * 0.5001).all()


class Accelerator(OnnxRuntime):
    """Runs the portable files as they are, and asks for Q/DQ in the form of a runtime on a GPU."""

    def __init__(self, precisions: tuple[str, ...] = ("fp32", "fp16", "int8"), int8_channels: int = 1) -> None:
        able = super().capabilities()
        self.able = replace(
            able,
            precisions=precisions,
            dynamic_batch=False,
            quantized_add="residual",
            int8_channels=int8_channels,
            int8_heads=True,
        )

    def capabilities(self) -> Capabilities:
        return self.able

    def deployable(self, model: bytes) -> bytes:
        return model


def int8_candidate(space, threshold: float = 1.0):
    return space.candidate(space.uniform(1.0, "int8", threshold))


def test_the_portable_file_is_symmetric_s8_with_float_bias(builder, network, space) -> None:
    (stage,) = builder.build(network, int8_candidate(space)).stages
    model = onnx.load_from_string(stage)
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    quantizers = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len(quantizers) > 10
    for node in quantizers:
        assert values[node.input[2]].dtype == np.int8
        assert not values[node.input[2]].any()
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            assert node.input[1].endswith("/dq")
            assert values[node.input[2]].dtype == np.float32


def test_the_runtime_gets_u8_and_fuses_every_layer(builder, network, space, tmp_path) -> None:
    (stage,) = builder.build(network, int8_candidate(space)).deployed
    zero_points = {
        numpy_helper.to_array(tensor).dtype
        for tensor in onnx.load_from_string(stage).graph.initializer
        if tensor.name.endswith("/zero_point") and not tensor.dims
    }
    assert zero_points == {np.dtype(np.uint8)}
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(stage, options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert kinds.count("QLinearConv") == 5
    assert not {"Conv", "FusedConv"} & set(kinds)


def test_int8_answers_are_close_to_float_and_the_rewrite_changes_little(builder, network, space, images) -> None:
    (stage,) = builder.build(network, int8_candidate(space)).stages
    with torch.no_grad():
        exact = network(images)[-1].numpy()
    signed = open_session(stage, 1).run(None, {"images": images.numpy()})[0]
    unsigned = open_session(unsigned_activations(stage), 1).run(None, {"images": images.numpy()})[0]
    noise = np.sqrt(np.mean((unsigned - exact) ** 2) / np.mean(exact**2))
    assert 0 < noise < 0.1
    assert np.sqrt(np.mean((unsigned - signed) ** 2) / np.mean(exact**2)) < 0.1


def test_a_float_candidate_has_no_qdq_at_all(builder, network, space) -> None:
    artifact = builder.build(network, space.dense())
    kinds = {node.op_type for node in onnx.load_from_string(artifact.stages[0]).graph.node}
    assert not kinds & {"QuantizeLinear", "DequantizeLinear"}
    assert artifact.stages == artifact.deployed


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_mix_of_precisions_loads_and_answers(data, builder, network, space, images) -> None:
    values = space.uniform(1.0, "fp32", data.draw(st.sampled_from([1.0, 0.8])))
    for name in values:
        if name.startswith("precision."):
            values[name] = data.draw(st.sampled_from(["fp32", "int8"]))
    candidate = space.candidate(values)
    artifact = builder.build(network, candidate)
    staged = StagedNetwork([load(stage, 1) for stage in artifact.deployed], [2.0] * len(artifact.exits))
    logits, _ = staged(images.numpy())
    with torch.no_grad():
        exact = network(images)[-1].numpy()
    assert np.sqrt(np.mean((logits - exact) ** 2) / np.mean(exact**2)) < 0.15
    int8 = [precision for precision in candidate.precision.values() if precision == "int8"]
    assert (builder.boundaries(candidate) == 0) == (not int8)


def test_boundaries_count_where_precision_changes(builder, space) -> None:
    dense = space.dense()
    assert builder.boundaries(dense) == 0
    values = space.uniform(1.0, "fp32") | {"precision.inner.0": "int8"}
    assert builder.boundaries(space.candidate(values)) == 2  # into inner.0, and from it into outer.0


def test_ranges_are_the_extremes_of_the_activations(builder, network, images) -> None:
    with torch.no_grad():
        stem = network.trunk.stem(images)
    low, high = next(found for name, found in builder.ranges.items() if "stem.2" in name)
    assert low == 0
    assert high == pytest.approx(stem.max().item(), rel=1e-5)
    assert builder.ranges["images"] == pytest.approx((images.min().item(), images.max().item()))


def additions(stage: bytes) -> list[tuple[list[str], str]]:
    """Returns, for each addition of a file, the kinds of node that feed it, and the one that its ReLU feeds."""
    graph = onnx.load_from_string(stage).graph
    producers = {output: node for node in graph.node for output in node.output}
    readers: dict[str, NodeProto] = {name: node for node in graph.node for name in node.input}
    return [
        ([producers[name].op_type for name in node.input], readers[readers[node.output[0]].output[0]].op_type)
        for node in graph.node
        if node.op_type == "Add"
    ]


@pytest.fixture(scope="module")
def residual_network() -> tuple[ExitNetwork, np.ndarray]:
    torch.manual_seed(0)
    return ExitNetwork(resnet20().eval(), [], []).eval(), torch.randn(4, 1, 32, 32).numpy()


def test_a_fused_addition_quantizes_the_shortcut_alone(residual_network) -> None:
    network, images = residual_network
    builder = ArtifactBuilder(network, images, Accelerator())
    (stage,) = builder.build(network, Candidate({}, dict.fromkeys(builder.layers, "int8"))).stages
    found = additions(stage)
    assert len(found) == 9
    assert all(kinds == ["Conv", "DequantizeLinear"] and after == "QuantizeLinear" for kinds, after in found)
    nodes = onnx.load_from_string(stage).graph.node
    shortcuts = [node for node in nodes if node.op_type == "Conv" and "shortcut" in node.name]
    assert len(shortcuts) == 2
    for convolution in shortcuts:  # of the two branches of a downsampling block, the shorter one
        assert [node.op_type for node in nodes if convolution.output[0] in node.input] == ["QuantizeLinear"]


def test_an_unfused_addition_quantizes_both_inputs(residual_network) -> None:
    network, images = residual_network
    builder = ArtifactBuilder(network, images, OnnxRuntime())
    (stage,) = builder.build(network, Candidate({}, dict.fromkeys(builder.layers, "int8"))).stages
    assert all(kinds == ["DequantizeLinear"] * 2 and after == "QuantizeLinear" for kinds, after in additions(stage))


def test_a_fused_addition_answers_no_worse(residual_network) -> None:
    network, images = residual_network
    with torch.no_grad():
        exact = network(torch.from_numpy(images))[-1].numpy()
    builder = ArtifactBuilder(network, images, Accelerator())
    (stage,) = builder.build(network, Candidate({}, dict.fromkeys(builder.layers, "int8"))).stages
    onnx.checker.check_model(onnx.load_from_string(stage), full_check=True)
    answer = load(stage, 1)(images)[0]
    assert np.sqrt(np.mean((answer - exact) ** 2) / np.mean(exact**2)) < 0.1


def test_the_convolution_stays_fused_behind_a_float_shortcut(network, images) -> None:
    builder = ArtifactBuilder(network, images.numpy(), Accelerator(int8_channels=16))
    precision = dict.fromkeys(builder.layers, "int8")
    (stage,) = builder.build(network, Candidate({}, precision, Thresholds({"exit1": None, "exit2": None}))).stages
    assert builder.written_precisions(network, Candidate({}, precision))["stem.0"] == "fp16"
    ((kinds, _),) = additions(stage)
    assert kinds == ["Conv", "DequantizeLinear"]


def narrow(network: ExitNetwork, fewest: int) -> set[str]:
    """Returns the layers that have fewer input or output channels than `fewest`, or are grouped, as torch sees them."""
    found = set()
    for path, module in network.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            small = min(module.in_channels, module.out_channels) < fewest or module.groups > 1
        elif isinstance(module, torch.nn.Linear):
            small = min(module.in_features, module.out_features) < fewest
        else:
            continue
        found |= {path.removeprefix("trunk.")} if small else set()
    return found if fewest > 1 else set()


def written(stage: bytes) -> dict[str, str]:
    """Returns the precision of each layer's weight in a file."""
    graph = onnx.load_from_string(stage).graph
    types = {tensor.name: numpy_helper.to_array(tensor).dtype.name for tensor in graph.initializer}
    names = {"float32": "fp32", "float16": "fp16"}
    layers = [node.input[1] for node in graph.node if node.op_type in ("Conv", "Gemm")]
    return {
        name.removeprefix("trunk.").split(".weight")[0]: "int8" if name.endswith("/dq") else names[types[name]]
        for name in layers
    }


@settings(max_examples=15, deadline=None)
@given(data=st.data(), fewest=st.sampled_from([1, 2, 8, 16, 24]), half=st.booleans())
def test_layers_with_few_channels_are_not_int8(data, fewest, half, network, space, images) -> None:
    precisions = ("fp32", "fp16", "int8") if half else ("fp32", "int8")
    builder = ArtifactBuilder(network, images.numpy(), Accelerator(precisions, fewest))
    sliced = space.candidate(space.uniform(data.draw(st.sampled_from([1.0, 0.75, 0.5, 0.25])), "int8", 0.8))
    precision = {layer: data.draw(st.sampled_from(precisions)) for layer in builder.layers}
    candidate = Candidate(sliced.channels, precision, sliced.thresholds)
    pruned = space.apply(network, candidate)
    too_small, instead = narrow(pruned, fewest), "fp16" if half else "fp32"
    expected = {
        layer: instead if given == "int8" and layer in too_small else given for layer, given in precision.items()
    }
    assert builder.written_precisions(pruned, candidate) == expected
    artifact = builder.build(pruned, candidate)
    assert {layer: found for stage in artifact.stages for layer, found in written(stage).items()} == expected
    staged = StagedNetwork([load(stage, 1) for stage in artifact.deployed], [2.0, 2.0])
    with torch.no_grad():
        exact = pruned(images)[-1].numpy()
    assert np.sqrt(np.mean((staged(images.numpy())[0] - exact) ** 2) / np.mean(exact**2)) < 0.3


def test_stages_that_are_built_for_one_shape_name_their_channels(network, space, images) -> None:
    candidate = space.candidate(space.uniform(0.5, "int8", 0.8))
    pruned = space.apply(network, candidate)

    def channels(runtime: OnnxRuntime) -> list[int]:
        stages = ArtifactBuilder(network, images.numpy(), runtime).build(pruned, candidate).stages
        inputs = [onnx.load_from_string(stage).graph.input[0] for stage in stages]
        return [info.type.tensor_type.shape.dim[1].dim_value for info in inputs]

    convolutions = pruned.trunk
    expected = [1, convolutions.depthwise[0].in_channels, convolutions.pointwise[0].out_channels]
    assert channels(Accelerator(int8_channels=8)) == expected
    assert channels(OnnxRuntime()) == [1, 0, 0]


def test_a_bias_is_never_quantized(network, space, images) -> None:
    builder = ArtifactBuilder(network, images.numpy(), Accelerator(int8_channels=16))
    for stage in builder.build(network, int8_candidate(space, 0.8)).stages:
        graph = onnx.load_from_string(stage).graph
        values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        biases = [values[node.input[2]] for node in graph.node if node.op_type in ("Conv", "Gemm")]
        assert {bias.dtype.name for bias in biases} <= {"float32", "float16"}


def test_ranges_that_are_read_in_parts_are_those_of_all(builder, network, images, monkeypatch) -> None:
    whole = builder.read_ranges(network, images.numpy())
    monkeypatch.setattr("evaluators.runtimes.onnxruntime_cpu._CALIBRATION_BATCH", 5)
    parts = builder.read_ranges(network, images.numpy())
    assert parts.keys() == whole.keys()
    for name, found in parts.items():
        assert found == pytest.approx(whole[name], rel=1e-5, abs=1e-6)
