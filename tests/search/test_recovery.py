"""Winning accuracy back: the training loop, fine-tuning, shared weights, and the levels that a study names."""

import copy
import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from search.config.registries import RECOVERIES
from search.config.study import ElasticSection, FinetuneSection, FittingSection, RecoverySection, StudyError, finetuning
from search.recovery.base import RecoveryContext
from search.recovery.elastic import SharedWeights, random_channels, train_elastic
from search.recovery.finetune import finetune
from search.training.distillation import distillation_loss
from search.training.loop import Batch, DivergedError, TrainingBatches, fast_arithmetic, fit, rate_at
from search.training.teacher import Teacher
from spaces.dynamic.exit_network import ExitHead, ExitNetwork
from spaces.pruning.prunable import find_groups
from tests.helpers import tiny
from tests.helpers.tiny import sparsity_space

SHORT = FittingSection(epochs=2, batch=50, learning_rate=0.05)


@pytest.fixture
def student() -> ExitNetwork:
    torch.manual_seed(5)
    return ExitNetwork(tiny.randomized(), ["pool"], [ExitHead(16, 4, 2)]).eval()


@pytest.fixture
def sparsity(student, image):
    return sparsity_space(student, find_groups(student, image).free, step=4, minimum=0.25)


@pytest.fixture(scope="module")
def data():
    return tiny.splits()


def learn(network: nn.Module):
    def step(batch: Batch) -> float:
        loss = nn.functional.cross_entropy(network(batch.images)[-1], batch.labels)
        loss.backward()
        return float(loss.detach())

    return step


