"""Masks of every kind: open they change nothing, closed they cost what the formula says, and counts are true."""

import itertools

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

from evaluators.flops.masked import MaskedFlops, measure_need
from evaluators.testing import MaskFileContract
from spaces.dynamic.masks import MASKS
from spaces.dynamic.masks.base import Mask, each_opened, masks_of, needed
from spaces.dynamic.masks.hard_gate import Gate, Noise
from spaces.dynamic.masks.residual_blocks import Conv, Site, find_sites
from spaces.errors import StructureError
from spaces.testing import skippable_network

IMAGES = MaskFileContract.images


@pytest.fixture
def plain() -> nn.Module:
    return skippable_network()


def full(conv: Conv, kernel: int = 3) -> int:
    return kernel * kernel * conv.inputs


def places(size: tuple[int, int]) -> itertools.product:
    return itertools.product(range(size[0]), range(size[1]))


def at(tiles: Tensor, size: tuple[int, int], row: int, column: int) -> bool:
    """Returns whether the tile that a position lies in is open."""
    height, width = tiles.shape[-2:]
    return bool(tiles[row * height // size[0], column * width // size[1]] > 0)


class TestDgnet(MaskFileContract):
    name = "dgnet"

    def closed(self, site: Site, number: int) -> float:
        return 0.0

    def multiplications(self, mask: Mask, number: int, image: int) -> int:
        conv, tiles = mask.site.convs[number], mask._tiles[image, 0]
        hidden = mask._hidden[0][image].flatten().tolist()
        reads = hidden if number else [1.0] * conv.inputs
        gives = [1.0] * conv.outputs if number else hidden
        count = 0
        for row, column in places(conv.size):
            for given, read in itertools.product(gives, reads):
                count += 9 if at(tiles, conv.size, row, column) and given and read else 0
        return count


class TestDynconv(MaskFileContract):
    name = "dynconv"

    def closed(self, site: Site, number: int) -> float:
        return 0.0

    def multiplications(self, mask: Mask, number: int, image: int) -> int:
        conv, positions = mask.site.convs[number], mask._positions[image, 0]
        wanted = {(row, column) for row, column in places(mask.site.size) if positions[row, column] > 0}
        if number == 0:  # where the second convolution, three by three and padded by one, reads
            near = list(itertools.product((-1, 0, 1), (-1, 0, 1)))
            read = {(row + down, column + right) for row, column in wanted for down, right in near}
            wanted = {(row, column) for row, column in read if 0 <= row < conv.size[0] and 0 <= column < conv.size[1]}
        return len(wanted) * full(conv) * conv.outputs


class TestCgnet(MaskFileContract):
    name = "cgnet"

    @staticmethod
    def undecided(network: nn.Module) -> nn.Module:
        for mask in masks_of(network):
            for sums in mask.sums:
                nn.init.normal_(sums.norm.bias, 0, 1)
        return network

    def closed(self, site: Site, number: int) -> float:
        return 0.25

    def multiplications(self, mask: Mask, number: int, image: int) -> int:
        conv = mask.site.convs[number]
        opened = round(float(mask.opened[f"sums{number}"][image]) * conv.outputs * conv.size[0] * conv.size[1])
        outputs = conv.outputs * conv.size[0] * conv.size[1]
        base = conv.inputs // 4
        return outputs * 9 * base + opened * 9 * (conv.inputs - base)


class TestLccl(MaskFileContract):
    name = "lccl"

    @staticmethod
    def undecided(network: nn.Module) -> nn.Module:
        for mask in masks_of(network):
            for layer in mask.beside:
                nn.init.zeros_(layer.norm.bias)
        return network

    def closed(self, site: Site, number: int) -> float:
        return 0.0

    def multiplications(self, mask: Mask, number: int, image: int) -> int:
        conv = mask.site.convs[number]
        outputs = conv.outputs * conv.size[0] * conv.size[1]
        return round(float(mask.opened[f"outputs{number}"][image]) * outputs) * full(conv)

    def test_what_is_counted_as_zero_is_zero(self, plain: nn.Module) -> None:
        network = self.undecided(self.masked(plain))
        seen: dict[str, Tensor] = {}
        masks = masks_of(network)
        for mask in masks:
            for conv in mask.site.convs:
                network.get_submodule(conv.path).register_forward_hook(
                    lambda _module, _args, out, path=conv.path: seen.__setitem__(path, out)
                )
        with torch.no_grad():
            network(IMAGES)
        for path, share in needed(masks).items():
            nonzero = (seen[path] != 0).flatten(1).float().mean(dim=1)
            assert (nonzero <= share + 1e-6).all()
            assert (nonzero >= share - 0.02).all(), "a convolution without bias gives a few zeros of its own"

    def test_an_output_that_is_open_rarely_is_closed_for_good(self, plain: nn.Module) -> None:
        network = self.undecided(self.masked(plain)).train()
        layers = [layer for mask in masks_of(network) for layer in mask.beside]
        with torch.no_grad():
            layers[0].norm.bias[2] = -20.0
            for _ in range(250):
                network(IMAGES)
        for mask in masks_of(network):
            mask.go_on(0.99)
        assert float(layers[0].norm.bias[2]) == -20.0
        for mask in masks_of(network):
            mask.go_on(1.0)
        shut = [(layer.norm.weight == 0).nonzero().flatten().tolist() for layer in layers]
        assert shut[0] == [2]
        assert not any(shut[1:])

    def test_values_end_at_1(self, plain: nn.Module) -> None:
        network = self.undecided(self.masked(plain))
        for mask in masks_of(network):
            for layer, conv in zip(mask.beside, mask.site.convs, strict=True):
                values, opened = layer(10 * torch.randn(4, conv.inputs, *conv.source))
                assert float(values.max()) == 1.0
                assert torch.equal(values > 0, opened > 0)


class TestDgc(MaskFileContract):
    name = "dgc"

    def closed(self, site: Site, number: int) -> float:
        return 1 / site.convs[number].inputs

    def multiplications(self, mask: Mask, number: int, image: int) -> int:
        conv = mask.site.convs[number]
        kept = round(0.5 * conv.inputs)
        return sum(9 * kept for _ in itertools.product(places(conv.size), range(conv.outputs)))

    def test_each_head_reads_so_many_channels(self, plain: nn.Module) -> None:
        network = self.masked(plain)
        site = masks_of(network)[0].site
        read: list[Tensor] = []
        network.get_submodule(site.convs[0].path).register_forward_hook(lambda _m, args, _out: read.append(args[0]))
        with torch.no_grad():
            network(IMAGES)
        heads = read[0].unflatten(1, (4, site.convs[0].inputs))
        assert ((heads != 0).any(dim=(3, 4)).sum(dim=2) <= round(0.5 * site.convs[0].inputs)).all()


def test_every_method_has_a_contract() -> None:
    assert set(MASKS) <= {each.name for each in MaskFileContract.__subclasses__()}


def test_a_gate_is_hard_and_its_gradient_soft() -> None:
    logits = torch.tensor([-2.0, -0.1, 0.0, 3.0], requires_grad=True)
    opened = Gate(temperature=2.0).eval()(logits)
    assert opened.tolist() == [0, 0, 1, 1]
    opened.sum().backward()
    soft = torch.sigmoid(logits.detach() / 2.0)
    assert logits.grad is not None
    assert torch.allclose(logits.grad, soft * (1 - soft) / 2.0)


def test_noise_opens_a_gate_as_often_as_its_logit_says() -> None:
    gate = Gate().train()
    gate.noise = Noise(torch.Generator().manual_seed(0))
    assert float(gate(torch.full((40_000,), 1.0)).mean()) == pytest.approx(1 / (1 + np.exp(-1.0)), abs=0.01)
    gate.noise.strength = 0.0
    assert gate(torch.full((10,), 0.1)).tolist() == [1.0] * 10


@pytest.mark.parametrize(
    ("name", "blocks", "convs"), [("resnet18", 8, 2), ("resnet50", 16, 3), ("mobilenet_v2", 10, 3)]
)
def test_residual_blocks_of_known_networks_are_found(name: str, blocks: int, convs: int) -> None:
    network = torchvision.models.get_model(name).eval()
    sites = find_sites(network, torch.zeros(1, 3, 64, 64))
    assert len(sites) == blocks
    assert {len(site.convs) for site in sites} == {convs}


def test_a_network_without_residual_blocks_is_refused() -> None:
    with pytest.raises(StructureError, match="without any"):
        find_sites(torchvision.models.get_model("vgg11").eval(), torch.zeros(1, 3, 64, 64))


def test_a_block_that_is_none_is_refused(plain: nn.Module) -> None:
    with pytest.raises(StructureError, match="got 'stem'; able: first, second, down, last"):
        find_sites(plain, IMAGES[:1], ["stem"])


def test_every_image_has_flops_of_its_own(plain: nn.Module) -> None:
    network = TestDgnet.undecided(TestDgnet().masked(plain))
    need = measure_need(network, MaskedFlops(plain, network, IMAGES[:1]), IMAGES.numpy())
    assert need.flops.shape == (6,)
    assert need.flops.std() > 0
    assert need.answers.tolist() == network(IMAGES).argmax(dim=1).tolist()
    assert set(need.opened) == {f"{mask.site.block} {kind}" for mask, kind, _ in each_opened(masks_of(network))}
