"""The figures of a comparison: formulas, the permutation that was applied, and files that tell what is inside."""

import json
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from evaluators.artifact_builder import ArtifactBuilder
from evaluators.diagnosis.taps import FileError, find_taps, has_halves, parsed, with_taps
from evaluators.diagnosis.tensor_errors import TensorComparison, TensorErrors, closest_order, decibels, shuffle_order
from evaluators.runtimes.onnxruntime_cpu import OnnxRuntime, load, rounded_halves
from spaces.candidate import Candidate
from spaces.dynamic.exit_network import ExitNetwork
from tests.helpers import tiny, zoo

FLOATS = st.floats(-10, 10, width=32)


def figures(exact: np.ndarray, found: np.ndarray, axis: int = 1, batch: int = 4) -> TensorErrors:
    comparison = TensorComparison(axis)
    for start in range(0, len(exact), batch):
        comparison.add(exact[start : start + batch], found[start : start + batch])
    return comparison.errors("layer", np.inf)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), batch=st.integers(1, 7), noise=st.floats(1e-3, 2))
def test_figures_are_those_of_the_whole_tensor_whatever_the_batches(seed, batch, noise) -> None:
    rng = np.random.default_rng(seed)
    exact = rng.normal(size=(6, 5, 3, 4)).astype(np.float32)
    found = exact + noise * rng.normal(size=exact.shape).astype(np.float32)
    got = figures(exact, found, batch=batch)
    wide, other = exact.astype(np.float64), found.astype(np.float64)
    assert got.sqnr_db == pytest.approx(10 * np.log10((wide**2).sum() / ((wide - other) ** 2).sum()), abs=1e-6)
    cosine = (wide * other).sum() / np.sqrt((wide**2).sum() * (other**2).sum())
    assert got.cosine == pytest.approx(cosine, abs=1e-9)
    assert got.largest == np.abs(exact).max()
    assert (got.channels, got.dead, got.died, got.not_finite) == (5, 0, 0, 0)


@pytest.mark.parametrize("bits", [4, 6, 8, 10])
def test_each_bit_of_a_uniform_grid_is_worth_6_db(bits) -> None:
    exact = np.random.default_rng(bits).uniform(-1, 1, (8, 4, 16, 16)).astype(np.float32)
    step = 2 / 2**bits
    assert figures(exact, np.rint(exact / step) * step).sqnr_db == pytest.approx(6.02 * bits, abs=0.2)


def test_equal_tensors_are_exact_and_what_is_not_finite_has_no_ratio() -> None:
    exact = np.ones((4, 3, 2, 2), np.float32)
    assert (figures(exact, exact).sqnr_db, figures(exact, exact).cosine) == (np.inf, 1.0)
    assert figures(np.zeros_like(exact), exact).sqnr_db == -np.inf
    broken = exact.copy()
    broken[1, 2, 0, 0], broken[3, 0, 1, 1] = np.nan, -np.inf
    assert (figures(exact, broken).sqnr_db, figures(exact, broken).not_finite) == (-np.inf, 2)
    assert (figures(broken, exact).not_finite_before, figures(broken, exact).not_finite) == (2, 0)
    written = json.dumps(figures(exact, broken).to_dict(), allow_nan=False)
    assert json.loads(written)["sqnr_db"] is None


def test_channels_that_never_vary_are_counted_over_all_images_and_places() -> None:
    exact = np.random.default_rng(0).normal(size=(8, 6, 3, 3)).astype(np.float32)
    exact[:, 0], exact[:, 1] = 0, 2.5
    exact[5, 1, 0, 0] = 2.6  # one value in one batch is enough
    found = exact.copy()
    found[:, 3], found[:, 0] = 1.0, 7.0
    got = figures(exact, found)
    assert (got.dead, got.died) == (1, 1)


def test_channels_are_where_the_axis_says() -> None:
    tokens = np.random.default_rng(0).normal(size=(4, 7, 3)).astype(np.float32)
    tokens[..., 1] = 0
    assert (figures(tokens, tokens, axis=-1).channels, figures(tokens, tokens, axis=-1).dead) == (3, 1)


