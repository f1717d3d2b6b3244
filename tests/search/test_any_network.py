"""Any network: what can be cut is cut exactly, what cannot stays whole and says why."""

import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from evaluators.artifact_builder import ArtifactBuilder
from evaluators.graph.exporter import ExportError, export_structure
from evaluators.runtimes.onnxruntime_cpu import OnnxRuntime, load
from search.pipeline.given_network import fingerprint_of
from spaces.candidate import Candidate
from spaces.dynamic.exit_network import ExitHead, ExitNetwork, feature_channels
from spaces.pruning.groups import Groups
from spaces.pruning.prunable import find_groups
from spaces.pruning.slicing import sliced
from studies.cifar10.model import resnet20
from tests.helpers import tiny, zoo
from tests.helpers.tiny import sparsity_space

IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(3))
TRAINED = Path(__file__).parent.parent.parent.parent / "shared" / "data" / "resnet20-cifar10jpeg.pt"


@cache
def made(name: str) -> tuple[ExitNetwork, ArtifactBuilder, Groups]:
    network = ExitNetwork(zoo.build(name), [], []).eval()
    builder = ArtifactBuilder(network, IMAGES.numpy(), OnnxRuntime())
    return network, builder, find_groups(network, IMAGES[:1], builder.disagreement)


def answers(builder: ArtifactBuilder, network: ExitNetwork, precision: str) -> np.ndarray:
    candidate = Candidate({}, dict.fromkeys(builder.layers, precision))
    return load(builder.build(network, candidate).deployed[0], 1)(IMAGES.numpy())[0]


FREE = {
    "option-a": {"body.0.inner.0", "body.1.inner.0"},
    "shuffle": {"body.0.branch.0.0", "body.1.branch.0.0"},
    "grouped": {"stem.0", "body.0.0", "body.2.0"},
    "concat": {"stem.0", "body.layers.0", "body.layers.1", "body.layers.2"},
    "squeeze-excite": {"stem.0", "body.expand.0", "body.reduce", "body.project"},
    "tokens": {"body.0.mlp.0", "body.1.0"},
    "twice": {"stem.0", "body.1.0"},
    "head": {"stem.0", "hidden"},
    "padding": {"stem.0", "body.0.0", "body.1.0", "body.2.0"},
}


@pytest.mark.parametrize("name", FREE)
def test_what_can_be_cut_is_found(name: str) -> None:
    _, _, groups = made(name)
    assert {group.name for group in groups.free} == FREE[name]


@pytest.mark.parametrize(
    ("name", "reason"),
    [("option-a", "by fixed numbers"), ("shuffle", "unevenly"), ("tokens", "LayerNorm")],
)
def test_what_stays_whole_says_why(name: str, reason: str) -> None:
    groups = made(name)[2]
    assert groups.whole
    assert all(re.search(reason, group.reason) for group in groups.whole)
    assert sum(groups.reasons.values()) == len(groups.whole)
    assert f"{len(groups.whole)} stay whole" in str(groups)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(FREE)))
