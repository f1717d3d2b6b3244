"""What a sampler knows of depth and input size before it measures anything: work, features and first proposals."""

from dataclasses import replace

import numpy as np
import pytest
from optuna.distributions import CategoricalDistribution, IntDistribution

from search.samplers.hypervolume.encoding import Codec
from search.samplers.hypervolume.features import damage_features, latency_features
from search.samplers.hypervolume.knapsack import knapsacks
from search.samplers.hypervolume.prior import NetworkStructure
from studies.benchmarks.synthetic import Problem, Setting


def structure_of(damage: tuple[float, ...] = (0.5, 0.2, 0.0)) -> tuple[NetworkStructure, Codec]:
    """Returns a network of four layers, two of them in blocks that may be left out, and the codec of its space."""
    layers = ("stem", "first", "second", "head")
    space = {f"precision.{name}": CategoricalDistribution(["fp32", "int8"]) for name in layers}
    space |= {"depth.body": IntDistribution(0, 2)}
    structure = NetworkStructure(
        channels=(),
        full=np.zeros(0),
        flops=np.array([1.0, 2.0, 4.0, 1.0]),
        inputs=np.zeros((4, 0)),
        outputs=np.zeros((4, 0)),
        precision=tuple(f"precision.{name}" for name in layers),
        fixed=("fp32",) * 4,
        speeds={"fp32": 1.0, "int8": 0.5},
        damage={"depth.body": damage} | {f"precision.{name}": (0.0, 0.01) for name in layers},
        depth=("depth.body",),
        runs_from=np.array([[0.0], [2.0], [1.0], [0.0]]),  # the first goes before the second
    )
    return structure, Codec(space)


def rows_of(codec: Codec, **blocks: int) -> np.ndarray:
    plain = dict.fromkeys(codec.names, "fp32")
    return codec.encode([{**plain, "depth.body": blocks["body"]}])


def test_a_version_that_leaves_blocks_out_has_less_work() -> None:
    structure, codec = structure_of()
    work = [structure.work(codec, rows_of(codec, body=count))[0].tolist() for count in (2, 1, 0)]
    assert work == [[1, 2, 4, 1], [1, 0, 4, 1], [1, 0, 0, 1]]
    assert structure.first(2).work(codec, rows_of(codec, body=0))[0].tolist() == [1, 0]
    assert structure.kept_blocks(codec, rows_of(codec, body=1)).tolist() == [[0.5]]
    assert structure.estimated_damage(codec, rows_of(codec, body=1))[0][0] == pytest.approx(0.2)


def test_features_tell_depths_apart_and_what_is_gone_has_no_precision() -> None:
    structure, codec = structure_of()
    for features in (latency_features(structure, codec), damage_features(structure, codec)):
        found = features(np.concatenate([rows_of(codec, body=count) for count in (2, 1, 0)]))
        assert np.isfinite(found).all()
        assert np.linalg.matrix_rank(found - found[0]) == 2
    plain = dict.fromkeys(codec.names, "fp32") | {"depth.body": 0}
    rows = codec.encode([plain, {**plain, "precision.second": "int8"}])
    one, other = latency_features(structure, codec)(rows)
    boundaries = 1  # neighbours in the dense network; all else is the same
    assert (one != other).sum() <= boundaries


def test_features_without_depth_are_what_they_were() -> None:
    problem = Problem(0, Setting(layers=9, exits=1))
    rows = problem.codec.random(6, np.random.default_rng(0))
    structure = problem.prior().structure
    before = ((latency_features, 68, 96.01293959305374), (damage_features, 88, 105.76573147447918))
    for features, columns, total in before:
        found = features(structure, problem.codec)(rows)
        assert found.shape == (6, columns)
        assert float(np.abs(found).sum()) == pytest.approx(total, rel=1e-6)


def test_knapsacks_leave_out_what_does_little_damage_for_its_time() -> None:
    structure, codec = structure_of((0.5, 0.001, 0.0))
    (found,) = knapsacks(structure, codec, [0.76])
    assert found["depth.body"] == 1
    assert {found[name] for name in codec.names if name.startswith("precision")} == {"fp32"}
    structure, codec = structure_of((50.0, 20.0, 0.0))
    (found,) = knapsacks(structure, codec, [0.76])
    assert found["depth.body"] == 2, "lower precisions are cheaper"
    (shortest,) = knapsacks(structure, codec, [0.2])
    assert shortest["depth.body"] == 0


def sized(damages: tuple[float, ...]) -> tuple[NetworkStructure, Codec]:
    """Returns the network with an input of half or of all pixels, and what each costs."""
    structure, codec = structure_of((50.0, 20.0, 0.0))
    space = {**codec.space, "input.size": CategoricalDistribution(["16", "24"])}
    damage = {**structure.damage, "input.size": damages}
    return replace(structure, size="input.size", size_work=(0.5, 1.0), damage=damage), Codec(space)


@pytest.mark.parametrize(("damages", "size"), [((0.001, 0.0), "16"), ((5.0, 0.0), "24")])
def test_knapsacks_take_the_input_size_that_does_the_least_damage(damages, size) -> None:
    structure, codec = sized(damages)
    (found,) = knapsacks(structure, codec, [0.6])
    assert found["input.size"] == size
    (tight,) = knapsacks(structure, codec, [0.3])
    assert tight["input.size"] == "16", "nothing else takes as little time"
