"""Training in int8: what is exported of it, and what it wins back."""

import copy
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from evaluators.artifact_builder import ArtifactBuilder
from evaluators.quantization.int8 import NO_GRIDS
from evaluators.runtimes.onnxruntime_cpu import OnnxRuntime, load
from search.config.registries import QUANTIZERS, RECOVERIES
from search.config.study import ElasticSection, FittingSection, QatSection, RecoverySection
from search.recovery.base import QatContext, RecoveryContext
from search.recovery.elastic import train_elastic
from search.recovery.mixed_precision import MixedPrecision
from search.recovery.qat import Int8Network, Learned, train_int8, train_int8_kept
from search.training.batchnorm import recalibrate_batch_norm
from search.training.loop import TrainingBatches, fit
from search.training.teacher import Teacher
from spaces.candidate import Candidate
from spaces.dynamic.exit_network import ExitHead, ExitNetwork
from spaces.errors import UserError
from spaces.pruning.prunable import find_groups
from spaces.thresholds import Thresholds
from tests.helpers import tiny
from tests.helpers.tiny import sparsity_space
from tests.search.test_recovery import accuracy, learn, same

SHORT = QatSection(epochs=2, batch=50, learning_rate=0.01)


@pytest.fixture(scope="module")
def data():
    return tiny.splits()


@pytest.fixture(scope="module")
def trained(data):
    """A tiny network that has learned its task, with an exit."""
    torch.manual_seed(0)
    network = ExitNetwork(tiny.network(), ["pool"], [ExitHead(16, 4, 2)])
    fit(network, learn(network), TrainingBatches(data.train, 50, 0), FittingSection(epochs=6, batch=50))
    return network


@pytest.fixture(scope="module")
def builder(trained, data) -> ArtifactBuilder:
    return ArtifactBuilder(trained, data.calibration.images[:], OnnxRuntime())


@pytest.fixture(scope="module")
def sparsity(trained, image):
    return sparsity_space(trained, find_groups(trained, image).free, step=4, minimum=0.25)


@pytest.fixture(scope="module")
def smallest(sparsity) -> dict[str, int]:
    return {group.name: sparsity.smallest(group) for group in sparsity.groups}


def int8_of(builder: ArtifactBuilder, channels=None, some=None, **thresholds: float) -> Candidate:
    return Candidate(
        channels or {}, dict.fromkeys(some or builder.layers, "int8"), Thresholds(thresholds or {"exit1": None})
    )


def learner_of(network, builder, data, candidate, name="lsq") -> Int8Network:
    placement = builder.int8_placement(network, candidate)
    ranges = builder.read_ranges(network, data.calibration.images[:])
    return Int8Network(network, builder.trainable(), placement, name, ranges, candidate.patterns)


def answers(stage: bytes, images: np.ndarray) -> np.ndarray:
    return np.asarray(load(stage, 1)(images)[-1])


def batches(data) -> TrainingBatches:
    return TrainingBatches(data.train, 50, 0)


def scales(stage: bytes) -> np.ndarray:
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load_from_string(stage).graph.initializer}
    return np.concatenate([np.ravel(values[name]) for name in sorted(values) if name.endswith("/scale")])


