"""Quantization without images: what batch norm says, channels evened out, biases corrected."""

import copy
from dataclasses import replace
from itertools import pairwise

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from scipy.integrate import quad
from scipy.stats import norm
from torch import nn

from evaluators.artifact_builder import ArtifactBuilder
from evaluators.graph.probe import input_means
from evaluators.graph.template import Template
from evaluators.quantization.batchnorm_moments import (
    activation_moments,
    averaged,
    clipped,
    constant,
    normal,
    of_images,
    summed,
)
from evaluators.quantization.equalization import absorb, equalize, equalized, find_pairs
from evaluators.quantization.int8 import quantize_weight
from evaluators.quantization.scheme import Scheme
from evaluators.runtimes.onnxruntime_cpu import OnnxRuntime, load
from search.config.study import Study
from search.pipeline.pipeline import build_pipeline
from spaces.candidate import Candidate
from spaces.dynamic.exit_network import ExitNetwork
from spaces.errors import QuantizationError
from spaces.thresholds import Thresholds
from tests.helpers import tiny, zoo
from tests.helpers.digit_network import accuracy, digits, trained


def alone(value: float) -> np.ndarray:
    return np.array([[value]], dtype=np.float32)


def by_quadrature(function, mean: float, deviation: float) -> float:
    ends = mean - 12 * deviation, mean + 12 * deviation
    inside = [point for point in (0.0, 6.0, -1.0, 2.0) if ends[0] < point < ends[1]]
    return quad(lambda x: function(x) * norm.pdf(x, mean, deviation), *ends, points=inside or None, limit=200)[0]


@settings(max_examples=40, deadline=None)
@given(
    mean=st.floats(-8, 8),
    deviation=st.floats(0.1, 4),
    bounds=st.sampled_from([(0.0, np.inf), (0.0, 6.0), (-1.0, 2.0), (-np.inf, 2.0)]),
)
def test_moments_of_a_clipped_normal(mean: float, deviation: float, bounds: tuple[float, float]) -> None:
    found = clipped(normal(alone(mean), alone(deviation**2)), *bounds)
    first = by_quadrature(lambda x: np.clip(x, *bounds), mean, deviation)
    second = by_quadrature(lambda x: (np.clip(x, *bounds) - first) ** 2, mean, deviation)
    assert found.mean.item() == pytest.approx(first, rel=1e-4, abs=1e-4)
    assert found.variance.item() == pytest.approx(second, rel=1e-3, abs=1e-4)
    assert found.low.item() == pytest.approx(np.clip(mean - 6 * deviation, *bounds), rel=1e-4, abs=1e-4)
    assert found.high.item() == pytest.approx(np.clip(mean + 6 * deviation, *bounds), rel=1e-4, abs=1e-4)


def test_sums_means_and_constants() -> None:
    both = summed(normal(alone(1), alone(9)), normal(alone(2), alone(16)))
    assert (both.mean, both.variance, both.low, both.high) == (3, 25, 3 - 30, 3 + 30)
    moved = summed(both, constant(np.array([4.0])))
    assert (moved.mean, moved.variance, moved.low, moved.high) == (7, 25, 7 - 30, 7 + 30)
    pooled = averaged(normal(alone(1), alone(9)), 16)
    assert (pooled.mean, pooled.variance, pooled.high) == (1, 9 / 4, 1 + 18 / 2)


def test_the_input_is_as_its_images_are(images) -> None:
    found = of_images(images.numpy())
    assert found.range == (images.min().item(), images.max().item())
    assert found.mean.shape == (1, 1, 8, 8)
    assert found.channel_means == pytest.approx([images.mean().item()], abs=1e-6)


def builder(network: ExitNetwork, **scheme) -> ArtifactBuilder:
    return ArtifactBuilder(network, digits()[1].images, OnnxRuntime(), scheme=Scheme(**scheme))


def answers(network: ExitNetwork, precision: str, **scheme) -> np.ndarray:
    made = builder(network, **scheme)
    artifact = made.build(network, Candidate({}, dict.fromkeys(made.layers, precision), Thresholds({"exit1": None})))
    return load(artifact.deployed[0], 1)(digits()[2].images)[0]


