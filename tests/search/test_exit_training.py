"""Heads: trained on a frozen trunk or with it, of either kind, and how sure they sound."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluators.artifact_builder import ArtifactBuilder
from evaluators.data import LabelledImages
from evaluators.runtimes.onnxruntime_cpu import OnnxRuntime
from search.config.study import ExitsSection, Study, StudyError
from search.loading.models import build_model
from search.training.dense import trained_network
from search.training.exit_heads import calibrate_heads, temperature, train_exits, train_heads, train_jointly
from spaces.candidate import Candidate
from spaces.dynamic.exit_network import HEADS, ExitNetwork
from spaces.pruning.prunable import find_groups
from spaces.thresholds import Thresholds
from tests.helpers import tiny
from tests.helpers.tiny import sparsity_space

QUIET = {"epochs": 2, "grid": 2, "joint": {"epochs": 4, "batch": 50}}


def silent(step: str, done: int, total: int) -> None:
    pass


def with_heads(kind: str = "linear") -> ExitNetwork:
    torch.manual_seed(3)
    heads = [HEADS[kind](count, 4, 2) for count in (16, 32)]
    return ExitNetwork(tiny.randomized(), ["pool", "pointwise"], heads).eval()


def mean_loss(network: ExitNetwork, data: LabelledImages) -> float:
    with torch.no_grad():
        found = network(torch.from_numpy(data.images[:]))
    return float(sum(F.cross_entropy(logits, torch.from_numpy(data.labels)) for logits in found))


@pytest.mark.parametrize("kind", list(HEADS))
def test_heads_learn_while_the_trunk_stays(kind) -> None:
    network, data = with_heads(kind), tiny.splits()
    trunk = copy.deepcopy(network.trunk.state_dict())
    before = mean_loss(network, data.validation)
    train_heads(network, data.train, ExitsSection(**QUIET), None, 0, silent)
    assert mean_loss(network, data.validation) < before
    assert not network.training
    for name, value in network.trunk.state_dict().items():
        assert (value == trunk[name]).all(), name


@pytest.mark.parametrize("kind", list(HEADS))
def test_any_head_is_cut_pruned_and_deployed(kind, images) -> None:
    network = with_heads(kind)
    builder = ArtifactBuilder(network, images.numpy(), OnnxRuntime())
    groups = find_groups(network, images[:1], builder.disagreement).free
    space = sparsity_space(network, groups, step=4, minimum=0.25)
    smaller = space.apply(network, {group.name: space.smallest(group) for group in groups})
    for precision, near in (("fp32", 1e-4), ("int8", 0.3)):
        candidate = Candidate({}, dict.fromkeys(builder.layers, precision), Thresholds({"exit1": 0.5, "exit2": 0.5}))
        artifact = builder.build(smaller, candidate, builder.read_ranges(smaller, images.numpy()))
        found = OnnxRuntime().open(artifact.deployed, artifact.thresholds, 1).all_logits(images.numpy(), 4)
        with torch.no_grad():
            wanted = np.stack([logits.numpy() for logits in smaller(images)], axis=1)
        np.testing.assert_allclose(found, wanted, atol=near * np.abs(wanted).max())


def test_trunk_and_heads_learn_together_and_weights_say_for_whom() -> None:
    data = tiny.splits()
    losses = []
    for weights in ((1.0, 1.0, 1.0), (1e-6, 1e-6, 1.0)):
        network = with_heads()
        before = copy.deepcopy(network.state_dict())
        exits = ExitsSection(**QUIET, training="joint", weights=weights)
        train_jointly(network, data.train, exits, None, None, silent)
        changed = {name for name, value in network.named_parameters() if not torch.equal(value, before[name])}
        assert {"trunk.stem.0.weight", "trunk.classifier.weight", "exits.exit1.classifier.weight"} <= changed
        assert mean_loss(network, data.train) < 0.9 * mean_loss_of(before, data.train)
        with torch.no_grad():
            first, *_ = network(torch.from_numpy(data.train.images))
        losses.append(float(F.cross_entropy(first, torch.from_numpy(data.train.labels))))
    assert losses[0] < losses[1], "an exit that does not count learns less"


def mean_loss_of(state, data: LabelledImages) -> float:
    network = with_heads()
    network.load_state_dict(state)
    return mean_loss(network, data)


@settings(deadline=None, max_examples=20)
@given(st.floats(0.3, 4.0), st.integers(0, 1000))
def test_a_temperature_is_found_again(wanted, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4000, 5, generator=generator) * 2
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).ravel()
    assert temperature(logits * wanted, labels) == pytest.approx(wanted, rel=0.15)


def test_calibrated_heads_answer_the_same_and_sound_as_sure_as_they_are() -> None:
    network, data = with_heads(), tiny.splits()
    train_heads(network, data.train, ExitsSection(epochs=300, grid=2), None, 0, silent)
    images, labels = torch.from_numpy(data.calibration.images), torch.from_numpy(data.calibration.labels)
    with torch.no_grad():
        before = network(images)
    found = calibrate_heads(network, data.calibration)
    with torch.no_grad():
        after = network(images)
    assert torch.equal(before[-1], after[-1])
    for name, was, now in zip(network.exit_names, before, after, strict=False):
        assert torch.allclose(was / found[name], now, atol=1e-5)
        assert F.cross_entropy(now, labels, label_smoothing=1 / 41) <= F.cross_entropy(
            was, labels, label_smoothing=1 / 41
        )
    assert all(factor == pytest.approx(1, abs=0.02) for factor in calibrate_heads(network, data.calibration).values())


def test_a_head_that_does_not_end_in_a_linear_layer_keeps_its_temperature(images) -> None:
    head = torch.nn.Sequential(HEADS["linear"](16, 4, 2), torch.nn.ReLU())
    network = ExitNetwork(tiny.randomized(), ["pool"], [head]).eval()
    with torch.no_grad():
        before = network(images)
    assert calibrate_heads(network, LabelledImages(images.numpy(), np.zeros(12, np.int64))) == {"exit1": 1.0}
    with torch.no_grad():
        assert torch.equal(network(images)[0], before[0])


def test_joint_training_is_kept_and_goes_on_where_it_was_stopped(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DEPLOYFRONT_CACHE", str(tmp_path))
    joint = 'grid = 2, training = "joint", weights = [0.5, 1.0], joint = {epochs = 4, batch = 50}'
    study, data = Study.parse(tiny.STUDY.replace("grid = 2", joint), "test"), tiny.splits()

    def train(progress):
        return trained_network(
            study, build_model(study.model, None, data.classes, 0, lambda: data.calibration.images[:2]), data, progress
        )

    def crash(step: str, done: int, total: int) -> None:
        if "together" in step and done >= 50:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(crash)
    seen: list[int] = []
    resumed = train(lambda step, done, total: seen.append(done) if "together" in step else None)
    assert seen[0] >= 50, "whole epochs are not repeated"
    monkeypatch.setenv("DEPLOYFRONT_CACHE", str(tmp_path / "other"))
    straight = train(silent)
    for name, value in straight.state_dict().items():
        assert np.allclose(value, resumed.state_dict()[name], atol=1e-5), name

    def never(*_: object) -> None:
        raise AssertionError("trained again")

    assert torch.equal(train(never).trunk.classifier.weight, straight.trunk.classifier.weight)


def test_there_are_as_many_weights_as_losses(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DEPLOYFRONT_CACHE", str(tmp_path))
    study = Study.parse(tiny.STUDY.replace("grid = 2", 'grid = 2, training = "joint", weights = [1.0]'), "test")
    data = tiny.splits()
    with pytest.raises(StudyError, match="got 1 for 1 exits; leave it out"):
        trained_network(
            study, build_model(study.model, None, data.classes, 0, lambda: data.calibration.images[:2]), data, silent
        )


def test_only_joint_training_changes_the_trunk() -> None:
    data = tiny.splits()
    for training, changes in (("frozen", False), ("joint", True)):
        network = with_heads()
        before = network.trunk.classifier.weight.clone()
        train_exits(network, data, ExitsSection(**QUIET, training=training), None, 0, None, silent)
        assert torch.equal(network.trunk.classifier.weight, before) != changes
