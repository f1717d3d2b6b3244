"""Cut points: one tensor that separates the network, told by autograd."""

import pytest
import torch
from torch import Tensor, nn

from spaces.dynamic.cut_points import EARLIEST, LATEST, check_cut_points, find_cut_points
from spaces.errors import StructureError
from studies.digits.model import resnet20
from tests.helpers import tiny, zoo

IMAGE = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def chain(*blocks: nn.Module) -> nn.Module:
    return zoo.Classifier(nn.Sequential(*blocks), 16).eval()


def test_exits_go_to_the_ends_of_stages_near_the_shares() -> None:
    found = find_cut_points(resnet20().eval(), torch.randn(1, 1, 32, 32), (1 / 3, 2 / 3))
    assert found.after == ("stage1", "stage2")
    assert found.shares == pytest.approx((1 / 3, 2 / 3), abs=0.05)
    assert not found.reason


def test_the_share_is_that_of_the_multiply_adds_so_far() -> None:
    found = find_cut_points(chain(*(zoo.conv(16, 16) for _ in range(4))), IMAGE, (0.5,))
    stem, block = 3 * 16 * 9 * 256, 16 * 16 * 9 * 256
    assert found.after == ("body.1",)
    assert found.shares == pytest.approx([(stem + 2 * block) / (stem + 4 * block + 16 * 5)])


def test_nothing_inside_a_residual_block_is_a_cut_point() -> None:
    trunk = tiny.randomized()
    with pytest.raises(StructureError, match="got 'inner', which is bypassed"):
        check_cut_points(trunk, torch.randn(1, 1, 8, 8), ["inner"])
    assert check_cut_points(trunk, torch.randn(1, 1, 8, 8), ["pool"]).after == ("pool",)
    for share in (0.2, 0.4, 0.6, 0.8):
        assert not {"inner", "outer"} & set(find_cut_points(trunk, torch.randn(1, 1, 8, 8), (share,)).after)


class Long(nn.Module):
    """The image itself comes back at the end, so that nothing separates it from the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(zoo.conv(3, 3) for _ in range(3)))
        self.last = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.layers(x) + x).mean((2, 3)))


def test_a_network_without_cut_points_says_so() -> None:
    found = find_cut_points(Long().eval(), IMAGE, (1 / 3, 2 / 3))
    assert found.after == ()
    assert "0 of 2" in str(found)


class Halves(nn.Module):
    """Gives one half of its channels; the other half goes around through an attribute."""

    def forward(self, x: Tensor) -> Tensor:
        kept, self.other = x.chunk(2, 1)
        return kept


class Rejoined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.halves, self.last = zoo.conv(3, 16), Halves(), zoo.conv(16, 16)
        self.classifier = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        half = self.halves(self.stem(x))
        return self.classifier(self.last(torch.cat([half, self.halves.other], 1)).mean((2, 3)))


def test_one_output_of_several_does_not_stand_for_the_others() -> None:
    with pytest.raises(StructureError, match="bypassed"):
        check_cut_points(Rejoined().eval(), IMAGE, ["halves"])
    assert check_cut_points(Rejoined().eval(), IMAGE, ["stem"]).after == ("stem",)


class Repeated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.again, self.classifier = zoo.conv(3, 16), zoo.conv(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.again(self.again(self.again(self.stem(x)))).mean((2, 3)))


def test_a_module_that_runs_more_than_once_is_no_place() -> None:
    found = find_cut_points(Repeated().eval(), IMAGE, (1 / 3, 2 / 3))
    assert not any(path.startswith("again") for path in found.after)


def test_frozen_weights_and_in_place_activations_do_not_matter() -> None:
    trunk = chain(*(zoo.conv(16, 16) for _ in range(6)))
    free = find_cut_points(trunk, IMAGE, (1 / 3, 2 / 3))
    found = find_cut_points(trunk.requires_grad_(False), IMAGE, (1 / 3, 2 / 3))
    assert found == free
    assert len(set(found.after)) == 2
    assert all(EARLIEST <= share <= LATEST for share in found.shares)
    assert all(parameter.grad is None for parameter in trunk.parameters())


def test_no_two_exits_share_a_place() -> None:
    found = find_cut_points(chain(*(zoo.conv(16, 16) for _ in range(3))), IMAGE, (0.5, 0.5, 0.5, 0.5, 0.5))
    assert len(found.after) == len(set(found.after))