def test_ranges_from_batch_norm_are_like_measured_ones() -> None:
    network = trained()
    measured, told = builder(network).ranges, builder(network, ranges="batchnorm").ranges
    assert told.keys() == measured.keys()
    for name, (low, high) in measured.items():
        if name.endswith("logits"):
            continue  # outputs stay float
        widths = max(-low, high), max(-told[name][0], told[name][1])
        assert 0.6 * widths[0] < widths[1] < 4 * widths[0], name
        assert (low == 0) == (told[name][0] == 0), name


def test_int8_without_calibration_images_is_as_good() -> None:
    network = trained()
    exact = accuracy(answers(network, "fp32"))
    assert exact > 0.95
    told = accuracy(answers(network, "int8", ranges="batchnorm", bias_correction="batchnorm"))
    assert told > exact - 0.01


def test_only_the_input_is_read_from_the_images() -> None:
    network, images = trained(), digits()[1].images
    shuffled = np.random.default_rng(0).permutation(images.reshape(len(images), -1), axis=1).reshape(images.shape)
    ranges = [
        ArtifactBuilder(network, given, OnnxRuntime(), scheme=Scheme(ranges="batchnorm")).ranges
        for given in (images, shuffled)
    ]
    assert ranges[0] == ranges[1]


@pytest.mark.parametrize(("name", "operator"), [("tokens", "LayerNormalization"), ("squeeze-excite", "HardSwish")])
def test_what_cannot_be_followed_is_named_with_the_remedy(name: str, operator: str) -> None:
    network = ExitNetwork(zoo.build(name), [], []).eval()
    images = torch.randn(6, 3, 8, 8).numpy()
    with pytest.raises(
        QuantizationError, match=rf"got {operator} at '/trunk/.*'; say \"data\" for quantization.ranges"
    ):
        ArtifactBuilder(network, images, OnnxRuntime(), scheme=Scheme(ranges="batchnorm"))


@pytest.mark.parametrize("name", ["shuffle", "concat", "grouped", "twice", "head", "option-a"])
def test_moments_follow_every_habit_that_they_can(name: str) -> None:
    network = ExitNetwork(zoo.build(name), [], []).eval()
    images = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0)).numpy()
    measured, told = (
        ArtifactBuilder(network, images, OnnxRuntime(), scheme=Scheme(ranges=way)).ranges
        for way in ("data", "batchnorm")
    )
    for tensor, (low, high) in measured.items():
        if tensor == "logits":
            continue
        ratio = max(-told[tensor][0], told[tensor][1]) / max(-low, high)
        assert 0.5 < ratio < 6, tensor


def ill(network: ExitNetwork) -> ExitNetwork:
    """Returns the same function, the weights of whose channels differ by up to six orders of magnitude."""
    sick = copy.deepcopy(network)
    trunk, generator = sick.trunk, torch.Generator().manual_seed(0)
    chain = [trunk.first, trunk.second, trunk.depthwise, trunk.pointwise]
    for before, after in [*pairwise(chain), (trunk.inner, trunk.outer)]:
        convolution, norm = after[0], before[1]
        factor = 10 ** (torch.rand(norm.num_features, generator=generator) * 6 - 3)
        norm.weight.data *= factor
        norm.bias.data *= factor
        axis = 0 if convolution.groups > 1 else 1
        convolution.weight.data /= factor.reshape([-1 if dim == axis else 1 for dim in range(4)])
    return sick


def test_the_disease_of_depthwise_networks_and_its_cure() -> None:
    network = trained()
    sick = ill(network)
    images = torch.from_numpy(digits()[2].images)
    with torch.no_grad():
        torch.testing.assert_close(sick(images)[-1], network(images)[-1], rtol=1e-3, atol=1e-3)
    exact = accuracy(answers(sick, "fp32"))
    assert accuracy(answers(sick, "int8", weights="per-tensor")) < 0.35
    # A scale for each channel of a weight is no help where the channels of activations share one.
    assert accuracy(answers(sick, "int8", weights="per-channel")) < exact - 0.1
    cured = equalized(sick, images[:1])
    assert accuracy(answers(cured, "int8", weights="per-tensor")) > exact - 0.01
    assert accuracy(answers(cured, "int8", weights="per-channel")) > exact - 0.01


