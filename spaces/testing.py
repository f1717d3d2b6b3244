"""What every extension of these packages has to keep, as tests: subclass a contract in a test of yours.

    class TestLargest(CriterionContract):
        name = "largest"          # as a study names it; or "mine.criteria:scores"

This module needs pytest; nothing but tests imports it. `evaluators.testing` has the contracts that need files.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from spaces.dimensions import Choice, Integer, Real, Space
from spaces.dynamic.block_gates import BLOCK_GATES
from spaces.dynamic.block_gates.base import BlockGate
from spaces.dynamic.exit_network import ExitHead, ExitNetwork
from spaces.dynamic.masks import MASKS
from spaces.dynamic.masks.base import Mask, insert_masks, masks_of, needed
from spaces.dynamic.masks.hard_gate import Noise
from spaces.dynamic.masks.residual_blocks import Site, find_sites
from spaces.pruning.criteria import CRITERIA
from spaces.pruning.criteria.base import Criterion, Evidence
from spaces.pruning.groups import ChannelGroup
from spaces.pruning.prunable import find_groups, halves
from spaces.pruning.slicing import sliced
from spaces.thresholds import Thresholds

BLOCKS = ("first", "second", "last")
"""The blocks of `SkippableNetwork` that an input may pass by."""


class TinyNetwork(nn.Module):
    """A residual block, a depthwise convolution, max pooling, and a linear layer behind a flattened feature map.

    It answers images `(n, 1, 8, 8)` with four logits, and has every kind of layer that slicing has to get right.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.inner = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU())
        self.outer = nn.Sequential(nn.Conv2d(24, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        self.join = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.depthwise = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16))
        self.pointwise = nn.Sequential(nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.shrink = nn.AdaptiveAvgPool2d(2)
        self.flatten = nn.Flatten()
        self.hidden = nn.Linear(32 * 4, 16)
        self.act = nn.ReLU()
        self.classifier = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits `(n, 4)`."""
        x = self.stem(x)
        x = self.pool(self.join(self.outer(self.inner(x)) + x))
        x = self.pointwise(self.depthwise(x))
        logits: Tensor = self.classifier(self.act(self.hidden(self.flatten(self.shrink(x)))))
        return logits


class Block(nn.Module):
    """Two convolutions around which the input passes, unless they change its shape."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Returns feature maps `(n, outputs, h, w)`."""
        out: Tensor = self.relu2(self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x))))) + self.shortcut(x))
        return out


class SkippableNetwork(nn.Module):
    """Two blocks in a row that may be skipped, one that halves the resolution, and one more; four logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.first, self.second = Block(8, 8), Block(8, 8)
        self.down, self.last = Block(8, 16, 2), Block(16, 16)
        self.pool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.classifier = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits `(n, 4)`."""
        x = self.down(self.second(self.first(self.stem(x))))
        logits: Tensor = self.classifier(self.flatten(self.pool(self.last(x))))
        return logits


def randomized(seed: int = 0) -> nn.Module:
    """Returns a `TinyNetwork` whose batch statistics are not the trivial ones, in evaluation mode."""
    torch.manual_seed(seed)
    made = TinyNetwork()
    generator = torch.Generator().manual_seed(seed)
    for norm in made.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean = torch.randn(norm.num_features, generator=generator) * 0.1
            norm.running_var = torch.rand(norm.num_features, generator=generator) + 0.5
            norm.weight.data = torch.rand(norm.num_features, generator=generator) + 0.5
            norm.bias.data = torch.randn(norm.num_features, generator=generator) * 0.1
    return made.eval()


def exit_network() -> ExitNetwork:
    """Returns a `TinyNetwork` with two exits, in evaluation mode."""
    trunk = randomized()
    torch.manual_seed(5)
    return ExitNetwork(trunk, ["pool", "pointwise"], [ExitHead(16, 4, 2), ExitHead(32, 4, 2)]).eval()


def skippable_network(seed: int = 1) -> nn.Module:
    """Returns a `SkippableNetwork` whose batch statistics are not the trivial ones, in evaluation mode."""
    torch.manual_seed(seed)
    network = SkippableNetwork().eval()
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None:
            nn.init.normal_(norm.running_mean, 0, 0.1)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return network


def gated_network(make: BlockGate) -> ExitNetwork:
    """Returns a `SkippableNetwork` with an untrained gate around each of its blocks, in evaluation mode."""
    trunk = skippable_network()
    widths = {"first": 8, "second": 8, "last": 16}
    return ExitNetwork(trunk, (), (), {block: make(channels) for block, channels in widths.items()}).eval()


def pictures(count: int, size: int = 8, seed: int = 2) -> Tensor:
    """Returns noise `(count, 1, size, size)`."""
    return torch.randn(count, 1, size, size, generator=torch.Generator().manual_seed(seed))


