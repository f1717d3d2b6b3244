import pytest

from search.sampler import distributions
from spaces.joint import JointSpace
from spaces.precision import PrecisionSpace
from tests.contracts import SpaceContract


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
        return space.gates


def test_one_precision_is_no_choice() -> None:
    space = PrecisionSpace(["a", "b"], ("fp32",))
    assert space.dimensions() == {}
    assert space.read({}) == {"a": "fp32", "b": "fp32"}


def test_the_dense_candidate_is_the_uniform_one_without_any_compression(space: JointSpace) -> None:
    assert space.candidate(space.uniform(1.0, "fp32", 1.0)) == space.dense()


def test_candidates_that_deploy_the_same_are_the_same(space: JointSpace) -> None:
    values = space.uniform(1.0, "fp32", 1.0)
    head = {"precision.exits.exit1.classifier": "int8"}
    assert space.candidate(values | head) == space.candidate(values)
    on = {"threshold.exit1": 0.8}
    assert space.candidate(values | head | on) != space.candidate(values | on)


def test_a_joint_candidate_has_all_three(space: JointSpace) -> None:
    candidate = space.candidate(space.uniform(0.5, "int8", 0.9))
    assert set(candidate.precision.values()) == {"int8"}
    assert set(candidate.thresholds.values()) == {0.9}
    assert candidate.channels["pointwise.0"] == 16


@pytest.mark.parametrize("keep", [1.0, 0.75, 0.5, 0.01])
def test_uniform_values_are_on_offer(space: JointSpace, keep: float) -> None:
    values = space.uniform(keep, "int8", 0.72)
    for name, distribution in distributions(space).items():
        assert distribution._contains(distribution.to_internal_repr(values[name])), name