def test_noise_of_ones_own_is_what_the_input_does_not_explain() -> None:
    def layer(input_db: float, sqnr_db: float) -> TensorErrors:
        return TensorErrors("x", input_db, sqnr_db, 1.0, 1.0, 0, 0, 1, 0, 0, None)

    assert layer(np.inf, 25.0).own_db == pytest.approx(25.0)
    assert layer(20.0, 20 - 10 * np.log10(2)).own_db == pytest.approx(20.0)  # twice the noise: as much again
    assert layer(20.0, 22.0).own_db == np.inf
    assert layer(-np.inf, -np.inf).own_db == np.inf
    assert layer(np.inf, -np.inf).own_db == -np.inf


@settings(max_examples=50, deadline=None)
@given(data=st.data(), channels=st.integers(2, 24), noise=st.floats(0, 0.05))
def test_the_permutation_that_is_found_is_the_one_that_was_applied(data, channels, noise) -> None:
    order = np.array(data.draw(st.permutations(range(channels))))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    exact = np.maximum(rng.normal(size=(6, channels, 5, 5)), 0).astype(np.float32)
    found = np.empty_like(exact)
    found[:, order] = exact  # channel i is to be found at order[i]
    got = figures(exact, found + noise * rng.normal(size=exact.shape).astype(np.float32))
    if (order == np.arange(channels)).all():
        assert got.permutation is None
        return
    assert got.sqnr_db < 20
    assert got.permutation.order == tuple(order)
    assert got.permutation.explained > 0.9
    assert not got.permutation.is_identity


@settings(deadline=None)
@given(groups=st.integers(2, 6), each=st.integers(2, 6))
def test_a_regular_shuffle_is_recognized_even_where_channels_are_dead(groups, each) -> None:
    channels = groups * each
    exact = np.random.default_rng(channels).normal(size=(5, channels, 4, 4)).astype(np.float32)
    exact[:, ::5] = 0  # any order of these is as good
    shuffled = exact[:, shuffle_order(channels, groups)]
    torch_says = torch.from_numpy(exact).view(5, groups, each, 4, 4).transpose(1, 2).reshape(exact.shape).numpy()
    np.testing.assert_array_equal(shuffled, torch_says)
    permutation = figures(shuffled, exact).permutation
    assert permutation.explained == pytest.approx(1, abs=1e-5)
    assert permutation.groups == groups


def test_another_order_is_no_shuffle_and_noise_is_no_permutation() -> None:
    rng = np.random.default_rng(0)
    exact = rng.normal(size=(6, 12, 5, 5)).astype(np.float32)
    swapped = exact[:, [1, 0, *range(2, 12)]]
    assert figures(exact, swapped).permutation.groups is None
    other = figures(exact, rng.normal(size=exact.shape).astype(np.float32)).permutation
    assert other.explained < 0.5


def test_no_order_is_better_than_none_where_there_is_no_error() -> None:
    assert closest_order(np.eye(3, dtype=np.float32), 6.0) is None


@given(signal=st.floats(1e-6, 1e6), noise=st.floats(1e-6, 1e6))
def test_decibels(signal, noise) -> None:
    assert 10 ** (decibels(signal, noise) / 10) == pytest.approx(signal / noise, rel=1e-9)


def made(name: str) -> tuple[ExitNetwork, ArtifactBuilder, np.ndarray]:
    trunk = tiny.randomized() if name == "tiny" else zoo.build(name)
    shape = (8, 1, 8, 8) if name == "tiny" else (8, 3, 8, 8)
    images = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    network = ExitNetwork(trunk, [], []).eval()
    return network, ArtifactBuilder(network, images, OnnxRuntime()), images


def artifact(builder: ArtifactBuilder, network: ExitNetwork, precision: str):
    return builder.build(network, Candidate({}, dict.fromkeys(builder.layers, precision)))


