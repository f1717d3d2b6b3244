"""4-bit storage: the grid, the file, the runtimes that read it, and where it is offered."""

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, numpy_helper

from evaluators.artifact_builder import ArtifactBuilder
from evaluators.bundle.run import session_entries
from evaluators.latency.cache import structure_key
from evaluators.latency.slow_layers import SlowerLayers, SlowLayers
from evaluators.quantization.int4 import LARGEST
from evaluators.quantization.int8 import quantize_weight
from evaluators.runtimes.base import TargetError
from evaluators.runtimes.onnxruntime_cpu import OnnxRuntime
from evaluators.runtimes.registry import runtime
from evaluators.runtimes.tensorrt_gpu.capabilities import capabilities as gpu_capabilities
from search.config.study import Study, StudyError
from search.loop.resume import without_slow_precisions
from search.pipeline.pipeline import build_pipeline
from search.report.describe import int8_layers
from search.report.tables import front_table
from search.results.pareto import Version
from search.samplers.distributions import first_guesses
from spaces.candidate import Candidate
from spaces.dynamic.exit_network import ExitNetwork
from spaces.precision import PrecisionSpace
from spaces.thresholds import Thresholds
from tests.evaluators.test_fp8 import Tokens
from tests.evaluators.test_fp16 import MobileNetwork, assert_is_sound, error_of
from tests.helpers import tiny

OFF = Thresholds({"exit1": None, "exit2": None})
STUDY = tiny.STUDY + 'space = {storage = ["int4"]}\n'


def runtimes() -> list:
    found = [OnnxRuntime()]
    try:
        found.append(runtime("openvino"))
    except TargetError:
        return found
    return found


def candidate_of(builder: ArtifactBuilder, precision: str, **others: str) -> Candidate:
    return Candidate({}, dict.fromkeys(builder.layers, precision) | others, OFF)


@settings(deadline=None)
@given(hnp.arrays(np.float32, (4, 3, 2), elements=st.floats(-100, 100, width=32)), st.sampled_from([0, 1]))
def test_a_weight_is_off_by_half_a_step_of_its_channel_at_most(weight: np.ndarray, axis: int) -> None:
    grid = quantize_weight(weight, axis, LARGEST)
    shape = [-1 if index == axis else 1 for index in range(3)]
    step = grid.scale.reshape(shape)
    assert np.abs(grid.values).max() <= LARGEST
    assert (np.abs(grid.values * step - weight) <= step * 0.5001).all()


@pytest.mark.parametrize("library", runtimes(), ids=lambda library: library.name)
@pytest.mark.parametrize("layer", ["inner.0", "depthwise.0", "hidden"])
def test_a_layer_in_int4_is_the_formula(layer: str, library, builder, network, images) -> None:
    artifact = builder.build(network, candidate_of(builder, "fp32", **{layer: "int4"}))
    module = network.trunk.get_submodule(layer)
    norm = dict(network.trunk.named_modules()).get(layer.replace(".0", ".1")) if "." in layer else None
    factor = norm.weight / torch.sqrt(norm.running_var + norm.eps) if norm else torch.ones(len(module.weight))
    exact, shape = module.weight.data, [-1, *[1] * (module.weight.ndim - 1)]
    # Batch normalisation is folded in before the weight is rounded.
    grid = quantize_weight((exact * factor.reshape(shape)).detach().numpy(), 0, LARGEST)
    rounded = torch.from_numpy(grid.values * grid.scale.reshape(shape))
    module.weight.data = (rounded / factor.reshape(shape)).detach()
    try:
        with torch.no_grad():
            wanted = network(images)[-1].numpy()
    finally:
        module.weight.data = exact
    opened = library.open([library.deployable(stage) for stage in artifact.stages], [], 1)
    np.testing.assert_allclose(opened.answer(images.numpy(), 4)[0], wanted, atol=1e-4)
    assert not opened.proof(images.numpy(), artifact.precisions).differences


