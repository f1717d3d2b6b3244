"""What every extension that files are written with or run by has to keep, as tests: subclass one in a test of yours.

    class TestReference(RuntimeContract):
        @pytest.fixture
        def runtime(self):
            return Reference()

This module needs pytest; nothing but tests imports it.
"""

import json
from collections.abc import Callable, Sequence

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evaluators.artifact_builder import ArtifactBuilder
from evaluators.deployed import DeployedCandidate, Evaluator
from evaluators.diagnosis.taps import find_taps, with_taps
from evaluators.flops.evaluator import count_by_module
from evaluators.flops.masked import MaskedFlops
from evaluators.inference.staged import skipped_of
from evaluators.measurement import METRICS, Measurement
from evaluators.quantization.calibration import CALIBRATORS
from evaluators.quantization.calibration.base import Calibrator
from evaluators.quantization.calibration.histogram import Histogram
from evaluators.quantization.calibration.ranges import histograms
from evaluators.quantization.scheme import Scheme
from evaluators.runtimes.base import Runtime, Session, TimedBatch, deployed_stages
from evaluators.runtimes.onnxruntime_cpu import OnnxRuntime, load
from evaluators.runtimes.paired_timing import TakeTurn, TimingProtocol
from spaces.candidate import Candidate
from spaces.channels import SparsitySpace
from spaces.dynamic.block_gates import BLOCK_GATES
from spaces.dynamic.block_gates.base import BlockGate
from spaces.dynamic.exit_network import ExitNetwork
from spaces.dynamic.masks.base import masks_of
from spaces.joint import JointSpace
from spaces.precision import PrecisionSpace
from spaces.pruning.criteria import CRITERIA
from spaces.pruning.criteria.base import Evidence
from spaces.pruning.prunable import find_groups
from spaces.testing import BLOCKS, BlockGateContract, MaskContract, exit_network, gated_network, pictures
from spaces.thresholds import Thresholds, ThresholdSpace

_THRESHOLD = 0.6
"""Confidence from which the exits of a contract's network answer."""


def space_of(network: ExitNetwork, layers: Sequence[str]) -> JointSpace:
    """Returns channels in fours, fp32 and int8 for each of some layers, and the exits of a `TinyNetwork`."""
    groups = find_groups(network, pictures(1)).free
    scores = CRITERIA["l2"](network, groups, Evidence(torch.empty(0), torch.empty(0)))
    return JointSpace(
        SparsitySpace(groups, scores, 4, 0.25),
        PrecisionSpace(tuple(layers), ("fp32", "int8")),
        ThresholdSpace(network.exit_names, 0.5, 0.05),
    )


def check_skips(make: BlockGate, runtime: Runtime, batch: int) -> None:
    """Checks that files run the blocks that torch runs, for every image, and answer alike.

    Each gate is asked to open for half of the images.
    """
    network, images = gated_network(make), pictures(40)
    with torch.no_grad():
        _, seen, _ = network.observe(images)
        logits = [network.gate(block)(source).flatten() for block, (source, _) in zip(BLOCKS, seen, strict=True)]
    middles = [float(each.sort().values[19:21].mean()) for each in logits]
    thresholds = dict(zip(BLOCKS, middles, strict=True))
    builder = ArtifactBuilder(network, images.numpy(), runtime)
    artifact = builder.build(
        network, Candidate({}, dict.fromkeys(builder.layers, "fp32"), Thresholds(blocks=thresholds))
    )
    runs: dict[str, Tensor] = {}

    def decide(block: str, logits: Tensor) -> Tensor:
        runs[block] = logits >= thresholds[block]
        return runs[block].float()

    with torch.no_grad():
        _, expected = network.run_trunk(images, decide)
    found, routes = runtime.open(artifact.deployed, artifact.plan, 1).answer(images.numpy(), batch)
    ran = np.column_stack([runs[block].numpy() for block in artifact.blocks])
    assert 0 < ran.mean() < 1
    np.testing.assert_array_equal(~skipped_of(routes, len(artifact.blocks)), ran)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)


class EvaluatorContract:
    """An evaluator measures one known metric, says how, and says the same of the same subject.

    A subclass has the fixtures `evaluator`, which is tested, and `subject`, which it measures.
    """

    repeats_exactly = True

    def test_measures_its_metric_and_says_how(self, evaluator: Evaluator, subject: DeployedCandidate) -> None:
        found = evaluator.measure(subject)
        assert found.metric == evaluator.metric
        assert found.metric in METRICS
        assert np.isfinite(found.value)
        assert found.value > 0
        assert found.n >= 1
        assert found.spread >= 0
        assert found.protocol
        assert found.target

    def test_round_trips_through_json(self, evaluator: Evaluator, subject: DeployedCandidate) -> None:
        found = evaluator.measure(subject)
        assert Measurement.from_dict(json.loads(json.dumps(found.to_dict()))) == found

    def test_every_statistic_of_a_budget_is_there(self, evaluator: Evaluator, subject: DeployedCandidate) -> None:
        found = evaluator.measure(subject)
        for statistic in METRICS[evaluator.metric].statistics:
            assert found.statistic_value(statistic) > 0

    def test_measures_the_same_twice(self, evaluator: Evaluator, subject: DeployedCandidate) -> None:
        if self.repeats_exactly:
            assert evaluator.measure(subject).value == evaluator.measure(subject).value


