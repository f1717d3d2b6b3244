"""Automatic exits: one that cannot be placed is left out and said, whatever the reason, and nothing ends by it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from search.config.study import Study
from search.loading.models import build_model
from search.pipeline.pipeline import build_pipeline
from search.training.dense import trained_network
from spaces.dynamic.cut_points import check_cut_points, find_cut_points
from spaces.errors import StructureError
from studies.digits.model import resnet20
from tests.helpers import tiny, zoo

IMAGE = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Attended(nn.Module):
    """The last layers are weighted by the stem's features, whose gradient is stopped."""

    def __init__(self, inputs: int = 3, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight
        self.stem = nn.Sequential(zoo.conv(inputs, 16), zoo.conv(16, 16))
        self.body = nn.Sequential(*(zoo.conv(16, 16) for _ in range(3)))
        self.last, self.classifier = zoo.conv(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x)
        features = self.body(stem) + self.weight * stem.detach().mean((2, 3), keepdim=True)
        return self.classifier(self.last(features).mean((2, 3)))


class InPlace(nn.Module):
    """Its input is normalised in place, and its classes come from numpy where gradients are on."""

    def __init__(self, through_numpy: bool = False) -> None:
        super().__init__()
        self.through_numpy = through_numpy
        self.body = nn.Sequential(*(zoo.conv(3 if not place else 16, 16) for place in range(4)))
        self.classifier = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x.sub_(0.5)
        if self.through_numpy:
            x = torch.from_numpy(x.numpy())
        return self.classifier(self.body(x).mean((2, 3)))


def unseen() -> nn.Module:
    """Returns a network whose graph goes around most places, where no image and no gradient tells it."""
    return Attended(1, 0.0)


def test_a_way_that_autograd_does_not_see_is_one() -> None:
    trunk = Attended().eval()
    found = find_cut_points(trunk, IMAGE, (0.25, 0.5))
    assert found.after
    assert not any(path.startswith("body") for path in found.after)
    with pytest.raises(StructureError, match=r"got 'body\.1', which is bypassed"):
        check_cut_points(trunk, IMAGE, ["body.1"])
    assert check_cut_points(trunk, IMAGE, ["stem"]).after == ("stem",)


def test_an_input_that_is_changed_in_place_is_no_obstacle() -> None:
    before = IMAGE.clone()
    assert find_cut_points(InPlace().eval(), IMAGE, (1 / 3, 2 / 3)).after == ("body.1", "body.2")
    assert torch.equal(IMAGE, before)


def test_a_network_that_gradients_cannot_pass_has_no_exits_and_says_why() -> None:
    found = find_cut_points(InPlace(through_numpy=True).eval(), IMAGE, (1 / 3, 2 / 3))
    assert found.after == ()
    assert "cannot be followed: Can't call numpy()" in str(found)


def test_an_exit_behind_which_the_exported_graph_cannot_be_cut_is_left_out(cache: Path) -> None:
    text = tiny.STUDY.replace("tests.helpers.tiny:network", "tests.search.test_automatic_exits:unseen")
    study = Study.parse(text.replace('after = ["pool"]', "shares = [0.3, 0.6]"), "test")
    pipeline = build_pipeline(study, lambda *_: None)
    assert pipeline.network.cut_points == pipeline.exit_places.after == ("stem",)
    assert "None after body.1: the exported network cannot be cut there." in str(pipeline.exit_places)
    subject = pipeline.deployed(pipeline.space.dense())
    with torch.no_grad():
        expected = pipeline.network.trunk(torch.from_numpy(pipeline.data.test.images[:4])).numpy()
    np.testing.assert_allclose(subject.session.all_logits(pipeline.data.test.images[:4], 4)[:, -1], expected, atol=1e-4)


def test_fewer_exits_than_weights_keep_those_of_their_shares(cache: Path) -> None:
    text = tiny.STUDY.replace("tests.helpers.tiny:network", "tests.search.test_automatic_exits:unseen")
    exits = 'shares = [0.3, 0.6], training = "joint", weights = [0.5, 0.7, 1.0], joint = {epochs = 1, batch = 50}'
    study, data = Study.parse(text.replace('after = ["pool"]', exits), "test"), tiny.splits()
    network = trained_network(
        study,
        build_model(study.model, None, data.classes, 0, lambda: data.calibration.images[:2]),
        data,
        lambda *_: None,
    )
    assert network.cut_points == ("stem",)


def test_an_exit_that_was_asked_for_is_refused_before_anything_is_trained(cache: Path) -> None:
    told: list[str] = []
    with pytest.raises(StructureError, match="got 'inner', which is bypassed"):
        build_pipeline(Study.parse(tiny.STUDY.replace('"pool"', '"inner"'), "test"), lambda step, *_: told.append(step))
    assert "Training the dense network, once" not in told


def test_named_places_are_kept_with_the_reason_for_the_others() -> None:
    found = find_cut_points(resnet20().eval(), torch.randn(1, 1, 32, 32), (1 / 3, 2 / 3))
    assert len(found.after) == 2
    kept = found.only(found.after[1:], "it cannot be")
    assert (kept.after, kept.shares) == (found.after[1:], found.shares[1:])
    assert f"None after {found.after[0]}: it cannot be." in str(kept)
    assert found.only(found.after, "it cannot be") == found