class CriterionContract:
    """A criterion scores all channels, again the same, and leaves the network as it was.

    `name` is that of the criterion; the fixtures may be overridden.
    """

    name: str

    @pytest.fixture
    def criterion(self) -> Criterion:
        """The criterion that is tested."""
        return CRITERIA[self.name]

    @pytest.fixture(scope="class")
    def network(self) -> ExitNetwork:
        """A network in evaluation mode."""
        return exit_network()

    @pytest.fixture(scope="class")
    def groups(self, network: ExitNetwork) -> Sequence[ChannelGroup]:
        """Its dependency groups."""
        return find_groups(network, pictures(1)).free

    @pytest.fixture(scope="class")
    def evidence(self) -> Evidence:
        """Images and classes."""
        return Evidence(pictures(40), torch.arange(40) % 4)

    def test_scores_every_channel_of_every_group(
        self, criterion: Criterion, network: ExitNetwork, groups: Sequence[ChannelGroup], evidence: Evidence
    ) -> None:
        found = criterion(network, groups, evidence)
        assert set(found) == {group.name for group in groups}
        for group in groups:
            scores = found[group.name]
            assert scores.shape == (group.channels,)
            assert (scores >= 0).all()
            assert scores.mean() == pytest.approx(1)

    def test_repeats_and_changes_nothing(
        self, criterion: Criterion, network: ExitNetwork, groups: Sequence[ChannelGroup], evidence: Evidence
    ) -> None:
        before = copy.deepcopy(network.state_dict())
        first, second = (criterion(network, groups, evidence) for _ in range(2))
        for name, scores in first.items():
            np.testing.assert_array_equal(scores, second[name])
        assert not network.training
        assert all((value == before[name]).all() for name, value in network.state_dict().items())
        assert all(parameter.grad is None for parameter in network.parameters())


class BlockGateContract:
    """A gate answers feature maps of any size with one logit, begins open, learns, and is cut with its network."""

    name: str

    @pytest.fixture
    def make(self) -> BlockGate:
        """What makes a gate."""
        torch.manual_seed(0)
        return BLOCK_GATES[self.name]

    @pytest.mark.parametrize(("channels", "size"), [(8, 16), (16, 7), (24, 1)])
    def test_answers_every_image_with_a_logit_of_its_own(self, make: BlockGate, channels: int, size: int) -> None:
        gate, features = make(channels).eval(), torch.randn(6, channels, size, size)
        with torch.no_grad():
            logits = gate(features)
            assert logits.shape == (6, 1)
            assert torch.isfinite(logits).all()
            assert torch.allclose(gate(features[4:5]), logits[4:5], atol=1e-5)

    def test_begins_by_running_most_blocks(self, make: BlockGate) -> None:
        with torch.no_grad():
            assert make(8)(torch.randn(32, 8, 8, 8)).sigmoid().mean() > 0.5

    def test_gradients_reach_every_parameter(self, make: BlockGate) -> None:
        gate = make(8).train()
        gate(torch.randn(8, 8, 8, 8)).square().sum().backward()
        assert list(gate.parameters())
        assert all(parameter.grad is not None for parameter in gate.parameters())

    def test_weights_come_back(self, make: BlockGate) -> None:
        gate, other = make(8).eval(), make(8).eval()
        other.load_state_dict(gate.state_dict())
        features = torch.randn(4, 8, 8, 8)
        assert torch.equal(gate(features), other(features))

    def test_is_cut_with_the_channels_that_it_reads(self, make: BlockGate) -> None:
        network = gated_network(make)
        groups = find_groups(network, pictures(1))
        names = [*(group.name for group in groups.free), *(group.name for group in groups.whole)]
        assert not any(name.startswith("skips.") for name in names)
        stream = next(group for group in groups.free if group.name == "stem.0")
        readers = {member.path for member in stream.members}
        assert all(any(path.startswith(f"skips.{block}.") for path in readers) for block in ("first", "second"))
        smaller = sliced(network, groups.free, halves(groups.free))
        with torch.no_grad():
            assert all(torch.isfinite(logits).all() for logits in smaller(pictures(3)))


