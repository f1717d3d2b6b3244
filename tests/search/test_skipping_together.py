"""Gates of blocks beside exits with solved thresholds, streams, other runtimes, and int8 of every kind."""

import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from evaluators.artifact_builder import ArtifactBuilder
from evaluators.deployed import DeployedCandidate, predict
from evaluators.flops.evaluator import FlopsEvaluator
from evaluators.inference.frame_reuse import FrameReuse, Reuse
from evaluators.inference.staged import StagedNetwork, exits_of, leaving_at, skipped_of
from evaluators.latency.evaluator import LatencyEvaluator, Reference
from evaluators.quantization.equalization import equalized
from evaluators.quantization.scheme import Scheme
from evaluators.runtimes.base import Target, TimedBatch
from evaluators.runtimes.onnxruntime_cpu import OnnxRuntime, load
from evaluators.runtimes.openvino_cpu import OpenVino
from evaluators.runtimes.paired_timing import TimingProtocol
from evaluators.streams import Stream
from search.config.overrides import Request
from search.config.study import ExitsSection, Study
from search.pipeline.diagnosis import DiagnosisRequest, diagnose
from search.pipeline.exit_thresholds import ExitThresholdSolver
from search.pipeline.pipeline import CompressionPipeline, build_pipeline
from search.recovery.qat import Int8Network
from search.results.evaluation import Evaluation
from search.training.exit_heads import train_exits
from spaces.candidate import Candidate
from spaces.dimensions import Real
from spaces.dynamic.exit_network import ExitNetwork
from spaces.thresholds import UNSOLVED, Thresholds, ThresholdSpace
from tests.helpers import skippable
from tests.helpers.skippable import BLOCKS

OPEN = dict.fromkeys(BLOCKS, 0.0)


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def network() -> ExitNetwork:
    return skippable.gated(exits=("stem", "second"))


@pytest.fixture(scope="module")
def builder(network, pictures) -> ArtifactBuilder:
    return ArtifactBuilder(network, pictures.numpy(), OnnxRuntime())


@pytest.fixture(scope="module")
def sure(network, pictures) -> dict[str, float]:
    """The thresholds that about a third and half of those that reach the exits pass."""
    chances = torch.from_numpy(said(network, pictures)).softmax(2).amax(2)
    return {name: chances[:, at].quantile(0.7 - 0.2 * at).item() + 1e-4 for at, name in enumerate(network.exit_names)}


def candidate(builder: ArtifactBuilder, exits: dict[str, float], precision: str = "fp32") -> Candidate:
    return Candidate({}, dict.fromkeys(builder.layers, precision), Thresholds(exits, OPEN))


def said(network: ExitNetwork, images: torch.Tensor) -> np.ndarray:
    """Returns what each exit and the end says in torch where images skip what they may, `(n, exits + 1, classes)`."""
    with torch.no_grad():
        features, last = network.run_trunk(images)
        heads = [head(feature) for head, feature in zip(network.exits.values(), features, strict=True)]
        return torch.stack([*heads, last], dim=1).numpy()


@pytest.mark.parametrize("batch", [1, 7])
def test_what_all_exits_say_is_what_each_would_answer_whoever_skips_what(
    batch, network, builder, pictures, sure
) -> None:
    artifact = builder.build(network, candidate(builder, sure))
    opened = OnnxRuntime().open(artifact.deployed, artifact.plan, 1)
    every = opened.all_logits(pictures.numpy(), batch)
    np.testing.assert_allclose(every, said(network, pictures), atol=1e-4)
    logits, routes = opened.answer(pictures.numpy(), batch)
    exits = exits_of(routes)
    assert set(exits) == {0, 1, 2}
    np.testing.assert_allclose(logits, every[np.arange(len(exits)), exits], atol=1e-4)