class RuntimeContract:
    """A runtime loads what it says is deployable, and answers for any batch size that it promises.

    A subclass has the fixture `runtime`, which is tested; the others may be overridden.
    """

    @pytest.fixture(scope="class")
    def network(self) -> ExitNetwork:
        """A network with two exits and four classes."""
        return exit_network()

    @pytest.fixture(scope="class")
    def images(self) -> Tensor:
        """Twelve images for it."""
        return pictures(12)

    @pytest.fixture
    def builder(self, network: ExitNetwork, images: Tensor, runtime: Runtime) -> ArtifactBuilder:
        """What writes files for the runtime."""
        return ArtifactBuilder(network, images.numpy(), runtime)

    @pytest.fixture
    def space(self, network: ExitNetwork, builder: ArtifactBuilder) -> JointSpace:
        """What may vary."""
        return space_of(network, builder.layers)

    @pytest.fixture
    def write(
        self, builder: ArtifactBuilder, network: ExitNetwork, space: JointSpace
    ) -> Callable[[str, float | None], Sequence[bytes]]:
        """Writes the portable files of a precision and a threshold of the exits; at None there are none."""

        def written(precision: str, threshold: float | None) -> Sequence[bytes]:
            return builder.build(network, space.candidate(space.uniform(1.0, precision, threshold))).stages

        return written

    def test_tells_what_it_is(self, runtime: Runtime) -> None:
        assert runtime.missing() is None
        assert runtime.name in runtime.version()
        assert runtime.device()
        assert runtime.state().kind
        able = runtime.capabilities()
        assert able.precisions[0] == "fp32"
        assert set(able.precisions) <= set(able.channel_steps)
        assert min(able.channel_steps.values()) >= 1

    def test_runs_what_it_deploys(
        self, runtime: Runtime, write: Callable[[str, float | None], Sequence[bytes]], images: Tensor
    ) -> None:
        for precision in runtime.capabilities().precisions:
            (stage,) = write(precision, None)
            opened = runtime.open([runtime.deployable(stage)], [], 1)
            logits, exits = opened.answer(images.numpy(), batch=5)
            assert logits.shape == (len(images), 4)
            assert not exits.any()
            one, _ = opened.answer(images.numpy(), batch=1)
            np.testing.assert_allclose(one, logits, atol=1e-4)
            taken = opened.seconds(images.numpy()[:4], 3)
            assert len(taken) == 3
            assert all(spent.work > 0 and spent.wall > 0 for spent in taken)
            assert all(seconds > 0 for seconds in opened.launches(images.numpy()[:4]).values())
            assert not opened.proof(images.numpy()[:4], {}).remarks()

    def test_answers_as_torch_does(
        self,
        runtime: Runtime,
        write: Callable[[str, float | None], Sequence[bytes]],
        network: ExitNetwork,
        images: Tensor,
    ) -> None:
        (stage,) = write("fp32", None)
        found, _ = runtime.open([runtime.deployable(stage)], [], 1).answer(images.numpy(), 4)
        with torch.no_grad():
            np.testing.assert_allclose(found, network(images)[-1].numpy(), atol=1e-4)

    @pytest.fixture
    def exit_stages(
        self, runtime: Runtime, write: Callable[[str, float | None], Sequence[bytes]], network: ExitNetwork
    ) -> list[bytes]:
        """The deployed stages of the network in fp32, with both of its exits."""
        stages = [runtime.deployable(stage) for stage in write("fp32", _THRESHOLD)]
        assert len(stages) == len(network.exit_names) + 1
        return stages

    @pytest.fixture
    def with_exits(self, runtime: Runtime, exit_stages: Sequence[bytes]) -> Session:
        """The network with its exits, loaded."""
        return runtime.open(exit_stages, [_THRESHOLD] * (len(exit_stages) - 1), 1)

    @pytest.fixture
    def take_turn(
        self,
        runtime: Runtime,
        write: Callable[[str, float | None], Sequence[bytes]],
        with_exits: Session,
        images: Tensor,
    ) -> TakeTurn:
        """Turns between four batches of the network with exits and the network without them."""
        (stage,) = write("fp32", None)
        without = runtime.open([runtime.deployable(stage)], [], 1)
        batches = [TimedBatch(0, 4), TimedBatch(4, 4), TimedBatch(0, 4, longest=True), TimedBatch(0, 4, exit=0)]
        return with_exits.turns(images.numpy(), batches, without, 2, TimingProtocol(burst_s=0))

    def test_every_image_is_answered_by_an_exit_or_the_end(self, with_exits: Session, images: Tensor) -> None:
        _, exits = with_exits.answer(images.numpy(), batch=4)
        assert len(exits) == len(images)
        assert set(exits) <= {0, 1, 2}

    def test_all_logits_are_those_of_each_exit_and_the_end(self, with_exits: Session, images: Tensor) -> None:
        assert with_exits.all_logits(images.numpy(), batch=4).shape == (len(images), 3, 4)

    def test_an_answer_has_the_logits_of_its_exit(self, with_exits: Session, images: Tensor) -> None:
        logits, exits = with_exits.answer(images.numpy(), batch=4)
        of_each_exit = with_exits.all_logits(images.numpy(), batch=4)
        np.testing.assert_allclose(of_each_exit[np.arange(len(images)), exits], logits, atol=1e-4)

    def test_no_image_leaves_where_thresholds_are_out_of_reach(
        self, runtime: Runtime, exit_stages: Sequence[bytes], images: Tensor
    ) -> None:
        strict = runtime.open(exit_stages, [0.999] * 2, 1, "margin")
        assert set(strict.answer(images.numpy(), batch=4)[1]) == {2}

    @pytest.mark.parametrize("candidate_first", [True, False])
    def test_a_turn_has_a_ratio_to_the_reference_for_each_batch(
        self, take_turn: TakeTurn, candidate_first: bool
    ) -> None:
        ratios = take_turn(candidate_first).ratios
        assert len(ratios) == 4
        assert all(ratio > 0 for ratio in ratios)

    @pytest.mark.parametrize("candidate_first", [True, False])
    def test_a_turn_has_one_wall_clock_time_for_each_counted_call(
        self, take_turn: TakeTurn, candidate_first: bool
    ) -> None:
        assert [len(wall) for wall in take_turn(candidate_first).walls] == [1, 1, 1, 1]

    def test_blocks_can_be_skipped_where_it_says_so(self, runtime: Runtime) -> None:
        if not runtime.capabilities().skips:
            pytest.skip("this runtime runs every block")
        torch.manual_seed(0)
        check_skips(BLOCK_GATES["aig"], runtime, batch=7)

    def test_int8_stages_answer_as_the_whole_does(
        self, runtime: Runtime, builder: ArtifactBuilder, network: ExitNetwork, space: JointSpace, images: Tensor
    ) -> None:
        if "int8" not in runtime.capabilities().precisions:
            pytest.skip("this runtime has no int8")
        cut, whole = (
            builder.build(network, space.candidate(space.uniform(1.0, "int8", threshold))) for threshold in (0.6, 1.0)
        )
        stages = deployed_stages(runtime, cut.stages, skips=False)
        for batch in (1, 5, len(images)):
            found = runtime.open(stages, [2.0] * len(cut.exits), 1).answer(images.numpy(), batch)[0]
            wanted = runtime.open([runtime.deployable(whole.stages[0])], [], 1).answer(images.numpy(), batch)[0]
            np.testing.assert_allclose(found, wanted, atol=0.02 * float(np.ptp(wanted)))

    def test_what_is_inside_a_file_can_be_seen(
        self, runtime: Runtime, write: Callable[[str, float | None], Sequence[bytes]], images: Tensor
    ) -> None:
        taps = find_taps(write("fp32", None)[0])
        for precision in runtime.capabilities().precisions:
            (stage,) = write(precision, None)
            model, names = with_taps(runtime.deployable(stage), [tap.tensor for tap in taps])
            tensors = runtime.tensors(model)(images.numpy())
            assert set(names) == {tap.tensor for tap in taps}
            for tap in taps:
                assert tensors[names[tap.tensor]].dtype == np.float32
                assert len(tensors[names[tap.tensor]]) == len(images)
            logits, _ = runtime.open([runtime.deployable(stage)], [], 1).answer(images.numpy(), len(images))
            # Other outputs may move a rounding in int8: by a small part of what the logits span, never by more.
            close = 1e-4 if precision == "fp32" else 0.01 * float(np.ptp(logits))
            np.testing.assert_allclose(tensors["logits"], logits, atol=close)

    def test_deployable_leaves_a_float_model_alone(
        self, runtime: Runtime, write: Callable[[str, float | None], Sequence[bytes]]
    ) -> None:
        (stage,) = write("fp32", None)
        assert runtime.deployable(stage) == stage


