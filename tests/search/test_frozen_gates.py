"""The last part of a training with gates: as the network is deployed, with the gates that it has."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from evaluators.data import Splits
from search.config.sections import FittingSection, MasksSection, SkipsSection
from search.training.batchnorm import rebase_batch_norm, recalibrate_batch_norm
from search.training.block_gates import skip_blocks, train_gates_once, with_gates
from search.training.frozen_gates import train_with_frozen_gates, while_gates_learn
from search.training.loop import TrainingBatches, save
from search.training.masks import train_masks_once, with_masks
from spaces.dynamic.exit_network import ExitNetwork
from spaces.dynamic.masks import MASKS
from spaces.dynamic.masks.base import masks_of
from tests.helpers import tiny
from tests.helpers.skippable import SkippableNetwork

IMAGE = torch.zeros(1, 1, 8, 8)


@pytest.fixture(scope="module")
def data() -> Splits:
    return tiny.splits()


def plain() -> nn.Module:
    torch.manual_seed(0)
    return SkippableNetwork().eval()


def skipping() -> ExitNetwork:
    skips = SkipsSection(blocks="all", epochs=1, batch=50)
    trunk = plain()
    return with_gates(trunk, skip_blocks(trunk, skips, IMAGE), skips, IMAGE)


def answers(network: nn.Module, images: Tensor) -> Tensor:
    return network.run_trunk(images)[1] if isinstance(network, ExitNetwork) else network(images)


def check_settling(
    network: nn.Module, gates: list[nn.Module], answer: Callable[[Tensor], Tensor], data: Splits
) -> None:
    """Checks that the deployed network gets better on what it learns, with the gates and batch statistics it has."""
    loss_of = lambda images, labels: nn.functional.cross_entropy(answer(images), labels)  # noqa: E731
    images, labels = torch.from_numpy(data.train.images[:400]), torch.from_numpy(data.train.labels[:400])
    held = {id(value) for gate in gates for value in gate.state_dict(keep_vars=True).values()}
    before, worse = copy.deepcopy(network.eval().state_dict()), float(loss_of(images, labels).detach())
    settings = FittingSection(epochs=20, batch=50)
    train_with_frozen_gates(network, gates, loss_of, TrainingBatches(data.train, 50, 0), settings)
    after = network.state_dict(keep_vars=True)
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert float(loss_of(images, labels).detach()) < worse
    assert changed
    assert not any(id(after[name]) in held or "running" in name for name in changed)
    assert all(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("method", MASKS)
def test_a_network_with_masks_learns_what_is_deployed(method: str, data: Splits) -> None:
    network = with_masks(plain(), MasksSection(method=method), IMAGE)
    check_settling(network, list(masks_of(network)), network, data)


def test_a_network_with_skipped_blocks_learns_what_is_deployed(data: Splits) -> None:
    network = skipping()
    check_settling(
        network,
        [network.gate(block) for block in network.skip_blocks],
        lambda images: network.run_trunk(images)[1],
        data,
    )


@pytest.mark.parametrize("kind", ["masks", "skips"])
def test_what_was_learned_with_fixed_statistics_outlives_a_recalibration(kind: str, data: Splits) -> None:
    network = with_masks(plain(), MasksSection(method="dgnet"), IMAGE) if kind == "masks" else skipping()
    images = torch.from_numpy(data.train.images[:256])
    torch.manual_seed(1)
    with torch.no_grad():
        for norm in (module for module in network.modules() if isinstance(module, nn.BatchNorm2d)):
            norm.running_mean.add_(0.3 * torch.randn_like(norm.running_mean))
            norm.running_var.mul_(torch.rand_like(norm.running_var) + 0.5)
        before = answers(network, images)
        alone = copy.deepcopy(network)
        rebase_batch_norm(network, images)
        rebased = answers(network, images)
        recalibrate_batch_norm(network, images)
        after = answers(network, images)
        recalibrate_batch_norm(alone, images)
        undone = answers(alone, images)
    assert torch.allclose(rebased, before, rtol=1e-3, atol=1e-3)
    assert (after - before).square().mean() < 0.2 * (undone - before).square().mean()


@pytest.mark.parametrize("length", [{"epochs": 10}, {"steps": 100}, {"minutes": 2.0}, {"at_most_minutes": 2.0}])
def test_gates_learn_for_the_rest_of_the_training(length: dict[str, float]) -> None:
    (name, value), settings = *length.items(), while_gates_learn(FittingSection(**length))
    assert getattr(settings, name) == pytest.approx(0.85 * value)
    assert settings.learning_rate == FittingSection().learning_rate


@pytest.mark.parametrize("kind", ["masks", "skips"])
def test_a_training_stopped_in_its_last_part_does_not_begin_anew(kind: str, data: Splits, tmp_path: Path) -> None:
    told: list[str] = []
    file, tell = tmp_path / "gates.pt", lambda step, *_: told.append(step)
    masks = MasksSection(method="dgnet", epochs=1, batch=50)
    network = with_masks(plain(), masks, IMAGE) if kind == "masks" else skipping()
    save(network.state_dict(), tmp_path / "gates.unsettled.pt")
    if kind == "masks":
        train_masks_once(network, plain(), data, masks, None, file, tell)
    else:
        train_gates_once(network, data, SkipsSection(blocks="all", epochs=1, batch=50), None, file, tell)
    assert set(told) == {"Training it as it is deployed"}
    assert [file.name for file in tmp_path.iterdir()] == ["gates.pt"]