def test_one_image_takes_the_way_that_it_takes_in_a_batch(network, builder, pictures, sure) -> None:
    for precision in ("fp32", "int8"):
        artifact = builder.build(network, candidate(builder, sure, precision=precision))
        opened = OnnxRuntime().open(artifact.deployed, artifact.plan, 1)
        (alone, ways), (together, same) = (opened.answer(pictures.numpy(), batch) for batch in (1, 40))
        np.testing.assert_array_equal(ways, same)
        np.testing.assert_allclose(alone, together, atol=1e-4)


def test_a_batch_that_is_told_where_to_leave_still_skips(network, builder, pictures, sure) -> None:
    artifact = builder.build(network, candidate(builder, sure))
    stages = [load(stage, 1) for stage in artifact.deployed]
    _, ways = StagedNetwork(stages, leaving_at(artifact.plan, 2))(pictures.numpy())
    for place in (0, 1, 2):
        _, routes = StagedNetwork(stages, TimedBatch(0, 40, exit=place).path_plan(artifact.plan))(pictures.numpy())
        assert set(exits_of(routes)) == {place}
        reached = [0, 2, 3][place]  # no block lies before the first exit, and the last one behind the second
        np.testing.assert_array_equal(skipped_of(routes, 3)[:, :reached], skipped_of(ways, 3)[:, :reached])
        assert not skipped_of(routes, 3)[:, reached:].any()


def test_openvino_skips_the_same_blocks(network, builder, pictures, sure) -> None:
    pytest.importorskip("openvino")
    artifact = builder.build(network, candidate(builder, sure))
    for batch in (1, 7):
        found = [
            library.open(artifact.deployed, artifact.plan, 1).answer(pictures.numpy(), batch)
            for library in (OpenVino(), OnnxRuntime())
        ]
        (here, ways), (there, same) = found
        np.testing.assert_array_equal(ways, same)
        np.testing.assert_allclose(here, there, atol=1e-4)
    opened = OpenVino().open(artifact.deployed, artifact.plan, 1)
    proof = opened.proof(pictures.numpy()[:1], artifact.precisions)
    assert proof.differences == ()


@pytest.mark.parametrize("ranges", ["data", "batchnorm"])
@pytest.mark.parametrize("correction", ["none", "batchnorm", "data"])
def test_int8_of_every_kind_stays_close(ranges, correction, network, pictures) -> None:
    scheme = Scheme(ranges=ranges, bias_correction=correction)
    made = ArtifactBuilder(network, pictures.numpy(), OnnxRuntime(), scheme=scheme)
    whole = dict.fromkeys(network.exit_names)
    for skips in (dict.fromkeys(OPEN), dict.fromkeys(OPEN, 9.0)):
        found = {}
        for precision in ("fp32", "int8"):
            chosen = Candidate({}, dict.fromkeys(made.layers, precision), Thresholds(whole, skips))
            artifact = made.build(network, chosen)
            found[precision], _ = OnnxRuntime().open(artifact.deployed, artifact.plan, 1).answer(pictures.numpy(), 8)
        assert np.abs(found["int8"] - found["fp32"]).max() < 0.25 * np.abs(found["fp32"]).max()


def test_equalized_networks_decide_as_before(network, pictures) -> None:
    even = equalized(network, pictures[:1])
    np.testing.assert_allclose(said(even, pictures), said(network, pictures), atol=1e-3)


def test_trainings_in_int8_skip_what_gates_say_and_leave_gates_alone(network, builder, pictures, sure) -> None:
    graph = builder.trainable()
    found = torch.stack(graph.logits(network.state_dict(), pictures), dim=1)
    np.testing.assert_allclose(found.numpy(), said(network, pictures), atol=1e-4)
    placement = builder.int8_placement(network, candidate(builder, sure, precision="int8"))
    learner = Int8Network(network, graph, placement, "lsq", builder.ranges)
    torch.stack(learner.logits(pictures)).square().sum().backward()
    try:
        assert network.trunk.first.conv1.weight.grad.abs().max() > 0
        assert all(parameter.grad is None for parameter in network.skips.parameters())
    finally:
        network.zero_grad()