@pytest.mark.parametrize("name", ["tiny", *zoo.NETWORKS])
def test_every_layer_is_watched_under_its_name_in_every_precision(name: str) -> None:
    network, builder, images = made(name)
    taps = find_taps(artifact(builder, network, "fp32").stages[0])
    names = [tap.name for tap in taps]
    assert len(set(names)) == len(names)
    assert set(builder.layers) <= set(names)
    known = {"images", *(tap.tensor for tap in taps)}
    assert all(tap.sources and set(tap.sources) <= known for tap in taps)
    for precision in ("fp32", "fp16", "fp8", "int8"):
        (file,) = artifact(builder, network, precision).deployed
        model, found = with_taps(file, [tap.tensor for tap in taps])
        onnx.checker.check_model(onnx.load_from_string(model), full_check=True)
        assert set(found) == {tap.tensor for tap in taps}
        tensors = OnnxRuntime().tensors(model)(images)
        assert {name: tensors[name].dtype for name in found.values()} == dict.fromkeys(found.values(), np.float32)


def operators(model: bytes, file) -> Counter[str]:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(file), 3
    onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(str(file)).graph.node)


@pytest.mark.parametrize("name", ["tiny", "shuffle", "concat", "squeeze-excite"])
def test_watching_an_int8_network_moves_no_kernel_and_no_bit_of_its_answers(name: str, tmp_path) -> None:
    network, builder, images = made(name)
    taps = find_taps(artifact(builder, network, "fp32").stages[0])
    (file,) = artifact(builder, network, "int8").deployed
    model, found = with_taps(file, [tap.tensor for tap in taps])
    np.testing.assert_array_equal(OnnxRuntime().tensors(model)(images)[found["logits"]], load(file, 1)(images)[0])
    plain, looked_into = operators(file, tmp_path / "a.onnx"), operators(model, tmp_path / "b.onnx")
    kernels = [kind for kind in plain | looked_into if kind.startswith(("QLinear", "Conv", "Gemm", "QGemm", "MatMul"))]
    assert kernels
    assert {kind: plain[kind] for kind in kernels} == {kind: looked_into[kind] for kind in kernels}


def test_what_is_seen_of_an_fp32_network_is_what_torch_computes() -> None:
    network, builder, images = made("tiny")
    (file,) = artifact(builder, network, "fp32").stages
    taps = {tap.name: tap.tensor for tap in find_taps(file)}
    model, found = with_taps(file, taps.values())
    tensors = OnnxRuntime().tensors(model)(images)
    with torch.no_grad():
        stem = network.trunk.stem(torch.from_numpy(images))
        joined = network.trunk.join(network.trunk.outer(network.trunk.inner(stem)) + stem)
    np.testing.assert_allclose(tensors[found[taps["stem.0"]]], stem.numpy(), atol=1e-5)
    np.testing.assert_allclose(tensors[found[taps["Add"]]], joined.numpy(), atol=1e-5)


def test_half_precision_is_rounded_between_layers_and_other_files_stay_as_they_are() -> None:
    network, builder, images = made("tiny")
    for precision in ("fp32", "int8"):
        (file,) = artifact(builder, network, precision).deployed
        assert rounded_halves(file) == file
        assert not has_halves(file)
    (file,) = artifact(builder, network, "fp16").deployed
    assert has_halves(file)
    (tap,) = [tap for tap in find_taps(artifact(builder, network, "fp32").stages[0]) if tap.name == "stem.0"]
    model, found = with_taps(file, [tap.tensor])
    seen = OnnxRuntime().tensors(model)(images)[found[tap.tensor]]
    np.testing.assert_array_equal(seen, seen.astype(np.float16).astype(np.float32))


def test_a_file_of_half_precision_inputs_is_fed_with_them() -> None:
    half = TensorProto.FLOAT16
    infos = [helper.make_tensor_value_info(name, half, ["n", 3]) for name in ("in", "out")]
    graph = helper.make_graph([helper.make_node("Relu", ["in"], ["out"])], "half", infos[:1], infos[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    images = np.array([[-1, 0.1, 70000]], np.float32)
    np.testing.assert_array_equal(OnnxRuntime().tensors(model)(images)["out"], [[0, np.float16(0.1), np.inf]])


@pytest.mark.parametrize("content", [b"", b"no onnx", b"\x08\x08"])
def test_what_is_no_network_is_refused_in_a_line(content: bytes) -> None:
    with pytest.raises(FileError, match="valid ONNX file"):
        parsed(content)
