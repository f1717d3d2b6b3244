"""Training with masks: towards the wanted FLOPs, with gates that still tell one image from another."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from evaluators.data import Splits
from evaluators.flops.masked import MaskedFlops, measure_need
from search.config.sections import MasksSection
from search.training.batchnorm import recalibrate_batch_norm
from search.training.masks import train_masks_once, with_masks
from spaces.dynamic.masks.base import LogitNorm, masks_of
from tests.helpers import tiny
from tests.helpers.skippable import SkippableNetwork


@pytest.fixture(scope="module")
def data() -> Splits:
    return tiny.splits()


@pytest.fixture(scope="module")
def plain(data: Splits) -> nn.Module:
    torch.manual_seed(0)
    network = SkippableNetwork().eval()
    recalibrate_batch_norm(network, torch.from_numpy(data.train.images[:200]))
    return network


@pytest.fixture
def image(data: Splits) -> torch.Tensor:
    return torch.from_numpy(data.train.images[:1])


@pytest.mark.parametrize("method", ["dgnet", "dynconv", "cgnet"])
def test_training_comes_to_the_wanted_flops_image_by_image(
    method: str, plain: nn.Module, data: Splits, image: torch.Tensor, tmp_path: Path
) -> None:
    masks = MasksSection(method=method, keep=0.7, epochs=15, batch=50)
    network = with_masks(plain, masks, image)
    file, told = tmp_path / "masks.pt", []
    train_masks_once(network, plain, data, masks, None, file, lambda *step: told.append(step))
    counted, images = MaskedFlops(plain, network, image), data.test.images[:100]
    need = measure_need(network, counted, images)
    assert need.flops.mean() / counted.dense == pytest.approx(0.7, abs=0.1)
    assert need.flops.std() > 0
    assert any(0.05 < share.mean() < 0.95 for share in need.opened.values())

    again, before = with_masks(plain, masks, image), len(told)
    train_masks_once(again, plain, data, masks, None, file, lambda *step: told.append(step))
    assert len(told) == before, "what was trained is loaded"
    assert measure_need(again, counted, images).flops.tolist() == need.flops.tolist()


def test_batch_statistics_are_those_of_features_in_closed_blocks_too(
    plain: nn.Module, data: Splits, image: torch.Tensor
) -> None:
    network = with_masks(plain, MasksSection(method="dgnet"), image)
    images = torch.from_numpy(data.train.images[:100])
    for mask in masks_of(network):
        mask.tiles.gate.threshold.fill_(1e4)
        mask.channels[0].gate.threshold.fill_(-1e4)
    recalibrate_batch_norm(network, images)
    assert not any(module.training for module in network.modules())
    for mask in masks_of(network):
        assert float(network.get_submodule(mask.site.convs[-1].end).running_var.min()) > 1e-6
        mask.open()
    with torch.no_grad():
        assert torch.isfinite(network(images)).all()
        assert float(network(images).abs().max()) < 10 * float(plain(images).abs().max())


def test_logits_that_hardly_differ_are_spread() -> None:
    norm = LogitNorm(3, 0.5)
    logits = norm(1.8 + 0.1 * torch.randn(4000, 3, 1, 1, generator=torch.Generator().manual_seed(0)))
    assert logits.mean(dim=0).flatten().tolist() == pytest.approx([0.5] * 3, abs=0.01)
    assert float((logits >= 0).float().mean()) == pytest.approx(0.69, abs=0.03)  # of a normal variable above -0.5


def test_a_copy_is_trained_and_not_the_network_itself(plain: nn.Module, image: torch.Tensor) -> None:
    before = copy.deepcopy(plain.state_dict())
    with_masks(plain, MasksSection(method="dgnet"), image)
    assert not masks_of(plain)
    assert all(torch.equal(before[name], value) for name, value in plain.state_dict().items())
