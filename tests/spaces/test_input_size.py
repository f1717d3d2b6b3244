import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from spaces.candidate import Candidate
from spaces.depth import shortened
from spaces.dynamic.exit_network import ExitNetwork, resized
from spaces.input_size import InputSizeSpace, at_size, automatic_sizes, usable_sizes
from spaces.testing import SpaceContract, skippable_network


class TestSizes(SpaceContract):
    @pytest.fixture
    def part(self) -> InputSizeSpace:
        return InputSizeSpace((16, 24, 32))


@pytest.mark.parametrize(
    ("own", "sizes"), [(224, (128, 160, 224)), (48, (24, 32, 48)), (32, (16, 24, 32)), (28, (16, 20, 28))]
)
def test_automatic_sizes_go_down_to_about_half_in_steps(own: int, sizes: tuple[int, ...]) -> None:
    assert automatic_sizes(own) == sizes


@given(st.integers(8, 512))
def test_automatic_sizes_rise_to_the_images_own(own: int) -> None:
    sizes = automatic_sizes(own)
    assert sizes[-1] == own
    assert list(sizes) == sorted(set(sizes))
    assert 0.4 * own <= sizes[0] < own


def test_one_size_is_no_choice() -> None:
    assert InputSizeSpace((32,)).dimensions() == {}
    assert InputSizeSpace((32,)).size({}) is None


def test_the_images_own_size_is_no_size_of_a_candidate() -> None:
    space = InputSizeSpace((16, 32))
    assert space.size({"input.size": "32"}) is None
    assert space.size({"input.size": "16"}) == 16
    assert "input_size" not in Candidate({}, {}).to_dict()
    assert Candidate({}, {}, input_size=16).key != Candidate({}, {}).key
    assert Candidate.from_dict(Candidate({}, {}, input_size=16).to_dict()).input_size == 16


def test_a_network_that_pools_globally_runs_at_smaller_sizes() -> None:
    network, image = ExitNetwork(skippable_network(), [], []).eval(), torch.randn(1, 1, 16, 16)
    assert usable_sizes(network, image, (8, 12)) == (8, 12, 16)
    assert usable_sizes(network, image, (8, 12), lambda version: version.input_size == 12 or None) == (8, 16)


def test_a_classifier_of_fixed_size_or_an_oblong_image_allows_no_other() -> None:
    fixed = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 16 * 16, 3))
    assert usable_sizes(ExitNetwork(fixed, [], []).eval(), torch.randn(1, 1, 16, 16), (8,)) == (16,)
    pooled = ExitNetwork(skippable_network(), [], []).eval()
    assert usable_sizes(pooled, torch.randn(1, 1, 8, 16), (8,)) == (16,)


def test_a_version_resizes_its_images_and_shares_the_weights() -> None:
    network, images = ExitNetwork(skippable_network(), [], []).eval(), torch.randn(4, 1, 16, 16)
    smaller = at_size(network, 8)
    with torch.no_grad():
        (expected,) = network(resized(images, 8))
        (found,) = smaller(images)
    assert torch.equal(found, expected)
    assert network.input_size is None
    assert all(one is other for one, other in zip(network.parameters(), smaller.parameters(), strict=True))
    assert shortened(smaller, ["first"]).input_size == 8
