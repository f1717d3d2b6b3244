"""AdaRound: what a layer's weights are rounded to, when it is learned, and that it is kept."""

import numpy as np
import pytest
import torch
from torch import nn

from evaluators.artifact_builder import ArtifactBuilder
from evaluators.graph.template import Template
from evaluators.quantization.adaround import Learning, LinearProblem, learned_steps, patches, rectified_sigmoid
from evaluators.quantization.scheme import Scheme
from evaluators.runtimes.onnxruntime_cpu import OnnxRuntime
from search.config.study import FinetuneSection, Study
from search.pipeline.pipeline import build_pipeline
from spaces.candidate import Candidate
from spaces.dynamic.exit_network import ExitNetwork
from spaces.thresholds import Thresholds
from tests.helpers import tiny
from tests.helpers.digit_network import digits, trained


def problem(bits: int, groups: int = 1) -> LinearProblem:
    """Returns a layer of 24 correlated inputs and 8 outputs."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(groups, 24, 24, generator=generator)
    inputs = (torch.randn(groups, 2000, 24, generator=generator) @ mixing).clamp(min=0)
    weight, bias = torch.randn(groups, 8, 24, generator=generator), torch.randn(groups, 1, 8, generator=generator)
    limit = 2 ** (bits - 1) - 1
    scale = weight.abs().amax(dim=2, keepdim=True) / limit
    targets = (inputs @ weight.transpose(1, 2) + bias).clamp(min=0)
    return LinearProblem(inputs, targets, weight, scale, bias, (0.0, np.inf), limit)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("groups", [1, 3])
def test_learned_steps_keep_the_answers_better_than_the_nearest(bits: int, groups: int) -> None:
    layer = problem(bits, groups)
    found = learned_steps(layer, Learning(steps=400))
    assert (found == found.round()).all()
    assert found.abs().max() <= layer.limit
    assert (found - layer.weight / layer.scale).abs().max() < 1.001
    assert layer.error(found) < 0.8 * layer.error(layer.nearest)


def test_without_learning_the_nearest_steps_are_kept() -> None:
    layer = problem(4)
    assert (learned_steps(layer, Learning(steps=0)) == layer.nearest).all()


def test_the_rectified_sigmoid_reaches_both_ends() -> None:
    found = rectified_sigmoid(torch.tensor([-9.0, 0.0, 9.0]))
    assert found.tolist() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, padding=1, stride=2),
        nn.Conv2d(4, 8, (3, 1), padding=(1, 0), groups=2, dilation=(2, 1)),
        nn.Conv2d(4, 4, 3, groups=4),
    ],
)
def test_patches_times_the_weight_are_the_convolution(layer: nn.Conv2d) -> None:
    torch.manual_seed(0)
    network = ExitNetwork(nn.Sequential(layer, nn.Flatten()), [], []).eval()
    images = torch.randn(3, 4, 7, 7)
    node = next(node for node in Template(network, images[:1]).nodes if node.op_type == "Conv")
    weight = layer.weight.detach()
    rows = patches(node, tuple(weight.shape), [images.numpy()])
    matrix = weight.reshape(len(rows), len(weight) // len(rows), -1)
    products = (rows @ matrix.transpose(1, 2)).transpose(0, 1).reshape(-1, len(weight)) + layer.bias.detach()
    with torch.no_grad():
        expected = layer(images).permute(0, 2, 3, 1).reshape(-1, len(weight))
    order, wanted = (values[:, 0].argsort() for values in (products, expected))
    torch.testing.assert_close(products[order], expected[wanted], rtol=1e-4, atol=1e-5)


def test_a_network_is_rounded_layer_by_layer_onto_the_grid_that_it_has() -> None:
    network, images = trained(), digits()[1].images[:32]
    builder = ArtifactBuilder(network, images, OnnxRuntime())
    candidate = Candidate({}, dict.fromkeys(builder.layers, "int8"), Thresholds({"exit1": None}))
    told: list[tuple[int, int]] = []
    learning = Learning(steps=60)
    grids = builder.learn_rounding(network, candidate, images, learning, None, lambda *done: told.append(done))
    assert len(grids) == sum(not layer.startswith("exits.") for layer in builder.layers)  # heads answer in float
    assert told[-1] == (len(grids), len(grids))
    weights = Template(network, torch.from_numpy(images[:1])).weights(network.state_dict())
    for name, grid in grids.items():
        restored = grid.values * grid.scale.reshape(-1, *[1] * (grid.values.ndim - 1))
        assert restored.shape == weights[name].shape
        step = grid.scale.reshape(-1, *[1] * (grid.values.ndim - 1))
        assert (np.abs(restored - weights[name]) <= 1.001 * step).all()
    plain, learned = builder.build(network, candidate), builder.build(network, candidate, grids=grids)
    assert plain.stages != learned.stages
    assert plain.size == learned.size


def test_it_is_learned_once_for_whole_networks_and_for_pruned_ones_only_in_full(cache, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DEPLOYFRONT_CACHE", str(tmp_path))
    text = tiny.STUDY + 'quantization = {rounding = "adaround", rounding_steps = 20}\n'
    steps: list[str] = []
    pipeline = build_pipeline(Study.parse(text, "test"), lambda step, done, total: steps.append(step))
    learning, more = "Learning how to round weights", FinetuneSection(steps=2)
    whole, pruned = (pipeline.space.candidate(pipeline.space.uniform(kept, "int8")) for kept in (1.0, 0.5))
    assert pipeline.compressor.plan(whole).effort == "as given + adaround"
    assert pipeline.compressor.plan(pruned).effort == "bn"
    assert pipeline.compressor.plan(pruned, more).effort == "bn + finetune 2 steps + adaround"
    assert pipeline.compressor.plan(pipeline.space.dense()).effort == "as given"

    def artifact(candidate: Candidate, finetune: FinetuneSection | None = None) -> tuple[str, bool]:
        steps.clear()
        return pipeline.deployed(candidate, finetune).artifact.digest, learning in steps

    first, learned = artifact(whole)
    assert learned
    assert artifact(whole) == (first, False)
    assert not artifact(pruned)[1]
    tuned, learned = artifact(pruned, more)
    assert learned
    again = build_pipeline(Study.parse(text, "test"), lambda step, done, total: steps.append(step))
    steps.clear()
    assert again.deployed(whole).artifact.digest == first
    assert again.deployed(pruned, more).artifact.digest == tuned
    assert learning not in steps


def test_the_scheme_of_a_study_is_the_builders() -> None:
    text = tiny.STUDY + 'quantization = {rounding = "adaround"}\n'
    section = Study.parse(text, "test").quantization
    assert Scheme(**section.model_dump()) == Scheme(rounding="adaround")