class QuantizerContract:
    """Gradients reach what learns, a grid is symmetric s8, and the file answers as the training graph."""

    name: str

    def test_a_range_gives_exactly_the_step(self, builder) -> None:
        quantizer = QUANTIZERS[self.name]().activation(-0.3, 1.7)
        low, high = quantizer.range()
        assert np.float32(max(-low, high) / 127) == np.float32(quantizer.step().item())
        assert torch.equal(quantizer(torch.zeros(1, 3)), torch.zeros(1, 3))
        dead = QUANTIZERS[self.name]().activation(0.0, 0.0)
        assert torch.isfinite(dead(torch.tensor([[1.0]]))).all()

    def test_gradients_reach_every_parameter(self, trained, builder, data) -> None:
        network = copy.deepcopy(trained)
        learner = learner_of(network, builder, data, int8_of(builder, exit1=0.8), self.name)
        images = torch.from_numpy(data.train.images[:50])
        torch.stack([logits.square().sum() for logits in learner.logits(images)]).sum().backward()
        for name, parameter in learner.named_parameters():
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
            if self.name == "lsq" or name.startswith("network."):
                assert parameter.grad.abs().sum() > 0 or name.endswith("0.bias"), name

    @pytest.mark.parametrize("share", ["whole", "pruned"])
    def test_the_file_answers_as_the_training_graph(self, share, trained, builder, data, sparsity, smallest) -> None:
        channels = smallest if share == "pruned" else {}
        candidate = int8_of(builder, channels)
        network = sparsity.apply(trained, channels)
        recalibrate_batch_norm(network, torch.from_numpy(data.train.images[:64]))
        learner = learner_of(network, builder, data, candidate, self.name)
        train_int8(learner, Teacher(trained.trunk), batches(data), SHORT.model_copy(update={"steps": 8}))
        learned = learner.learned()
        artifact = builder.build(network, candidate, {**builder.ranges, **learned.ranges}, learned.grids)
        images = data.calibration.images[:]
        with torch.no_grad():
            inside = learner.logits(torch.from_numpy(images))[-1].numpy()
        last = max(high for name, (_, high) in learned.ranges.items() if "act" in name) / 127
        step = last * float(network.trunk.classifier.weight.detach().abs().sum(1).max())
        assert np.abs(answers(artifact.stages[0], images) - inside).max() <= step
        # Behind a ReLU the deployed grid is finer, so only the clipping is the same.
        assert np.sqrt(np.mean((answers(artifact.deployed[0], images) - inside) ** 2)) <= step
        assert np.abs(inside).max() > 10 * step, "the comparison is a sharp one"


class TestLsq(QuantizerContract):
    name = "lsq"


class TestPact(QuantizerContract):
    name = "pact"


class TestDoReFa(QuantizerContract):
    name = "dorefa"


def test_every_method_keeps_the_contract() -> None:
    assert {subclass.name for subclass in QuantizerContract.__subclasses__()} == set(QUANTIZERS)