def same(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


class TestFit:
    def test_a_killed_training_goes_on_from_its_last_whole_epoch_and_ends_the_same(
        self, student, data, tmp_path
    ) -> None:
        batches = TrainingBatches(data.train, 50, 0)
        straight, killed = copy.deepcopy(student), copy.deepcopy(student)
        fit(straight, learn(straight), batches, SHORT)
        calls = 0

        def dies(batch: Batch) -> float:
            nonlocal calls
            calls += 1
            if calls == len(batches) + 3:
                raise KeyboardInterrupt
            return learn(killed)(batch)

        file = tmp_path / "checkpoint.pt"
        with pytest.raises(KeyboardInterrupt):
            fit(killed, dies, batches, SHORT, file)
        assert file.is_file()
        again = copy.deepcopy(student)
        done = []

        def counted(batch: Batch) -> float:
            done.append(batch.done)
            return learn(again)(batch)

        found = fit(again, counted, batches, SHORT, file)
        assert len(done) == len(batches), "the first epoch is not repeated"
        assert done[0] == 0.5
        assert found.steps == 2 * len(batches)
        assert same(again, straight)
        assert not file.exists()

    def test_a_torn_checkpoint_is_none(self, student, data, tmp_path) -> None:
        file = tmp_path / "checkpoint.pt"
        file.write_bytes(b"half a ch")
        found = fit(student, learn(student), TrainingBatches(data.train, 50, 0), SHORT, file)
        assert found.steps == 16

    def test_a_loss_that_is_not_finite_is_tried_again_at_a_tenth_of_the_rate(self, student, data, caplog) -> None:
        plain = learn(student)
        broken = iter([False] * 2 + [True] + [False] * 100)

        def once(batch: Batch) -> float:
            loss = plain(batch)
            return math.nan if next(broken) else loss

        found = fit(student, once, TrainingBatches(data.train, 50, 0), SHORT)
        assert len(found.remarks) == 1
        assert "nan in epoch 1" in found.remarks[0]
        assert "a tenth" in found.remarks[0]
        assert found.remarks[0] in caplog.text, "and the user is told"
        assert all(torch.isfinite(value).all() for value in student.state_dict().values())
        assert found.steps == 16

    def test_a_second_one_ends_it_with_the_epoch_and_the_rate(self, student, data) -> None:
        with pytest.raises(DivergedError, match=r"got nan in epoch 1, at a tenth of learning_rate 0.05 too"):
            fit(student, lambda *_: math.nan, TrainingBatches(data.train, 50, 0), SHORT)

    def test_it_lasts_as_long_as_it_is_told(self, student, data) -> None:
        batches = TrainingBatches(data.train, 50, 0)
        assert fit(student, learn(student), batches, FittingSection(epochs=1.5, batch=50)).steps == 12
        assert fit(student, learn(student), batches, FittingSection(steps=11, batch=50)).steps == 11
        timed = fit(student, learn(student), batches, FittingSection(minutes=0.001, batch=50))
        assert timed.seconds >= 0.06

    def test_a_network_that_cannot_read_channels_last_is_trained(self, data) -> None:
        class Viewed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer, self.last = nn.Conv2d(1, 4, 3), nn.Linear(144, 10)

            def forward(self, images: torch.Tensor) -> torch.Tensor:
                features = self.layer(images)
                return self.last(features.view(len(images), -1))

        network = Viewed()
        before = copy.deepcopy(network.last.weight)

        def step(batch: Batch) -> float:
            loss = nn.functional.cross_entropy(network(batch.images), batch.labels)
            loss.backward()
            return loss.item()

        fit(network, step, TrainingBatches(data.train, 50, 0), SHORT)
        assert not torch.equal(network.last.weight, before)

    def test_waiting_for_a_processor_does_not_shorten_a_training_in_minutes(self, student, data) -> None:
        def waits(batch: Batch) -> float:
            time.sleep(0.1)
            return learn(student)(batch)

        limited = FittingSection(batch=50, at_most_minutes=0.01)  # 0.6 s; waiting takes longer
        assert fit(student, waits, TrainingBatches(data.train, 50, 0), limited).steps == 8

    def test_averaged_weights_lie_between_those_of_the_steps(self, data) -> None:
        network = nn.Linear(1, 1, bias=False)
        seen = []

        def step(batch: Batch) -> float:
            seen.append(network.weight.item())
            network.weight.grad = torch.ones_like(network.weight)
            return 1.0

        fit(
            network,
            step,
            TrainingBatches(data.train, 50, 0),
            SHORT.model_copy(update={"ema": 0.9, "weight_decay": 0.0}),
        )
        assert min(seen) < network.weight.item() < max(seen)

    def test_batches_differ_between_epochs_and_not_between_runs(self, data) -> None:
        batches = TrainingBatches(data.train, 50, 7)
        first, again, second = (next(batches.epoch(index))[1] for index in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.equal(first, second)
        seen = torch.cat([images for images, _ in batches.epoch(0)])
        assert len(seen) == 400
        assert len(torch.unique(seen.flatten(1), dim=0)) == 400

    def test_with_views_the_same_batches_come_again_in_another_order(self, data) -> None:
        def noisy(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
            return images + torch.rand(images.shape, generator=generator)

        batches = TrainingBatches(data.train, 50, 7, noisy, views=2)
        first, other, again = ({key: images for key, images, _ in batches.keyed_epoch(index)} for index in (0, 1, 2))
        assert not first.keys() & other.keys()
        assert sorted(first) == sorted(again)
        assert list(first) != list(again)
        assert all(torch.equal(images, again[key]) for key, images in first.items())
        assert not any(torch.equal(*pair) for pair in zip(first.values(), other.values(), strict=True))

    @given(st.floats(0, 1))
    def test_rates_stay_between_nothing_and_the_whole(self, done: float) -> None:
        for schedule in ("onecycle", "cosine"):
            assert 0 <= rate_at(schedule, done) <= 1

    def test_the_rate_ends_at_nothing(self) -> None:
        assert rate_at("cosine", 0) == 1
        assert rate_at("onecycle", 0.3) == pytest.approx(1)
        assert rate_at("onecycle", 0) == pytest.approx(0.04)
        assert rate_at("cosine", 1) == rate_at("onecycle", 1) == pytest.approx(0, abs=1e-12)


class TestTeacher:
    def test_a_batch_that_comes_again_is_answered_once(self, data) -> None:
        calls: list[int] = []
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).eval()
        network.register_forward_hook(lambda *_: calls.append(1))
        teacher = Teacher(network)
        for index in range(4):
            for key, images, labels in TrainingBatches(data.train, 50, 0, views=2).keyed_epoch(index):
                found = teacher.logits(Batch(images, labels, 0.0, torch.Generator(), key))
                with torch.no_grad(), fast_arithmetic():
                    assert torch.equal(found, network[1](images.flatten(1)).float())
        assert len(calls) == 2 * 8  # two epochs of eight batches

    def test_what_does_not_fit_is_answered_anew(self, data) -> None:
        calls: list[int] = []
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).eval()
        network.register_forward_hook(lambda *_: calls.append(1))
        teacher = Teacher(network, memory=0)
        images = torch.from_numpy(data.train.images[:50])
        for _ in range(3):
            teacher.logits(Batch(images, torch.zeros(50), 0.0, torch.Generator(), "key"))
        assert len(calls) == 3


class TestDistillation:
    def test_it_is_the_formula(self) -> None:
        torch.manual_seed(0)
        logits, teacher, labels = torch.randn(5, 4), torch.randn(5, 4), torch.randint(0, 4, (5,))
        p, q = (teacher / 2).softmax(1), (logits / 2).softmax(1)
        expected = 0.3 * nn.functional.cross_entropy(logits, labels) + 0.7 * 4 * (p * (p / q).log()).sum(1).mean()
        assert torch.allclose(distillation_loss(logits, teacher, labels, 0.7, 2.0), expected, atol=1e-6)

    def test_a_network_has_nothing_to_learn_from_itself(self) -> None:
        logits = torch.randn(5, 4, requires_grad=True)
        loss = distillation_loss(logits, logits.detach(), torch.zeros(5, dtype=torch.long), 1.0, 2.0)
        loss.backward()
        assert loss.item() == pytest.approx(0, abs=1e-6)
        assert logits.grad.abs().max() < 1e-6


class TestSharedWeights:
    @settings(max_examples=15, deadline=None)
    @given(seed=st.integers(0, 10_000))
    def test_a_slice_answers_as_the_sliced_network(self, seed: int) -> None:
        torch.manual_seed(5)
        network = ExitNetwork(tiny.randomized(), ["pool"], [ExitHead(16, 4, 2)]).eval()
        space = sparsity_space(network, find_groups(network, torch.zeros(1, 1, 8, 8)).free, step=4, minimum=0.25)
        channels = random_channels(space, torch.Generator().manual_seed(seed))
        images = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        part = SharedWeights(network, space).slice(channels)
        sliced = space.apply(network, channels)
        part.network.eval()
        with torch.no_grad():
            found = SharedWeights(network, space).logits(part, images)
            expected = sliced(images)
        for one, other in zip(found, expected, strict=True):
            assert torch.allclose(one, other, atol=1e-5)

    def test_gradients_reach_the_slice_and_nothing_else(self, student, sparsity) -> None:
        shared = SharedWeights(student, sparsity)
        part = shared.slice({group.name: sparsity.smallest(group) for group in sparsity.groups})
        shared.logits(part, torch.randn(6, 1, 8, 8))[-1].square().sum().backward()
        for name, parameter in student.named_parameters():
            if name.startswith("exits."):
                assert parameter.grad is None or not parameter.grad.any()
                continue
            inside = torch.zeros(parameter.numel(), dtype=torch.bool)
            inside[part.positions[name]] = True
            assert parameter.grad.flatten()[inside].abs().sum() > 0 or name.endswith(("0.bias", "1.bias")), name
            assert not parameter.grad.flatten()[~inside].any(), name

    def test_random_candidates_are_in_the_space(self, sparsity) -> None:
        generator = torch.Generator().manual_seed(0)
        free = sparsity.dimensions()
        widths = [random_channels(sparsity, generator) for _ in range(200)]
        for channels in widths:
            for name, dimension in free.items():
                kept = channels[name.removeprefix("channels.")]
                assert dimension.low <= kept <= dimension.high
                assert (kept - dimension.low) % dimension.step == 0
        totals = [sum(channels.values()) for channels in widths]
        smallest = sum(sparsity.smallest(group) for group in sparsity.groups)
        whole = sum(group.channels for group in sparsity.groups)
        assert min(totals) < smallest + 0.2 * (whole - smallest)
        assert max(totals) > smallest + 0.8 * (whole - smallest)


def accuracy(network: ExitNetwork, data) -> float:
    with torch.no_grad():
        answers = network(torch.from_numpy(data.images))[-1].argmax(1).numpy()
    return float((answers == data.labels).mean())


@pytest.fixture(scope="module")
def trained(data):
    """A tiny network that has learned its task."""
    torch.manual_seed(0)
    network = ExitNetwork(tiny.network(), ["pool"], [ExitHead(16, 4, 2)])
    fit(network, learn(network), TrainingBatches(data.train, 50, 0), FittingSection(epochs=6, batch=50))
    assert accuracy(network, data.validation) > 0.9
    return network


class TestFinetune:
    def test_a_pruned_network_gets_its_accuracy_back(self, trained, data, image) -> None:
        space = sparsity_space(trained, find_groups(trained, image).free, step=4, minimum=0.25)
        network = space.apply(trained, {group.name: space.smallest(group) for group in space.groups})
        before = accuracy(network, data.validation)
        teacher = copy.deepcopy(trained.state_dict())
        finetune(
            network, Teacher(trained.trunk), TrainingBatches(data.train, 50, 0), FinetuneSection(epochs=4, batch=50)
        )
        assert accuracy(network, data.validation) > before + 0.1
        assert not network.training
        assert all(torch.equal(value, teacher[name]) for name, value in trained.state_dict().items())


class TestElastic:
    def test_slices_of_shared_weights_answer_better_than_slices_of_dense_ones(self, trained, data, image) -> None:
        space = sparsity_space(trained, find_groups(trained, image).free, step=4, minimum=0.25)
        shared = copy.deepcopy(trained)
        teacher = copy.deepcopy(trained.state_dict())
        batches = TrainingBatches(data.train, 50, 0)
        train_elastic(shared, Teacher(trained.trunk), space, batches, ElasticSection(epochs=4, batch=50))
        channels = {group.name: space.smallest(group) for group in space.groups}
        ground = ground_of(trained, space, data, "bn")
        plain, elastic = space.apply(trained, channels), space.apply(shared, channels)
        for network in (plain, elastic):
            RECOVERIES[ground.settings.level](ground).recover(network, channels)
        assert accuracy(elastic, data.validation) > accuracy(plain, data.validation)
        assert all(torch.equal(value, teacher[name]) for name, value in trained.state_dict().items())


def ground_of(network, space, data, level, folder=None, **sections) -> RecoveryContext:
    from pathlib import Path

    section = RecoverySection(level=level, images=64, **sections)
    return RecoveryContext(
        network, space, data.train, None, section, folder or Path("/nonexistent"), "key", lambda *_: None
    )


class RecoveryContract:
    """A level keeps the dense network as it is, repeats itself, and says what it did."""

    level: str

    def test_it_recovers_in_place_and_repeats(self, trained, data, image, tmp_path) -> None:
        space = sparsity_space(trained, find_groups(trained, image).free, step=4, minimum=0.25)
        short = {"epochs": 1, "batch": 50}
        ground = ground_of(
            trained,
            space,
            data,
            self.level,
            tmp_path,
            finetune=FinetuneSection(**short),
            elastic=ElasticSection(**short),
        )
        before = copy.deepcopy(trained.state_dict())
        channels = {group.name: space.smallest(group) for group in space.groups}
        found = []
        for _ in range(2):
            level = RECOVERIES[ground.settings.level](ground)
            network = space.apply(level.source, channels)
            level.recover(network, channels)
            assert not network.training
            found.append(network)
        assert same(*found)
        assert level.effort.split()[0] == self.level
        assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())


class TestNothing(RecoveryContract):
    level = "none"


class TestBatchNorm(RecoveryContract):
    level = "bn"


class TestFinetuneLevel(RecoveryContract):
    level = "finetune"


class TestElasticLevel(RecoveryContract):
    level = "elastic"


def test_every_level_keeps_the_contract() -> None:
    assert {subclass.level for subclass in RecoveryContract.__subclasses__()} == set(RECOVERIES)


class TestLength:
    def test_it_is_read(self) -> None:
        assert finetuning("10epochs", None).epochs == 10
        assert finetuning("500 steps", FinetuneSection(minutes=3)).steps == 500
        assert finetuning("20min", FinetuneSection(steps=3)).minutes == 20
        assert finetuning("20min", FinetuneSection(steps=3)).steps is None

    @pytest.mark.parametrize("text", ["", "ten epochs", "10", "0epochs", "-1epochs", "1.5steps", "10 hours"])
    def test_another_is_refused(self, text: str) -> None:
        with pytest.raises(StudyError, match="10epochs, 500steps or 20min"):
            finetuning(text, None)