def test_weights_take_half_a_byte_and_activations_stay_float(builder, network) -> None:
    (stage,) = builder.build(network, candidate_of(builder, "int4")).stages
    assert_is_sound(stage)
    model = onnx.load_from_string(stage)
    assert model.opset_import[0].version == 21
    assert not [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    weights = [tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.INT4]
    assert len(weights) == len([node for node in model.graph.node if node.op_type in ("Conv", "Gemm")])
    for tensor in weights:
        assert len(tensor.raw_data) == -(-numpy_helper.to_array(tensor).size // 2)


def test_weights_that_are_only_stored_become_float_when_a_file_is_loaded(builder, network, tmp_path) -> None:
    def loaded(candidate: Candidate) -> set[str]:
        (stage,) = builder.build(network, candidate).deployed
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        for key, value in session_entries(stage).items():
            options.add_session_config_entry(key, value)
        onnxruntime.InferenceSession(stage, options, providers=["CPUExecutionProvider"])
        return {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}

    assert "DequantizeLinear" not in loaded(candidate_of(builder, "int4"))
    for precision in ("fp32", "int8", "fp8"):
        assert session_entries(builder.build(network, candidate_of(builder, precision)).deployed[0]) == {}
    assert "QLinearConv" in loaded(candidate_of(builder, "int8", **{"inner.0": "int4"}))


@pytest.mark.parametrize("library", runtimes(), ids=lambda library: library.name)
def test_int4_and_int8_layers_share_a_file(library, builder, network, images) -> None:
    mixed = candidate_of(builder, "int8", **{"inner.0": "int4", "hidden": "int4"})
    artifact = builder.build(network, mixed)
    assert_is_sound(artifact.stages[0])
    opened = library.open([library.deployable(stage) for stage in artifact.stages], [], 1)
    with torch.no_grad():
        exact = network(images)[-1].numpy()
    assert 0 < error_of(opened.answer(images.numpy(), 4)[0], exact) < 0.2
    assert not opened.proof(images.numpy(), artifact.precisions).differences


@pytest.mark.parametrize("library", runtimes(), ids=lambda library: library.name)
@pytest.mark.parametrize("make", [MobileNetwork, Tokens])
def test_reductions_and_products_of_a_higher_opset_run(make, library) -> None:
    torch.manual_seed(0)
    network, images = ExitNetwork(make().eval(), [], []).eval(), torch.randn(6, 3, 8, 8)
    builder = ArtifactBuilder(network, images.numpy(), OnnxRuntime())
    (stage,) = builder.build(network, Candidate({}, dict.fromkeys(builder.layers, "int4"))).stages
    assert_is_sound(stage)
    with torch.no_grad():
        exact = network(images)[-1].numpy()
    assert 0 < error_of(library.open([stage], [], 1).answer(images.numpy(), 6)[0], exact) < 0.5


def test_only_stages_with_an_int4_layer_need_its_opset(builder, network) -> None:
    precision = dict.fromkeys(builder.layers, "fp32") | {"stem.0": "int4"}
    stages = builder.build(network, Candidate({}, precision, Thresholds({"exit1": 0.6, "exit2": 0.6}))).stages
    assert [onnx.load_from_string(stage).opset_import[0].version for stage in stages] == [21, 17, 17]


def test_other_weights_are_the_same_structure(builder, network) -> None:
    import copy

    other = copy.deepcopy(network)
    other.trunk.inner[0].weight.data += 0.01
    (first,), (second,) = (builder.build(each, candidate_of(builder, "int4")).stages for each in (network, other))
    assert first != second
    assert structure_key([first]) == structure_key([second])


def test_storage_is_no_boundary_and_heads_that_never_answer_do_not_count(builder, space) -> None:
    assert builder.boundaries(candidate_of(builder, "int4", **{"inner.0": "fp32"})) == 0
    heads = [layer for layer in builder.layers if layer.startswith("exits.")]
    trunk = candidate_of(builder, "int8", **dict.fromkeys(heads, "fp32"))
    answering = replace(trunk, thresholds=Thresholds({"exit1": 0.6, "exit2": 0.6}))
    assert builder.boundaries(answering) == builder.boundaries(trunk) + len(heads)


def test_a_study_asks_for_it_and_it_comes_after_the_target_s_own(cache) -> None:
    plain, asking = (build_pipeline(Study.parse(text, "test"), lambda *_: None) for text in (tiny.STUDY, STUDY))
    assert plain.space.precision.precisions == ("fp32", "int8")
    assert asking.space.precision.precisions == ("fp32", "int8", "int4")
    assert asking.space.precision.computed == ("fp32", "int8")
    assert not any("int4" in line for line in asking.remarks)
    references = asking.references.artifacts
    assert references["int4"].size < 0.9 * references["int8"].size < references["fp32"].size
    assert {guess["precision.inner.0"] for guess in first_guesses(asking.space)} == {"fp32", "int8", "int4"}
    slow_layers = SlowLayers((SlowerLayers(("inner.0",), "int8", "fp32", 0.9, 0.01),))
    left = without_slow_precisions(asking.space, slow_layers).precision
    assert left.allowed["inner.0"] == ("fp32", "int4")
    assert left.allowed["outer.0"] == left.precisions == ("fp32", "int8", "int4")


def test_it_is_left_out_where_the_target_does_not_read_it(cache) -> None:
    class Unable(OnnxRuntime):
        def capabilities(self):
            return replace(super().capabilities(), storage=())

    pipeline = build_pipeline(Study.parse(STUDY, "test"), lambda *_: None, Unable())
    assert pipeline.space.precision.precisions == ("fp32", "int8")
    assert [line for line in pipeline.remarks if line.startswith("int4 storage is left out")]
    assert gpu_capabilities((8, 9)).storage == ()


def test_a_study_names_storage_that_exists() -> None:
    with pytest.raises(StudyError, match=r"space\.storage is 'int4', got 'int3'"):
        Study.parse(STUDY.replace("int4", "int3"), "test")


def test_narrowing_keeps_storage_once() -> None:
    space = PrecisionSpace(["a", "b"], ("fp32", "int8"), storage=("int4",))
    assert space.without({"a": ("fp32",)}).without({"a": ("fp32", "int4")}).allowed == {
        "a": ("fp32", "int4"),
        "b": ("fp32", "int8", "int4"),
    }


def test_the_front_shows_what_is_only_stored(pipeline) -> None:
    dense = pipeline.space.dense()
    mixed = replace(dense, precision=dict(dense.precision) | {"inner.0": "int4", "outer.0": "int8"})
    deployed = [layer for layer in dense.precision if not layer.startswith("exits.")]
    assert int8_layers(dense) == f"0/{len(deployed)}"
    assert int8_layers(mixed) == f"1+1/{len(deployed)}"
    latency = pipeline.references.latency_evaluator(
        {name: spent.work for name, spent in pipeline.references.time().items()}
    )
    first, second = (pipeline.evaluate(each, latency) for each in (dense, mixed))
    table = front_table([Version(1, second)], Version(-1, first), "front", 100)
    assert "layers in int8 + stored in int4" in str(table.caption)
    assert "int4" not in str(front_table([Version(1, first)], Version(-1, first), "front", 100).caption)
    assert first.measurements["latency"].notes["boundaries"] == 0
    assert second.measurements["latency"].notes["boundaries"] == pipeline.builder.boundaries(mixed) > 0
