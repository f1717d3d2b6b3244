from dataclasses import replace

import numpy as np
import pytest

from search.samplers.distributions import distributions
from spaces.channels import PREFIX, SparsitySpace
from spaces.joint import JointSpace
from spaces.precision import PrecisionSpace
from spaces.pruning.prunable import find_groups
from spaces.testing import SpaceContract


class TestSparsitySpace(SpaceContract):
    @pytest.fixture
    def part(self, space: JointSpace):
        return space.sparsity


class TestPrecisionSpace(SpaceContract):
    @pytest.fixture
    def part(self, space: JointSpace):
        return space.precision


class TestGateSpace(SpaceContract):
    @pytest.fixture
    def part(self, space: JointSpace):
        return space.thresholds


def made(network, image, step: int, widest: int) -> SparsitySpace:
    groups = find_groups(network, image).free
    return SparsitySpace(groups, {group.name: np.arange(group.channels) for group in groups}, step, 0.25, widest)


def stretched(group, channels: int):
    """Returns a group as it would be with other channels: what steps depend on."""
    return replace(group, channels=channels)


@pytest.mark.parametrize(
    ("channels", "step"),
    [(16, 8), (20, 8), (24, 8), (32, 8), (64, 16), (96, 16), (100, 8), (128, 32), (144, 16), (512, 32)],
)
def test_a_group_has_the_widest_step_that_leaves_it_a_choice(network, image, channels: int, step: int) -> None:
    group = stretched(find_groups(network, image).free[0], channels)
    space = made(network, image, 8, 32)
    assert space.step(group) == step
    widths = range(space.smallest(group), channels + 1, step)
    assert widths[-1] == channels
    assert channels % step or all(width % step == 0 for width in widths)


def test_every_width_of_a_space_is_a_multiple_of_its_groups_step(network, image) -> None:
    space = made(network, image, 4, 16)
    for name, dimension in space.dimensions().items():
        (group,) = [group for group in space.groups if PREFIX + group.name == name]
        assert dimension.step == space.step(group)
        assert dimension.low % dimension.step == 0
        assert dimension.high == group.channels


def test_one_precision_is_no_choice() -> None:
    space = PrecisionSpace(["a", "b"], ("fp32",))
    assert space.dimensions() == {}
    assert space.read({}) == {"a": "fp32", "b": "fp32"}


def test_the_dense_candidate_is_the_uniform_one_without_any_compression(space: JointSpace) -> None:
    assert space.candidate(space.uniform(1.0, "fp32")) == space.dense()


def test_candidates_that_deploy_the_same_are_the_same(space: JointSpace) -> None:
    values = space.uniform(1.0, "fp32")
    head = {"precision.exits.exit1.classifier": "int8"}
    assert space.candidate(values | head) == space.candidate(values)
    on = {"threshold.exit1": 0.8}
    assert space.candidate(values | head | on) != space.candidate(values | on)


def test_a_joint_candidate_has_all_three(space: JointSpace) -> None:
    candidate = space.candidate(space.uniform(0.5, "int8", 0.9))
    assert set(candidate.precision.values()) == {"int8"}
    assert set(candidate.thresholds.exits.values()) == {0.9}
    assert candidate.channels["pointwise.0"] == 16


@pytest.mark.parametrize("keep", [1.0, 0.75, 0.5, 0.01])
def test_uniform_values_are_on_offer(space: JointSpace, keep: float) -> None:
    values = space.uniform(keep, "int8", 0.72)
    for name, distribution in distributions(space).items():
        assert distribution._contains(distribution.to_internal_repr(values[name])), name
