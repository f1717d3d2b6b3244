"""Every criterion scores every channel; each against the formula that it stands for."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from search.config.study import SpaceSection, Study, StudyError
from spaces.dynamic.exit_network import ExitNetwork
from spaces.pruning.criteria import CRITERIA
from spaces.pruning.criteria.base import Evidence
from spaces.pruning.prunable import find_groups
from spaces.registry import UnknownNameError
from spaces.testing import CriterionContract
from tests.helpers import tiny

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    data = tiny.splits().calibration
    return Evidence(torch.from_numpy(data.images), torch.from_numpy(data.labels))


@pytest.fixture(scope="module")
def groups(network, image):
    return find_groups(network, image).free


class TestL1(CriterionContract):
    name = "l1"


class TestL2(CriterionContract):
    name = "l2"


class TestFpgm(CriterionContract):
    name = "fpgm"


class TestBatchNormScale(CriterionContract):
    name = "bn_scale"


class TestTaylor(CriterionContract):
    name = "taylor"


class TestHRank(CriterionContract):
    name = "hrank"


class TestObd(CriterionContract):
    name = "obd"


class TestRandom(CriterionContract):
    name = "random"


def test_every_criterion_keeps_the_contract() -> None:
    assert set(CRITERIA) <= {subclass.name for subclass in CriterionContract.__subclasses__()}
    assert [SpaceSection(criterion=name).criterion for name in CRITERIA] == list(CRITERIA)


def test_an_unknown_criterion_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="got 'l3'"):
        CRITERIA["l3"]


def test_a_bad_criterion_ends_a_study_before_anything_is_trained() -> None:
    with pytest.raises(StudyError, match="criterion"):
        Study.parse(tiny.STUDY + '\nspace = {criterion = "l3"}', "test")


class Pair(nn.Module):
    """Two layers and the four channels between them: small enough to compute every score by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 1, bias=False)
        self.flatten = nn.Flatten()
        self.second = nn.Linear(4, 2, bias=False)

    def forward(self, x):
        return self.second(self.flatten(self.first(x)))


@pytest.fixture
def pair():
    torch.manual_seed(3)
    network = ExitNetwork(Pair(), [], []).eval()
    torch.manual_seed(4)
    evidence = Evidence(torch.randn(8, 1, 1, 1), torch.randint(0, 2, (8,)))
    return network, find_groups(network, evidence.images[:1]).free, evidence


def halves(first: torch.Tensor, second: torch.Tensor) -> np.ndarray:
    """Returns the mean of both layers' scores, each divided by its mean."""
    score = (first / first.mean() + second / second.mean()) / 2
    return score.detach().double().numpy()


@pytest.mark.parametrize(("name", "power"), [("l1", 1), ("l2", 2)])
def test_magnitude_is_the_norm_of_a_channel_in_both_layers(pair, name, power) -> None:
    network, (group,), evidence = pair
    first, second = network.trunk.first.weight[:, 0, 0, 0], network.trunk.second.weight
    expected = halves(first.abs(), second.norm(p=power, dim=0))
    np.testing.assert_allclose(CRITERIA[name](network, [group], evidence)[group.name], expected, rtol=1e-5)


def test_fpgm_gives_a_copied_filter_the_lowest_score(pair) -> None:
    network, (group,), evidence = pair
    with torch.no_grad():
        network.trunk.first.weight.copy_(torch.tensor([1.0, 1.0, 9.0, -9.0]).view(4, 1, 1, 1))
        network.trunk.second.weight.copy_(torch.tensor([[1.0, 1.0, 9.0, -9.0]] * 2))
    scores = CRITERIA["fpgm"](network, [group], evidence)[group.name]
    assert scores[0] == scores[1] == scores.min()
    assert scores[0] == pytest.approx(4 * (0 + 8 + 10) / (2 * (0 + 8 + 10) + (8 + 8 + 18) + (10 + 10 + 18)))


def test_taylor_is_the_change_of_the_loss_to_first_order(pair) -> None:
    """For one batch: gradient times value, summed over a channel, squared; both layers say the same of it."""
    network, (group,), evidence = pair
    parameters = [network.trunk.first.weight, network.trunk.second.weight]
    loss = F.cross_entropy(network(evidence.images)[-1], evidence.labels)
    first, second = (p * g for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True))
    expected = halves(first[:, 0, 0, 0].square(), second.sum(0).square())
    np.testing.assert_allclose(CRITERIA["taylor"](network, [group], evidence)[group.name], expected, rtol=1e-4)


def test_obd_is_half_the_mean_squared_gradient_times_the_squared_weight(pair) -> None:
    network, (group,), evidence = pair
    parameters = [network.trunk.first.weight, network.trunk.second.weight]
    fisher = [torch.zeros_like(p) for p in parameters]
    for image, label in zip(evidence.images, evidence.labels, strict=True):
        loss = F.cross_entropy(network(image[None])[-1], label[None])
        for total, gradient in zip(fisher, torch.autograd.grad(loss, parameters), strict=True):
            total += gradient.square() / len(evidence.labels)
    first, second = (0.5 * h * p.square() for h, p in zip(fisher, parameters, strict=True))
    expected = halves(first[:, 0, 0, 0], second.sum(0))
    np.testing.assert_allclose(CRITERIA["obd"](network, [group], evidence)[group.name], expected, rtol=1e-4)


def test_hrank_is_the_rank_of_the_feature_maps() -> None:
    class Maps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.spread = nn.Conv2d(1, 4, 1, bias=False)
            self.read = nn.Linear(4 * 9, 2)

        def forward(self, x):
            return self.read(self.spread(x).flatten(1))

    trunk = Maps()
    with torch.no_grad():
        trunk.spread.weight.copy_(torch.tensor([1.0, 2.0, -1.0, 0.5]).view(4, 1, 1, 1))
    network = ExitNetwork(trunk, [], []).eval()
    image = torch.eye(3)[None, None]  # full rank where the channel's sign lets it through a ReLU
    groups = find_groups(network, image).free
    scores = CRITERIA["hrank"](network, groups, Evidence(image, torch.tensor([0])))[groups[0].name]
    np.testing.assert_allclose(scores, np.array([3, 3, 0, 3]) / 2.25)


def test_batch_norm_scale_reads_the_scales(network, groups, evidence) -> None:
    changed = copy.deepcopy(network)
    norm = changed.trunk.inner[1]
    with torch.no_grad():
        norm.weight[:] = torch.linspace(-1, 2, norm.num_features)
    scores = CRITERIA["bn_scale"](changed, groups, evidence)["inner.0"]
    expected = norm.weight.detach().abs().double().numpy()
    np.testing.assert_allclose(scores, expected / expected.mean(), rtol=1e-6)