def test_solved_thresholds_leave_gates_of_blocks_to_the_sampler() -> None:
    space = ThresholdSpace(("exit1",), 0.5, 0.05, Real(0.0, 0.5, 0.05), solved=True, skips=("first",))
    assert set(space.dimensions()) == {"threshold.skip.first", "threshold.frames"}
    read = space.read({"threshold.skip.first": 0.5, "threshold.frames": 0.1})
    assert read == Thresholds({"exit1": UNSOLVED}, {"first": 0.5}, frames=0.1)
    choices = Candidate({}, {}, read)
    assert choices.is_unsolved
    assert choices.active_exits == ("exit1",)
    assert choices.active_skips == {"first": 0.5}
    assert choices.without_skips().active_skips == {}
    assert not Candidate({}, {}, space.closed()).active_skips
    assert not Candidate({}, {}, Thresholds.from_dict({"exit1": 0.7, "skip.first": -1.0})).is_unsolved, (
        "a gate's logit is no confidence"
    )


@pytest.fixture(scope="module")
def pipeline(cache) -> CompressionPipeline:
    return build_pipeline(
        Study.parse(skippable.STUDY.replace("latency<1000%", "flops<85%"), "the tests"), lambda *_: None
    )


def test_what_is_solved_beside_gates_is_what_the_deployed_files_do(pipeline) -> None:
    images = torch.from_numpy(pipeline.data.validation.images[:])
    with torch.no_grad():
        _, *gates, _ = pipeline.network(images)
    medians = {block: float(each.median()) for block, each in zip(BLOCKS, gates, strict=True)}
    closed = pipeline.space.dense()
    choices = Candidate(closed.channels, closed.precision, Thresholds({"exit1": UNSOLVED}, medians))
    latency = pipeline.references.latency_evaluator(
        {name: spent.work for name, spent in pipeline.references.time().items()}
    )
    dense = pipeline.evaluate(closed, latency).measurements
    settled = ExitThresholdSolver(pipeline, latency, dense).resolve(choices)
    found = settled.candidate
    assert found.active_skips == choices.active_skips, "gates of blocks stay where they were"
    subject = pipeline.deployed(found)
    answers = subject.answers_to(pipeline.threshold_images)
    assert answers.correct.mean() == pytest.approx(settled.thresholds.accuracy)
    assert [share for share in answers.exit_shares if share] == pytest.approx(
        [share for share in settled.thresholds.shares if share]
    )
    assert settled.thresholds.first_cost <= 0.85 * dense["flops"].value
    assert pipeline.flops.measure(subject).value == pytest.approx(settled.thresholds.first_cost, rel=0.1)


@pytest.fixture(scope="module")
def stream(pictures) -> Stream:
    frames = np.repeat(pictures.numpy(), 3, axis=0)
    frames += np.random.default_rng(0).normal(0, 0.01, frames.shape).astype(np.float32)
    return Stream(frames, np.zeros(len(frames), np.int64), np.arange(0, len(frames), 3))


@pytest.fixture(scope="module", params=["exits", "no exits"])
def streamed(request, network, builder, stream, sure) -> Callable[[Reuse | None], DeployedCandidate]:
    chosen = candidate(builder, sure if request.param == "exits" else dict.fromkeys(sure))
    target = Target("onnxruntime", "here", 1, 1)

    def made(reuse: Reuse | None) -> DeployedCandidate:
        artifact = replace(builder.build(network, chosen), reuse=reuse)
        return DeployedCandidate(network, chosen, artifact, stream, OnnxRuntime(), target)

    return made