def test_equalization_leaves_the_function_alone() -> None:
    network = trained()
    template, images = Template(network, torch.zeros(1, 1, 16, 16)), torch.from_numpy(digits()[2].images[:32])
    made = copy.deepcopy(network)
    made.load_state_dict(equalize(template, network.state_dict()))
    with torch.no_grad():
        for found, expected in zip(made(images), network(images), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    changed = {name for name, tensor in made.state_dict().items() if (tensor != network.state_dict()[name]).any()}
    assert "trunk.first.1.weight" in changed
    assert not any("running" in name or name.startswith("exits") for name in changed)


def test_paired_channels_have_weights_of_one_size_and_tensors_with_two_readers_are_no_pair() -> None:
    network = ill(trained())
    template = Template(network, torch.zeros(1, 1, 16, 16))
    pairs = {(pair.first.weight, pair.second.weight) for pair in find_pairs(template)}
    chain = ["first.0", "second.0", "depthwise.0", "pointwise.0"]
    wanted = [*pairwise(chain), ("inner.0", "outer.0"), ("hidden", "classifier")]
    assert pairs == {tuple(f"trunk.{name}.weight" for name in pair) for pair in wanted}
    folded = template.weights(equalize(template, network.state_dict()))
    first = np.abs(folded["trunk.inner.0.weight"]).max(axis=(1, 2, 3))
    second = np.abs(folded["trunk.outer.0.weight"]).max(axis=(0, 2, 3))
    np.testing.assert_allclose(first, second, rtol=0.01)
    hidden, classifier = (np.abs(folded[f"trunk.{name}.weight"]) for name in ("hidden", "classifier"))
    np.testing.assert_allclose(hidden.max(axis=1), classifier.max(axis=0), rtol=0.01)


class Flat(nn.Module):
    """Bounded and unbounded activations, with biases instead of batch norm, and a flattened feature map."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.first, self.act, self.pool = nn.Conv2d(1, 4, 3), activation, nn.MaxPool2d(2)
        self.flatten, self.classifier = nn.Flatten(), nn.Linear(4 * 9, 4)

    def forward(self, x):
        return self.classifier(self.flatten(self.pool(self.act(self.first(x)))))


class AtLeastZero(nn.Module):
    def forward(self, x):
        return x.clamp(min=0)


@pytest.mark.parametrize(
    ("activation", "paired"), [(nn.ReLU(), True), (nn.ReLU6(), False), (AtLeastZero(), True), (nn.LeakyReLU(), True)]
)
def test_a_bound_does_not_scale(activation: nn.Module, paired: bool, images) -> None:
    torch.manual_seed(0)
    network = ExitNetwork(Flat(activation), [], []).eval()
    network.trunk.first.weight.data *= torch.tensor([1e-3, 1.0, 1e3, 1e-2]).reshape(4, 1, 1, 1)
    template = Template(network, images[:1])
    assert bool(find_pairs(template)) == paired
    made = equalized(network, images[:1])
    with torch.no_grad():
        torch.testing.assert_close(made(images)[0], network(images)[0], rtol=1e-4, atol=1e-4)
    assert (made.trunk.first.weight != network.trunk.first.weight).any() == paired


def test_high_biases_move_behind_the_next_layer_where_no_border_is_wrong(images) -> None:
    torch.manual_seed(0)
    trunk = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    trunk[1].bias.data, trunk[4].bias.data = torch.full((8,), 5.0), torch.full((8,), 5.0)
    network = ExitNetwork(trunk, [], [])
    trunk[1].momentum = trunk[4].momentum = None
    for layer in (trunk[1], trunk[4]):
        layer.reset_running_stats()
    with torch.no_grad():
        network.train()(images)
    network.eval()
    made = copy.deepcopy(network)
    made.load_state_dict(absorb(Template(network, images[:1]), network.state_dict()))
    assert made.trunk[1].bias.tolist() == pytest.approx([3.0] * 8, abs=1e-5)  # three times gamma, which is 1
    assert made.trunk[4].bias.tolist() == [5.0] * 8, "the last convolution has a border"
    with torch.no_grad():
        found, expected = made(images)[0], network(images)[0]
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()
    assert (made.trunk[4].running_mean != network.trunk[4].running_mean).any()


def written(stage: bytes) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load_from_string(stage).graph.initializer}


def test_a_corrected_layer_has_the_mean_output_of_the_float_one() -> None:
    network, images = trained(), digits()[1].images[:64]
    made = builder(network, weights="per-tensor", bias_correction="data")
    artifact = made.build(network, Candidate({}, dict.fromkeys(made.layers, "int8"), Thresholds({"exit1": None})))
    found = written(artifact.stages[0])
    template = Template(network, torch.zeros(1, 1, 16, 16))
    stage, weights = template.layout(()).stages[0], template.weights(network.state_dict())
    means = input_means(template.file(stage, stage.nodes, weights), stage.nodes, images)
    layers = [node for node in stage.nodes if node.op_type in ("Conv", "Gemm")]
    assert len(layers) == 8
    for node in layers:
        name, bias = node.input[1:]
        scale = found[f"{name}/scale"].reshape(-1, *[1] * (weights[name].ndim - 1))
        added = _mean_output(node, found[f"{name}/q"] * scale - weights[name], means[name])
        np.testing.assert_allclose(found[f"{name}/bias"], weights[bias] - added, rtol=1e-3, atol=1e-5)
        assert np.abs(added).max() > 1e-4


def test_a_layer_without_bias_gets_one_and_learned_weights_are_corrected_too(images) -> None:
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))
    network = ExitNetwork(trunk, [], []).eval()
    name, positive = "trunk.0.weight", images.abs().numpy()
    made = ArtifactBuilder(network, positive, OnnxRuntime(), scheme=Scheme(bias_correction="data"))
    candidate = Candidate({}, {"0": "int8"})
    off = quantize_weight(trunk[0].weight.detach().numpy(), 0, 63)
    off = replace(off, values=(off.values + 1).astype(np.int8))
    plain, learned = (
        written(made.build(network, candidate, grids=grids).stages[0])[f"{name}/bias"] for grids in ({}, {name: off})
    )
    # A step too much on each of nine weights, times the mean of the only input channel.
    np.testing.assert_allclose(plain - learned, 9 * off.scale * positive.mean(), rtol=0.35)


def test_means_from_batch_norm_are_like_measured_ones() -> None:
    network, images = trained(), digits()[1].images
    template = Template(network, torch.zeros(1, 1, 16, 16))
    stage = template.layout(()).stages[0]
    file = template.file(stage, stage.nodes, template.weights(network.state_dict()))
    measured = input_means(file, stage.nodes, images)
    told = activation_moments(template, stage, network.state_dict(), images)
    for node in stage.nodes:
        if node.op_type == "Conv":
            found, expected = told[node.input[0]].channel_means, measured[node.input[1]]
            assert np.abs(found - expected).mean() < 0.25 * np.abs(expected).mean(), node.name


def _mean_output(node, weight: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Returns what torch answers to a constant input of a layer, far from its borders."""
    if node.op_type == "Gemm":
        return weight @ mean
    size = weight.shape[2]
    flat = torch.from_numpy(mean).float().reshape(1, -1, 1, 1).expand(1, -1, size, size)
    groups = len(mean) // weight.shape[1]
    return nn.functional.conv2d(flat, torch.from_numpy(weight).float(), groups=groups).flatten().numpy()


def test_in_the_runtime_the_mean_error_of_a_layer_goes_to_about_zero(images) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(1, 8, 3)
    layer.weight.data[0] *= 40  # a scale that is too wide for the others
    network, inputs = ExitNetwork(nn.Sequential(layer, nn.Flatten()), [], []).eval(), images.abs().numpy()
    with torch.no_grad():
        exact = network(torch.from_numpy(inputs))[0].numpy()

    def off(**scheme) -> np.ndarray:
        made = ArtifactBuilder(network, inputs, OnnxRuntime(), scheme=Scheme(weights="per-tensor", **scheme))
        (file,) = made.build(network, Candidate({}, {"0": "int8"})).deployed
        error = load(file, 1)(inputs)[0] - exact
        return np.abs(error.reshape(len(inputs), 8, -1).mean(axis=(0, 2)))[1:]

    assert off(bias_correction="data").mean() < 0.1 * off().mean()


def test_a_study_says_how_int8_is_made(cache) -> None:
    text = tiny.STUDY + 'quantization = {ranges = "batchnorm", equalize = true, bias_correction = "batchnorm"}\n'
    pipeline = build_pipeline(Study.parse(text, "test"), lambda *_: None)
    plain = build_pipeline(Study.parse(tiny.STUDY, "test"), lambda *_: None)
    assert pipeline.fingerprint != plain.fingerprint
    candidate = pipeline.space.candidate(pipeline.space.uniform(0.5, "int8", 0.8))
    found, expected = (there.deployed(candidate).answers.correct.mean() for there in (pipeline, plain))
    assert found > expected - 0.2  # of 40 images
