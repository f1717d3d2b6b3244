"""Q/DQ: what the file says, and what the runtime makes of it."""

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import numpy_helper

from evaluators.artifact.qdq import quantize_weight
from evaluators.runtimes.ort import load, open_session, unsigned_activations
from evaluators.runtimes.run_bundle import StagedNetwork


@settings(deadline=None)
@given(
    hnp.arrays(np.float32, (4, 3, 2), elements=st.floats(-100, 100, width=32)),
    st.sampled_from([0, 1]),
    st.sampled_from([127, 63]),
)
def test_a_weight_is_within_half_a_step_of_its_quantized_form(weight: np.ndarray, axis: int, limit: int) -> None:
    quantized, scale = quantize_weight(weight, axis, limit)
    assert quantized.dtype == np.int8
    assert np.abs(quantized.astype(int)).max() <= limit
    shape = [-1 if index == axis else 1 for index in range(3)]
    restored = quantized * scale.reshape(shape)
    assert (np.abs(restored - weight) <= scale.reshape(shape) * 0.5001).all()


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
    values = space.uniform(1.0, "fp32", 1.0) | {"precision.inner.0": "int8"}
    assert builder.boundaries(space.candidate(values)) == 2  # into inner.0, and from it into outer.0


def test_ranges_are_the_extremes_of_the_activations(builder, network, images) -> None:
    with torch.no_grad():
        stem = network.trunk.stem(images)
    low, high = next(found for name, found in builder.ranges.items() if "stem.2" in name)
    assert low == 0
    assert high == pytest.approx(stem.max().item(), rel=1e-5)
    assert builder.ranges["images"] == pytest.approx((images.min().item(), images.max().item()))