def _seen() -> dict[str, NDArray[np.float32]]:
    """Returns the values of some activations, by what is special about them."""
    rng = np.random.default_rng(0)
    normal = rng.normal(0, 3, 20_000).astype(np.float32)
    return {
        "both signs": normal,
        "behind a ReLU": np.maximum(normal, 0),
        "long tail": rng.standard_t(3, 20_000).astype(np.float32),
        "even": rng.uniform(-1, 1, 20_000).astype(np.float32),
        "two values": np.repeat(np.array([-2, 5], np.float32), 50),
        "zeros": np.zeros(100, np.float32),
    }


class CalibratorContract:
    """A calibrator clips to a range within the extremes, whatever the scale, and leaves files that answer closely.

    `name` is that of the calibrator, `scheme` has its settings.
    """

    name: str
    scheme = Scheme()

    @pytest.fixture
    def calibrator(self) -> Calibrator:
        """The calibrator that is tested."""
        return CALIBRATORS[self.name]

    @pytest.mark.parametrize("kind", _seen())
    def test_a_range_lies_within_the_extremes_and_holds_zero(self, calibrator: Calibrator, kind: str) -> None:
        histogram = Histogram.of(_seen()[kind])
        low, high = histogram.clipped(calibrator(histogram, self.scheme))
        assert histogram.low <= low <= 0 <= high <= histogram.high
        assert low < high or not histogram.largest

    @pytest.mark.parametrize("kind", _seen())
    def test_a_range_grows_with_its_values(self, calibrator: Calibrator, kind: str) -> None:
        values = _seen()[kind]
        once, twice = (
            calibrator(Histogram.of(values * factor), self.scheme) for factor in (np.float32(1), np.float32(2))
        )
        assert twice == pytest.approx(2 * once) or not values.any()

    def test_reads_the_same_again_and_leaves_the_histogram_alone(self, calibrator: Calibrator) -> None:
        histogram = Histogram.of(_seen()["long tail"])
        counts = histogram.counts.copy()
        assert calibrator(histogram, self.scheme) == calibrator(histogram, self.scheme)
        np.testing.assert_array_equal(histogram.counts, counts)

    def test_an_int8_file_answers_closely(self, calibrator: Calibrator) -> None:
        network, images = exit_network(), pictures(12)
        builder = ArtifactBuilder(network, images.numpy(), OnnxRuntime())
        space = space_of(network, builder.layers)
        (exact,) = builder.build(network, space.dense()).stages
        inside = {name for node in onnx.load_from_string(exact).graph.node for name in node.output}
        found = histograms(exact, sorted(inside & builder.ranges.keys()), images.numpy())
        ranges = {name: each.clipped(calibrator(each, self.scheme)) for name, each in found.items()}
        int8 = space.candidate(space.uniform(1.0, "int8"))
        (file,) = builder.build(network, int8, {**builder.ranges, **ranges}).stages
        logits, wanted = (load(each, 1)(images.numpy())[-1] for each in (file, exact))
        assert 0 < np.sqrt(np.mean((logits - wanted) ** 2) / np.mean(wanted**2)) < 0.15


