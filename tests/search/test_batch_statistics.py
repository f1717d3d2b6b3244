"""Batch statistics: what cutting moved is measured anew, all else stays, and the loss is never higher for it."""

import copy
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluators.data import LabelledImages
from search.config.study import RecoverySection
from search.pipeline.search_space import split_remarks
from search.recovery.base import RecoveryContext
from search.recovery.batchnorm import BatchNormRecovery
from search.training.batchnorm import check_images, recalibrate_batch_norm, recovery_images, refresh_statistics
from spaces.dynamic.exit_network import ConvolutionalExitHead, ExitHead, ExitNetwork
from spaces.patterns import apply_patterns
from spaces.pruning.prunable import find_groups
from tests.helpers.digit_network import digits, trained
from tests.helpers.tiny import sparsity_space

FEW = 40


@pytest.fixture(scope="module")
def network() -> ExitNetwork:
    return trained()


@pytest.fixture(scope="module")
def space(network: ExitNetwork):
    return sparsity_space(network, find_groups(network, torch.zeros(1, 1, 16, 16)).free, step=1, minimum=0.1)


def shuffled(seed: int) -> LabelledImages:
    data = digits()[0]
    order = np.random.default_rng(seed).permutation(len(data))
    return LabelledImages(data.images[order], data.labels[order])


def level(network: ExitNetwork, space, seed: int = 0, train: LabelledImages | None = None) -> BatchNormRecovery:
    settings = RecoverySection(level="bn", images=FEW)
    data = train or shuffled(seed)
    return BatchNormRecovery(
        RecoveryContext(network, space, data, None, settings, Path("none"), "key", lambda *_: None)
    )


def statistics(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items() if "running_" in name}


def widths(space, **shares: float) -> dict[str, int]:
    return {group.name: round(shares.get(group.name, 1.0) * group.channels) for group in space.groups}


def loss(network: ExitNetwork) -> float:
    data = digits()[2]
    with torch.no_grad():
        logits = network(torch.from_numpy(data.images))[-1]
    return float(F.cross_entropy(logits, torch.from_numpy(data.labels)))


def changed(network: ExitNetwork, before: Mapping[str, Tensor]) -> set[str]:
    found = statistics(network)
    return {
        name.rpartition(".")[0].removeprefix("trunk.") for name in found if not torch.equal(found[name], before[name])
    }


def test_nothing_is_measured_anew_where_nothing_is_cut(network, space) -> None:
    whole = space.apply(network, widths(space))
    level(network, space).recover(whole, widths(space))
    assert changed(whole, statistics(network)) == set()
    assert not any(module.training for module in whole.modules())


def test_only_what_lies_behind_the_cut_is_measured_anew(network, space) -> None:
    channels = widths(space, **{"inner.0": 0.5})
    smaller = space.apply(network, channels)
    before = statistics(smaller)
    level(network, space).recover(smaller, channels)
    # The channels of `inner` that are left are what they were; `outer` reads fewer of them.
    assert changed(smaller, before) == {"outer.1"}


def test_zeros_in_a_layer_are_a_cut(network, space) -> None:
    patterns = {"second.0": "75%"}
    zeroed = copy.deepcopy(network)
    apply_patterns(zeroed, patterns)
    level(network, space).recover(zeroed, widths(space), patterns)
    assert "second.1" in changed(zeroed, statistics(network))
    assert "first.1" not in changed(zeroed, statistics(network))


def test_the_source_stays_as_it_is(network, space) -> None:
    before = copy.deepcopy(network.state_dict())
    channels = widths(space, **{"inner.0": 0.5})
    level(network, space).recover(space.apply(network, channels), channels)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(norm.track_running_stats for norm in network.modules() if isinstance(norm, nn.BatchNorm2d))


def error(network: ExitNetwork, target: Mapping[str, Tensor]) -> float:
    """Returns how far statistics are from others, means in standard deviations and variances as a share."""
    found = statistics(network)
    units = {name: target[name.replace("_mean", "_var")] for name in target}
    units = {name: unit.sqrt() if name.endswith("_mean") else unit for name, unit in units.items()}
    return float(np.mean([((found[name] - value).abs() / units[name]).mean() for name, value in target.items()]))


@pytest.mark.parametrize("kept", [0.9, 0.6])
def test_few_images_tell_more_beside_the_whole_network(kept: float, network, space) -> None:
    channels = {group.name: round(kept * group.channels) for group in space.groups}
    whole = space.apply(network, channels)
    recalibrate_batch_norm(whole, torch.from_numpy(digits()[0].images))
    found, replaced = [], []
    for seed in range(4):
        one, other = (space.apply(network, channels) for _ in range(2))
        level(network, space, seed=seed).recover(one, channels)
        recalibrate_batch_norm(other, recovery_images(shuffled(seed), FEW))
        found.append(error(one, statistics(whole)))
        replaced.append(error(other, statistics(whole)))
        assert loss(one) < loss(space.apply(network, channels))
    assert np.mean(found) < 0.7 * np.mean(replaced)


def test_what_would_raise_the_loss_is_not_taken(network, space) -> None:
    channels = widths(space, **{"inner.0": 0.9})
    glare = 20 + 30 * np.random.default_rng(0).random((FEW, 1, 16, 16), dtype=np.float32)
    real = digits()[0]
    # Statistics are measured on glare, and the loss is compared on digits.
    images = np.concatenate([glare, real.images[:64]])
    labels = np.concatenate([real.labels[:FEW], real.labels[:64]])
    order = np.argsort(np.random.default_rng(0).permutation(len(images)))
    left, smaller, replaced = (space.apply(network, channels) for _ in range(3))
    level(network, space, train=LabelledImages(images[order], labels[order])).recover(smaller, channels)
    recalibrate_batch_norm(replaced, torch.from_numpy(glare))
    assert loss(replaced) > loss(network) + 1
    assert loss(smaller) <= loss(left)


def test_a_network_without_statistics_is_left_alone() -> None:
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)).eval()
    data, before = digits()[0], copy.deepcopy(plain.state_dict())
    refresh_statistics(plain, recovery_images(data, 32), check_images(data, 32))
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())


def test_after_a_training_the_better_statistics_stay(network) -> None:
    data = digits()[0]
    images, check = recovery_images(data, 256), check_images(data, 256)
    good, stale = copy.deepcopy(network), copy.deepcopy(network)
    refresh_statistics(good, recovery_images(data, 8), check_images(data, 8))
    assert loss(good) <= loss(network) + 1e-3, "eight images do not spoil what a training has seen"
    for norm in (module for module in stale.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.reset_running_stats()
    refresh_statistics(stale, images, check)
    assert loss(stale) < loss(network) + 0.1, "statistics that nobody kept are measured"


def test_norms_of_heads_keep_statistics_too(network) -> None:
    torch.manual_seed(0)
    made = ExitNetwork(network.trunk, ["pointwise"], [ConvolutionalExitHead(32, 10, 2)]).eval()
    made = copy.deepcopy(made)
    recalibrate_batch_norm(made, recovery_images(digits()[0], 64))
    assert float(made.exits["exit1"].bn.running_mean.abs().max()) > 0
    assert isinstance(network.exits["exit1"], ExitHead)


def test_small_halves_are_told_with_their_intervals() -> None:
    first, second = split_remarks(175, 175)
    assert "175 of the validation images choose" in first
    assert "within 5.3 points on 175 images, to within 3.6 on all 350" in second
    assert "thresholds = 'searched'" in second
    assert len(split_remarks(500, 500)) == 1