def test_any_slice_answers_as_torch_does(data: st.DataObject, name: str) -> None:
    network, builder, groups = made(name)
    kept = {
        group.name: np.array(sorted(data.draw(st.sets(st.integers(0, group.channels - 1), min_size=1))))
        for group in groups.free
    }
    smaller = sliced(network, groups.free, kept)
    with torch.no_grad():
        expected = smaller(IMAGES)[-1].numpy()
    np.testing.assert_allclose(answers(builder, smaller, "fp32"), expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", FREE)
def test_int8_stays_close(name: str) -> None:
    network, builder, _ = made(name)
    exact, rounded = answers(builder, network, "fp32"), answers(builder, network, "int8")
    assert 0 < np.square(rounded - exact).sum() < 0.01 * np.square(exact).sum()


def test_linear_layers_on_tokens_can_be_int8() -> None:
    network, builder, _ = made("tokens")
    assert {"body.0.mlp.0", "body.0.mlp.2"} <= set(builder.layers)
    written = builder.build(network, Candidate({}, {"body.0.mlp.0": "int8"})).stages[0]
    assert b"trunk.body.0.mlp.0.weight/transposed/q" in written


def test_a_layer_that_runs_twice_has_no_precision_of_its_own() -> None:
    assert "body.shared" not in made("twice")[1].layers


def test_grouped_convolutions_lose_whole_groups_in_steps_of_channels() -> None:
    network, _, groups = made("grouped")
    around = next(group for group in groups.free if group.name == "body.0.0")
    assert (around.channels, around.width) == (4, 8)
    assert sparsity_space(network, groups.free, step=8, minimum=0.25).dimensions()["channels.body.0.0"].step == 1
    smaller = sliced(network, [around], {"body.0.0": np.array([1, 3])})
    grouped = smaller.get_submodule("trunk.body.1.0")
    assert (grouped.groups, grouped.in_channels, grouped.out_channels) == (2, 16, 16)


def test_a_network_that_torch_pruning_cannot_follow_stays_whole() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return self.last(self.first(x).mean((2, 3)))

    groups = find_groups(ExitNetwork(Detached(), [], []).eval(), IMAGES[:1])
    assert not groups.free
    assert [(group.name, group.channels) for group in groups.whole] == [("first", 8)]


def test_what_cannot_be_exported_is_named() -> None:
    trunk = zoo.Classifier(nn.Sequential(zoo.conv(16, 16), nn.Sequential(zoo.Unexportable())), 16).eval()
    with pytest.raises(ExportError) as refused:
        ArtifactBuilder(ExitNetwork(trunk, [], []).eval(), IMAGES.numpy(), OnnxRuntime())
    message = str(refused.value)
    assert "'body.1.0' (Unexportable)" in message
    assert "bessel_j0" in message
    assert "\n" not in message


def test_a_graph_that_holds_the_batch_size_is_refused_without_a_word_of_the_runtimes_own(capfd) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(192, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(x.view(int(x.shape[0]), -1)) + x.new_ones(int(x.shape[0]), 1) * int(x.shape[0])

    with pytest.raises(ExportError, match="another answer"):
        ArtifactBuilder(ExitNetwork(Fixed(), [], []).eval(), IMAGES.numpy(), OnnxRuntime())
    assert capfd.readouterr() == ("", "")


def test_exits_pool_to_any_grid() -> None:
    trunk = zoo.build("squeeze-excite")
    channels = feature_channels(trunk, ["stem"], IMAGES[:1])
    torch.manual_seed(1)
    network = ExitNetwork(trunk, ["stem"], [ExitHead(channels[0], 5, 3)]).eval()
    assert ArtifactBuilder(network, IMAGES.numpy(), OnnxRuntime()).disagreement(network) is None


class CifarResNet(nn.Module):
    """The network whose trained weights lie in the shared data: option-A shortcuts throughout."""

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.stride = 1 if inputs == outputs else 2
            self.conv1 = nn.Conv2d(inputs, outputs, 3, self.stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(outputs)
            self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(outputs)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
            quarter = self.conv2.out_channels // 4
            pad = (0, 0, 0, 0, quarter, quarter)
            return (out + (x if self.stride == 1 else nn.functional.pad(x[:, :, ::2, ::2], pad))).relu()

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        widths = (16, 16, 32, 64)
        for stage in (1, 2, 3):
            first = self.Block(widths[stage - 1], widths[stage])
            rest = [self.Block(widths[stage], widths[stage]) for _ in range(2)]
            setattr(self, f"layer{stage}", nn.Sequential(first, *rest))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer3(self.layer2(self.layer1(self.bn1(self.conv1(x)).relu())))
        return self.linear(x.mean((2, 3)))


@pytest.mark.skipif(not TRAINED.is_file(), reason="needs the trained ResNet-20 of the shared data")
def test_the_trained_cifar_resnet_keeps_its_shortcuts_and_frees_its_blocks() -> None:
    trunk = CifarResNet()
    trunk.load_state_dict(torch.load(TRAINED, weights_only=True))
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    network = ExitNetwork(trunk.eval(), [], []).eval()
    builder = ArtifactBuilder(network, images.numpy(), OnnxRuntime())
    groups = find_groups(network, images[:1], builder.disagreement)
    blocks = [f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in range(3)]
    assert [group.name for group in groups.free] == blocks
    assert groups.whole


def test_a_refused_export_writes_nothing_but_its_reason(capfd) -> None:
    class Bessel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 8, 3)
            self.last = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.special.i0e(self.first(x)).mean((2, 3)))

    with pytest.raises(ExportError, match="special_i0e") as raised:
        export_structure(ExitNetwork(Bessel(), [], []).eval(), torch.randn(1, 3, 8, 8))
    assert "trunk" not in str(raised.value)
    assert capfd.readouterr() == ("", "")


def test_exits_behind_a_padded_shortcut_are_exported() -> None:
    trunk = resnet20().eval()
    heads = [ExitHead(16, 10, 4), ExitHead(32, 10, 4)]
    network = ExitNetwork(trunk, ["layer1", "layer2"], heads).eval()
    model, _ = export_structure(network, torch.randn(1, 3, 32, 32))
    assert "exit2_logits" in {output.name for output in model.graph.output}


class Normalising(nn.Module):
    """Normalises its input by constants, and blurs before it strides, as timm does; neither is in its state dict."""

    def __init__(self, mean: float = 0.5) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([mean, -0.2, 0.3]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.5, 2.0, 4.0]).view(1, 3, 1, 1), persistent=False)
        filters = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("blur", torch.outer(filters, filters).repeat(8, 1, 1, 1), persistent=False)
        self.first, self.second = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 16, 3, 1, 1)
        self.classifier = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first((x - self.mean) / self.std).relu()
        x = nn.functional.conv2d(x, self.blur, stride=2, padding=1, groups=8)
        return self.classifier(self.second(x).relu().mean((2, 3)))


def normalising(mean: float = 0.5) -> ExitNetwork:
    torch.manual_seed(0)
    return ExitNetwork(Normalising(mean), [], []).eval()


def test_buffers_outside_of_the_state_dict_keep_their_values() -> None:
    network = normalising()
    builder = ArtifactBuilder(network, IMAGES.numpy(), OnnxRuntime())
    groups = find_groups(network, IMAGES[:1], builder.disagreement)
    smaller = sliced(network, groups.free, {"second": np.arange(4)})
    with torch.no_grad():
        expected = smaller(IMAGES)[-1].numpy()
    np.testing.assert_allclose(answers(builder, smaller, "fp32"), expected, atol=1e-5)


def test_buffers_outside_of_the_state_dict_are_a_part_of_what_a_network_is() -> None:
    data = tiny.splits()
    assert fingerprint_of(normalising(), data) == fingerprint_of(normalising(), data)
    assert fingerprint_of(normalising(), data) != fingerprint_of(normalising(0.4), data)