class TestTraining:
    def test_before_the_first_step_the_file_is_the_one_without_training(self, trained, builder, data) -> None:
        candidate = int8_of(builder, exit1=0.8)
        learned = learner_of(trained, builder, data, candidate).learned()
        ranges = {**builder.ranges, **learned.ranges}
        images = data.calibration.images[:]
        for mine, plain in zip(
            builder.build(trained, candidate, ranges, learned.grids).deployed,
            builder.build(trained, candidate).deployed,
            strict=True,
        ):
            np.testing.assert_allclose(scales(mine), scales(plain), rtol=1e-6)
        one, other = (
            builder.build(trained, int8_of(builder), given, grids).deployed[0]
            for given, grids in ((ranges, learned.grids), (builder.ranges, NO_GRIDS))
        )
        assert np.sqrt(np.mean((answers(one, images) - answers(other, images)) ** 2)) < 0.02

    def test_layers_that_are_not_int8_train_in_float(self, trained, builder, data) -> None:
        candidate = int8_of(builder, some=["inner.0"])
        learner = learner_of(copy.deepcopy(trained), builder, data, candidate)
        assert len(learner.weights) == 1
        assert len(learner.activations) == 2, "what goes in and what comes out"
        assert set(learner.learned().grids) == {"trunk.inner.0.weight"}

    def test_a_killed_training_goes_on_and_ends_the_same(self, trained, builder, data, tmp_path, monkeypatch) -> None:
        candidate = int8_of(builder)
        straight, killed, again = (learner_of(copy.deepcopy(trained), builder, data, candidate) for _ in range(3))
        train_int8(straight, Teacher(trained.trunk), batches(data), SHORT)
        file, calls = tmp_path / "checkpoint.pt", 0

        def dies(done: int, total: int) -> None:
            nonlocal calls
            calls += 1
            if done > 60:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train_int8(killed, Teacher(trained.trunk), batches(data), SHORT, file, dies)
        assert file.is_file()
        first = []
        train_int8(again, Teacher(trained.trunk), batches(data), SHORT, file, lambda done, total: first.append(done))
        assert first[0] == 50, "the first epoch is not repeated"
        assert same(again, straight)
        assert again.learned().ranges == straight.learned().ranges

    def test_it_wins_back_what_int8_costs_a_pruned_network(self, trained, builder, data, sparsity, smallest) -> None:
        candidate = int8_of(builder, smallest)
        network = sparsity.apply(trained, smallest)
        recalibrate_batch_norm(network, torch.from_numpy(data.train.images[:64]))
        learner = learner_of(network, builder, data, candidate)
        before = deployed_loss(builder, network, candidate, data, learner.learned())
        train_int8(learner, Teacher(trained.trunk), batches(data), SHORT.model_copy(update={"distillation": 0.0}))
        assert deployed_loss(builder, network, candidate, data, learner.learned()) < 0.9 * before

    def test_zeros_of_a_pattern_stay_zeros(self, trained, builder, data) -> None:
        from spaces.patterns import apply_patterns

        network = copy.deepcopy(trained)
        patterns = {"inner.0": "2:4", "hidden": "75%"}
        apply_patterns(network, patterns)
        zeros = {path: network.get_parameter(path) == 0 for path in ("trunk.inner.0.weight", "trunk.hidden.weight")}
        candidate = Candidate({}, dict.fromkeys(builder.layers, "int8"), Thresholds({"exit1": None}), patterns)
        learner = learner_of(network, builder, data, candidate)
        train_int8(learner, Teacher(trained.trunk), batches(data), SHORT.model_copy(update={"steps": 4}))
        grids = learner.learned().grids
        for path, where in zeros.items():
            assert where.any()
            assert torch.equal(network.get_parameter(path) == 0, where)
            assert not grids[path].values[where.numpy()].any()

    def test_bf16_leaves_the_grid_as_it_is(self, trained, builder, data) -> None:
        learner = learner_of(trained, builder, data, int8_of(builder))
        seen = []
        for quantizer in (*learner.activations, *learner.weights):
            quantizer.register_forward_hook(lambda _module, args, out: seen.append((args[0].dtype, out)))
        images = torch.from_numpy(data.train.images[:8])
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            learner.logits(images)
        assert len(seen) > 10
        for given_dtype, out in seen:
            assert given_dtype == out.dtype == torch.float32


def deployed_loss(builder, network, candidate, data, learned: Learned) -> float:
    artifact = builder.build(network, candidate, {**builder.ranges, **learned.ranges}, learned.grids)
    logits = torch.from_numpy(answers(artifact.deployed[0], data.validation.images[:]))
    return nn.functional.cross_entropy(logits, torch.from_numpy(data.validation.labels)).item()


def ground_of(trained, sparsity, data, builder, folder: Path, **sections) -> RecoveryContext:
    int8 = QatContext(builder, data.calibration.images[:], "int8")
    section = RecoverySection(images=64, qat=SHORT, **sections)
    return RecoveryContext(trained, sparsity, data.train, None, section, folder, "key", lambda *_: None, int8)


class TestKept:
    def test_what_was_trained_is_loaded_bit_for_bit(self, trained, builder, data, sparsity, smallest, tmp_path) -> None:
        ground = ground_of(trained, sparsity, data, builder, tmp_path)
        candidate, digests = int8_of(builder, smallest), set()
        for _ in range(2):
            network = sparsity.apply(trained, smallest)
            learned = train_int8_kept(ground, ground.int8, network, candidate, SHORT, "start")
            ranges = {**builder.ranges, **learned.ranges}
            digests.add(builder.build(network, candidate, ranges, learned.grids).digest)
        assert len(digests) == 1
        assert len(list((tmp_path / "recovered").iterdir())) == 1
        other = int8_of(builder, smallest, builder.layers[:2])
        train_int8_kept(ground, ground.int8, sparsity.apply(trained, smallest), other, SHORT, "start")
        assert len(list((tmp_path / "recovered").iterdir())) == 2, "other precisions are another training"