class BlockGateFileContract(BlockGateContract):
    """A gate decides in the files that are deployed as it does in torch."""

    @pytest.mark.parametrize("batch", [1, 7])
    def test_files_decide_and_answer_as_torch_does(self, make: BlockGate, batch: int) -> None:
        check_skips(make, OnnxRuntime(), batch)


class MaskFileContract(MaskContract):
    """A mask costs what its formula says, its own FLOPs included, and its file answers as torch does."""

    def test_closed_gates_cost_what_the_formula_says(self, plain: nn.Module) -> None:
        network = self.masked(plain)
        flops = MaskedFlops(plain, network, self.images[:1])
        for mask in masks_of(network):
            mask.close()
        layers = count_by_module(plain, self.images[:1])
        expected = sum(layers.values())
        for mask in masks_of(network):
            for number, conv in enumerate(mask.site.convs):
                expected -= layers[conv.path] * (1 - self.closed(mask.site, number))
        assert flops.gates > 0
        assert flops.per_image(self.needs(network)).tolist() == pytest.approx([expected + flops.gates] * 6)

    def test_the_exported_file_answers_as_torch_does(self, plain: nn.Module) -> None:
        network = ExitNetwork(self.undecided(self.masked(plain)), (), ()).eval()
        builder = ArtifactBuilder(network, self.images.numpy(), OnnxRuntime())
        artifact = builder.build(network, Candidate({}, dict.fromkeys(builder.layers, "fp32")))
        with torch.no_grad():
            expected = network.trunk(self.images).numpy()
        answers = load(artifact.stages[0], 0)(self.images.numpy())[-1]
        assert np.abs(answers - expected).max() <= 1e-4 * np.abs(expected).max()
