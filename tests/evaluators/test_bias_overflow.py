"""Channels that have died: next to no weights, but a bias that integers of 32 bits cannot hold at their scale."""

import numpy as np
import pytest
import torch
from torch import nn

from evaluators.artifact_builder import ArtifactBuilder
from evaluators.quantization.int8 import QuantizedWeight, with_room_for_bias
from evaluators.quantization.scheme import Scheme
from evaluators.runtimes.base import Runtime
from evaluators.runtimes.onnxruntime_cpu import OnnxRuntime
from spaces.candidate import Candidate
from spaces.dynamic.exit_network import ExitNetwork


def dying() -> ExitNetwork:
    """Returns a network of whose second convolution half of the filters have died: a norm's shift is what is left."""
    torch.manual_seed(0)
    trunk = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, 1, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip
    with torch.no_grad():
        trunk[4].weight[:8] = torch.tensor([0.0, 1e-8, 1e-7, 1e-6] * 2)
        trunk[4].bias[:8] = torch.linspace(0.5, 3.0, 8)
    return ExitNetwork(trunk, [], []).eval()


def runtimes() -> list[Runtime]:
    from importlib.util import find_spec

    found: list[Runtime] = [OnnxRuntime()]
    if find_spec("openvino"):
        from evaluators.runtimes.openvino_cpu import OpenVino

        found.append(OpenVino())
    return found


@pytest.mark.parametrize("runtime", runtimes(), ids=lambda runtime: type(runtime).__name__)
@pytest.mark.parametrize("weights", ["per-channel", "per-tensor"])
@pytest.mark.parametrize("empty", [False, True], ids=["noise", "nothing"])
def test_int8_answers_as_float_where_channels_have_died(runtime: Runtime, weights: str, empty: bool) -> None:
    network = dying()
    images = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * (0 if empty else 1)
    builder = ArtifactBuilder(network, images.numpy(), runtime, scheme=Scheme(weights=weights))
    artifact = builder.build(network, Candidate({}, dict.fromkeys(builder.layers, "int8")))
    with torch.no_grad():
        expected = network(images)[-1].numpy()
    (stage,) = artifact.deployed
    answers = np.asarray(runtime.load(stage, 1)(images.numpy())[0])
    assert np.abs(answers - expected).max() < 0.05 * np.abs(expected).max()


def test_a_scale_is_raised_where_its_bias_needs_it_and_nowhere_else() -> None:
    grid = QuantizedWeight(np.array([[100, -3], [100, -3]], dtype=np.int8), np.array([1e-3, 1e-9], dtype=np.float32))
    raised = with_room_for_bias(grid, np.array([2.0, 2.0]), 0.01, axis=0)
    assert raised.scale[0] == grid.scale[0]
    assert (raised.values[0] == grid.values[0]).all()
    assert abs(2.0 / (0.01 * raised.scale[1])) <= 2**29
    before, after = (each.values[1] * each.scale[1].astype(float) for each in (grid, raised))
    assert np.abs(before - after).max() <= raised.scale[1] / 2, "rounded to the new levels"
    assert with_room_for_bias(grid, np.zeros(2), 0.01, axis=0) is grid


def test_channels_that_share_a_scale_go_on_sharing_it() -> None:
    grid = QuantizedWeight(np.zeros((2, 3), dtype=np.int8), np.full(2, 1e-8, dtype=np.float32))
    raised = with_room_for_bias(grid, np.array([0.0, 5.0]), 0.01, axis=0, per_channel=False)
    assert raised.scale[0] == raised.scale[1] > 1e-8