class TestElastic:
    SETTINGS = ElasticSection(epochs=2, batch=50)

    def test_shared_weights_serve_two_mixes_of_precisions(self, trained, builder, data, sparsity, tmp_path, smallest):
        ground = ground_of(trained, sparsity, data, builder, tmp_path, level="elastic", elastic=self.SETTINGS)
        level = RECOVERIES[ground.settings.level](ground)
        assert level.effort == "elastic 2 epochs or 30 CPU min with qat (lsq)"
        assert set(level.ranges) == set(builder.trainable().scales())
        assert level.ranges != {name: builder.ranges[name] for name in level.ranges}, "steps have learned"
        ranges = {**builder.read_ranges(level.source, data.calibration.images[:]), **level.ranges}
        plain = sparsity.apply(trained, smallest)
        recalibrate_batch_norm(plain, torch.from_numpy(data.train.images[:64]))
        floor = accuracy(plain, data.validation)
        for some in (builder.layers, builder.layers[::2]):
            candidate = int8_of(builder, smallest, some)
            network = sparsity.apply(level.source, smallest)
            level.recover(network, smallest)
            (stage,) = builder.build(network, candidate, ranges).deployed
            found = answers(stage, data.validation.images[:]).argmax(1)
            assert (found == data.validation.labels).mean() > floor
        again = RECOVERIES[ground.settings.level](ground)
        assert same(again.source, level.source)
        assert again.ranges == level.ranges

    def test_a_slice_answers_as_its_file_will(self, trained, builder, data, sparsity, smallest, tmp_path) -> None:
        """With statistics of the same batch, the file is the training graph."""
        ground = ground_of(trained, sparsity, data, builder, tmp_path)
        mixed = MixedPrecision(trained, ground.int8, "lsq")
        network = sparsity.apply(trained, smallest)
        images = torch.from_numpy(data.train.images[:64])
        recalibrate_batch_norm(network, images)
        candidate = int8_of(builder, smallest)
        with torch.no_grad():
            inside = mixed.logits(network, dict(network.named_parameters()), builder.layers, images)[-1].numpy()
        (stage,) = builder.build(network, candidate, {**builder.ranges, **mixed.ranges()}).stages
        found = answers(stage, images.numpy())
        assert np.sqrt(np.mean((found - inside) ** 2) / np.mean(inside**2)) < 0.05

    def test_all_layers_are_int8_in_the_first_version_and_any_share_in_the_others(
        self, trained, builder, data, sparsity, tmp_path
    ):
        mixed = MixedPrecision(trained, ground_of(trained, sparsity, data, builder, tmp_path).int8, "lsq")
        first, *others = mixed.choices(200, torch.Generator().manual_seed(0))
        assert tuple(first) == builder.layers
        assert {len(some) for some in others} == set(range(len(builder.layers) + 1))

    def test_a_scale_for_all_channels_is_refused(self, trained, data, sparsity, tmp_path) -> None:
        from evaluators.quantization.scheme import Scheme

        coarse = ArtifactBuilder(
            trained, data.calibration.images[:], OnnxRuntime(), scheme=Scheme(weights="per-tensor")
        )
        ground = ground_of(trained, sparsity, data, coarse, tmp_path)
        with pytest.raises(UserError, match=r"got weights = 'per-tensor' in \[quantization\]"):
            MixedPrecision(trained, ground.int8, "lsq")

    def test_a_killed_training_goes_on_and_ends_the_same(self, trained, builder, data, sparsity, tmp_path) -> None:
        int8 = ground_of(trained, sparsity, data, builder, tmp_path).int8
        short = ElasticSection(epochs=2, batch=50)

        def run(report=lambda done, total: None, file: Path | None = None) -> MixedPrecision:
            shared = copy.deepcopy(trained)
            mixed = MixedPrecision(shared, int8, "lsq")
            train_elastic(shared, Teacher(trained.trunk), sparsity, batches(data), short, file, report, mixed)
            return mixed

        def dies(done: int, total: int) -> None:
            if done > 60:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(dies, tmp_path / "checkpoint.pt")
        assert (tmp_path / "checkpoint.pt").is_file()
        assert same(run(file=tmp_path / "checkpoint.pt"), run())