class MaskContract(ABC):
    """A mask that is open changes nothing, one that is closed costs what its formula says, and its counts are true.

    A subclass says by which formula: `closed`, and `multiplications`, which counts them one after the other.
    """

    name: str
    images = pictures(6, size=16)

    @staticmethod
    def undecided(network: nn.Module) -> nn.Module:
        """Returns the network with gates that are of different minds about different images and places."""
        for mask in masks_of(network):
            for module in mask.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.normal_(module.weight, 0, 0.5)
                if isinstance(module, nn.Conv2d | nn.BatchNorm2d) and module.bias is not None:
                    nn.init.zeros_(module.bias)
        return network

    @abstractmethod
    def closed(self, site: Site, number: int) -> float:
        """Returns the share of a convolution that is left when all is closed."""

    @abstractmethod
    def multiplications(self, mask: Mask, number: int, image: int) -> int:
        """Returns how many multiplications a convolution needs for one image, counted one after the other."""

    @pytest.fixture
    def plain(self) -> nn.Module:
        """A residual network without masks."""
        return skippable_network()

    def masked(self, plain: nn.Module, keep: float = 0.5) -> nn.Module:
        """Returns a copy of a network with an untrained mask in each block."""
        torch.manual_seed(2)
        network = copy.deepcopy(plain)
        return insert_masks(network, find_sites(network, self.images[:1]), MASKS[self.name], keep)

    def needs(self, network: nn.Module) -> Mapping[str, Tensor]:
        """Returns the share that each image needs of each masked convolution."""
        with torch.no_grad():
            network(self.images)
        return needed(masks_of(network))

    def test_open_gates_reproduce_the_plain_network(self, plain: nn.Module) -> None:
        network = self.undecided(self.masked(plain))
        for mask in masks_of(network):
            mask.open()
        with torch.no_grad():
            assert torch.allclose(network(self.images), plain(self.images), atol=1e-6)
        assert all(torch.allclose(share, torch.ones(6)) for share in self.needs(network).values())

    def test_closed_gates_leave_the_share_that_the_formula_says(self, plain: nn.Module) -> None:
        network = self.masked(plain)
        for mask in masks_of(network):
            mask.close()
        found = self.needs(network)
        for mask in masks_of(network):
            for number, conv in enumerate(mask.site.convs):
                assert found[conv.path].tolist() == pytest.approx([self.closed(mask.site, number)] * 6)

    def test_counts_are_those_of_a_masked_convolution(self, plain: nn.Module) -> None:
        network = self.undecided(self.masked(plain))
        shares = self.needs(network)
        found = []
        for mask in masks_of(network):
            for number, conv in enumerate(mask.site.convs):
                whole = plain.get_submodule(conv.path).get_parameter("weight").numel() * conv.size[0] * conv.size[1]
                for image in (0, 3):
                    share = float(shares[conv.path][image])
                    assert share * whole == pytest.approx(self.multiplications(mask, number, image))
                    found.append(share)
        assert 0 < np.mean(found) < 1, "the test says nothing where all gates agree"

    def test_gradients_reach_the_gates(self, plain: nn.Module) -> None:
        network = self.masked(plain).train()
        for mask in masks_of(network):
            for gate in mask.gates:
                gate.noise = Noise(torch.Generator().manual_seed(0))
        network(self.images).square().sum().backward()
        for mask in masks_of(network):
            gradients = [parameter.grad for parameter in mask.parameters()]
            assert all(gradient is not None for gradient in gradients)
            assert any(gradient is not None and bool(gradient.abs().sum() > 0) for gradient in gradients)

    def test_a_copy_has_masks_of_its_own(self, plain: nn.Module) -> None:
        network = self.undecided(self.masked(plain))
        with torch.no_grad():
            before = network(self.images)
            other = copy.deepcopy(network)
            for mask in masks_of(other):
                mask.close()
            changed = other(self.images)
            assert torch.equal(network(self.images), before)
        assert not torch.allclose(changed, before)

    def test_weights_come_back(self, plain: nn.Module) -> None:
        network, other = self.undecided(self.masked(plain)), self.masked(plain)
        other.load_state_dict(network.state_dict())
        with torch.no_grad():
            assert torch.equal(other(self.images), network(self.images))

    def test_a_higher_threshold_opens_less(self, plain: nn.Module) -> None:
        if not MASKS[self.name].moves:
            pytest.skip("this method has no threshold to move")
        network, means = self.undecided(self.masked(plain)), []
        for threshold in (-100.0, 0.0, 100.0):
            for mask in masks_of(network):
                mask.move(threshold)
            means.append(float(torch.stack(list(self.needs(network).values())).mean()))
        assert means[0] > means[1] > means[2]


class SpaceContract:
    """A space reads every corner of its dimensions into its part of a candidate.

    A subclass has the fixture `part`, the space that is tested.
    """

    def test_names_are_prefixed_and_ranges_are_not_empty(self, part: Space) -> None:
        for name, dimension in part.dimensions().items():
            assert "." in name
            assert isinstance(dimension, Integer | Real | Choice)
            if isinstance(dimension, Choice):
                assert len(dimension.choices) > 1
            else:
                assert dimension.low < dimension.high

    @pytest.mark.parametrize("end", ["low", "high"])
    def test_reads_both_ends(self, part: Space, end: str) -> None:
        values = {
            name: dimension.choices[0 if end == "low" else -1]
            if isinstance(dimension, Choice)
            else getattr(dimension, end)
            for name, dimension in part.dimensions().items()
        }
        read = part.read(values)
        found = read.to_dict() if isinstance(read, Thresholds) else read
        assert {name.split(".", 1)[1] for name in values} <= set(found)
        for name, value in values.items():
            assert found[name.split(".", 1)[1]] == value

    def test_a_missing_value_is_an_error(self, part: Space) -> None:
        with pytest.raises(KeyError):
            part.read({})