def test_frames_that_are_computed_skip_blocks(streamed, stream) -> None:
    reuse = Reuse(0.1, 30)
    subject = streamed(reuse)
    artifact = subject.artifact
    loop = FrameReuse(StagedNetwork([load(stage, 1) for stage in artifact.deployed], artifact.plan), 0.1, 30)
    logits, routes, keys = loop(stream.images)
    answers = subject.answers
    assert keys.mean() == pytest.approx(1 / 3, abs=0.02)
    np.testing.assert_array_equal(answers.computed, keys)
    np.testing.assert_array_equal(answers.classes, logits.argmax(axis=1))
    np.testing.assert_array_equal(answers.exits, exits_of(routes))
    np.testing.assert_array_equal(answers.skipped, skipped_of(routes, 3))
    assert sum(count for _, count in answers.profiles) == keys.sum()


def test_flops_of_a_stream_are_those_of_what_its_key_frames_run(streamed, network, stream, pictures) -> None:
    evaluator = FlopsEvaluator(network, pictures[:1])
    reuse = Reuse(0.1, 30)
    whole, some = evaluator.measure(streamed(None)), streamed(reuse)
    found = evaluator.measure(some)
    every = predict(some.session, len(some.artifact.exits) + 1, stream, 1, None, 3)
    keys = some.answers.computed
    always, blocks = evaluator._parts(some, evaluator._by_module(some))
    reached = every.exits[:, None] >= np.arange(every.stages)
    ran = reached[:, evaluator._block_stages(some)] & ~every.skipped
    each = reached @ always + ran @ blocks
    assert found.value == pytest.approx(pictures[0].numel() + (each * keys).mean())
    assert whole.value == pytest.approx(each.mean())
    assert found.notes["blocks_run"] == pytest.approx(ran[keys].mean())


def test_latency_of_a_stream_with_gates_has_a_longest_path(streamed, network, builder) -> None:
    subject = streamed(Reuse(0.1, 30))
    plain = builder.build(network, Candidate({}, {}))
    reference = Reference(plain.deployed[0], 1.0)
    protocol = TimingProtocol(turns=2, calls=200, limit_s=0.3)
    latency = LatencyEvaluator({"fp32": reference}, OnnxRuntime(), subject.target, protocol)
    found = latency.measure(subject)
    assert found.statistic == "expected over the frames of the validation stream"
    assert "ways through the blocks" in found.protocol
    assert found.others["worst"] > found.value


def test_exits_learn_beside_gates_and_leave_them_alone(pipeline) -> None:
    network = copy.deepcopy(pipeline.network)
    train_exits(network, pipeline.data, ExitsSection(training="joint", epochs=1), None, 0, None, lambda *_: None)
    torch.testing.assert_close(network.skips.state_dict(), pipeline.network.skips.state_dict())
    assert not torch.equal(network.trunk.last.conv1.weight, pipeline.network.trunk.last.conv1.weight)


def test_another_network_has_gates_around_its_own_blocks(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.toml").write_text(skippable.STUDY.replace('"all"', '["first"]'))
    study = Request(study="./study.toml", model="tests.helpers.tiny:network").to_study()
    assert study.skips.blocks == "all"
    assert Request(study="./study.toml").to_study().skips.blocks == ("first",)


def test_a_version_that_skips_blocks_is_diagnosed_with_all_of_them_run(pipeline) -> None:
    dense = pipeline.space.dense()
    precision = dict.fromkeys(dense.precision, "int8")
    version = Candidate(dense.channels, precision, Thresholds({"exit1": None}, OPEN))
    evaluation = Evaluation(version, {}, "", {})
    found = diagnose(pipeline, DiagnosisRequest(trial=0, images=20), evaluation, lambda *_: None)
    assert any("every block was run" in remark for remark in found.remarks)
    assert {"first.conv1", "last.conv2"} <= {layer.name for layer in found.compared.layers}
    uniform = diagnose(pipeline, DiagnosisRequest(images=20), None, lambda *_: None)
    assert [layer.name for layer in uniform.compared.layers] == [layer.name for layer in found.compared.layers]
