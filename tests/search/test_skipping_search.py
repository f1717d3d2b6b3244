"""Gates from their training to the bundle."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluators.flops.evaluator import count_by_module
from evaluators.runtimes.onnxruntime_cpu import OnnxRuntime
from search.cli import run
from search.config.budget import Budget
from search.config.study import ElasticSection, FinetuneSection, SkipsSection, Study
from search.deploy.bundle import confirm, time_again, write_bundle
from search.pipeline.evaluators import static_evaluators
from search.pipeline.pipeline import CompressionPipeline, build_pipeline
from search.recovery.elastic import train_elastic
from search.recovery.finetune import finetune
from search.results.pareto import Version
from search.training.batchnorm import recalibrate_batch_norm
from search.training.block_gates import SampledGates, calibrate_gates, rate_loss, skip_blocks, train_gates, with_gates
from search.training.loop import TrainingBatches
from spaces.candidate import Candidate
from spaces.dynamic.exit_network import ExitNetwork, decided
from spaces.pruning.criteria.base import Evidence
from spaces.pruning.criteria.reduction import loss_gradients
from spaces.thresholds import Thresholds
from tests.helpers import skippable, tiny
from tests.helpers.searches import stored
from tests.helpers.skippable import BLOCKS


@pytest.fixture(scope="module")
def pipeline(cache) -> CompressionPipeline:
    return build_pipeline(Study.parse(skippable.STUDY, "the tests' study"), lambda *_: None)


@pytest.fixture(scope="module")
def candidate(pipeline: CompressionPipeline) -> Candidate:
    """The dense network, with the thresholds at which each gate lets about half of the images run its block."""
    images = torch.from_numpy(pipeline.data.validation.images[:])
    with torch.no_grad():
        _, *gates, _ = pipeline.network(images)
    medians = {block: float(each.median()) for block, each in zip(BLOCKS, gates, strict=True)}
    dense = pipeline.space.dense()
    return Candidate(dense.channels, dense.precision, Thresholds(dense.thresholds.exits, medians))


def test_gradients_reach_the_gates_from_the_answers_and_from_the_rate() -> None:
    network = skippable.gated().train()
    gates = SampledGates(1.0, torch.Generator().manual_seed(0))
    _, logits = network.run_trunk(torch.randn(16, 1, 8, 8), gates)
    logits.square().sum().backward(retain_graph=True)
    answers = [network.gate(block).reduce.weight.grad.clone() for block in BLOCKS]
    rate_loss(gates.taken, 0.6).backward()
    both = [network.gate(block).reduce.weight.grad for block in BLOCKS]
    for first, second in zip(answers, both, strict=True):
        assert first.abs().max() > 0
        assert not torch.equal(first, second)


def test_sampled_gates_are_open_as_often_as_they_say() -> None:
    logits = torch.full((20_000, 1), 0.7)
    runs = SampledGates(1.0, torch.Generator().manual_seed(0))("block", logits)
    assert set(runs.unique().tolist()) == {0.0, 1.0}
    assert runs.mean().item() == pytest.approx(torch.sigmoid(torch.tensor(0.7)).item(), abs=0.01)


def test_gates_learn_the_rate_that_they_are_told() -> None:
    settings = SkipsSection(blocks="all", rate=0.3, weight=100.0, epochs=20, batch=50, learning_rate=0.05)
    torch.manual_seed(0)
    trunk, image = skippable.network().eval(), torch.zeros(1, 1, 8, 8)
    network = with_gates(trunk, skip_blocks(trunk, settings, image), settings, image)
    train_gates(network, TrainingBatches(tiny.splits().train, settings.batch, 0), settings)
    gates = SampledGates(1.0, torch.Generator().manual_seed(1))
    with torch.no_grad():
        network.run_trunk(torch.from_numpy(tiny.splits().validation.images), gates)
    for runs in gates.taken:
        assert runs.mean().item() == pytest.approx(0.3, abs=0.15)


def test_calibrated_gates_run_their_blocks_for_the_share_that_was_asked_for() -> None:
    network, images = skippable.gated(seed=1), torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    for block in BLOCKS:
        network.gate(block).decide.bias.data.add_(9.0)  # so that nobody would skip anything
    order = {}
    for after in (False, True):

        def seen(block: str, logits: torch.Tensor, after: bool = after) -> torch.Tensor:
            order[block, after] = logits.detach()
            return decided(block, logits)

        network.run_trunk(images, seen)
        if not after:
            calibrate_gates(network, images, 0.3)
    for block in BLOCKS:
        logits = order[block, True]
        assert (logits >= 0).float().mean().item() == pytest.approx(0.3, abs=0.01)
        assert logits.std().item() == pytest.approx(1.0, abs=0.01)
    first = [order[BLOCKS[0], after].flatten().argsort() for after in (False, True)]
    assert torch.equal(*first), "which images need a block more does not change"


def test_gates_of_a_study_are_calibrated(pipeline: CompressionPipeline) -> None:
    ran = {}
    images = torch.from_numpy(pipeline.data.calibration.images[:])
    with torch.no_grad():
        pipeline.network.run_trunk(images, lambda block, logits: ran.setdefault(block, decided(block, logits)))
    for runs in ran.values():
        assert runs.mean().item() == pytest.approx(0.6, abs=1 / len(images) + 1e-6)


def test_trainings_that_follow_leave_gates_as_they_are(pipeline: CompressionPipeline) -> None:
    batches = TrainingBatches(tiny.splits().train, 50, 0)
    tuned, elastic = copy.deepcopy(pipeline.network), copy.deepcopy(pipeline.network)
    finetune(tuned, pipeline.compressor.context.teacher, batches, FinetuneSection(epochs=1, batch=50))
    train_elastic(
        elastic,
        pipeline.compressor.context.teacher,
        pipeline.space.sparsity,
        batches,
        ElasticSection(epochs=1, batch=50),
    )
    for trained in (tuned, elastic):
        for block in BLOCKS:
            torch.testing.assert_close(trained.gate(block).state_dict(), pipeline.network.gate(block).state_dict())
        assert not torch.equal(trained.trunk.last.conv1.weight, pipeline.network.trunk.last.conv1.weight)


def test_gates_are_trained_once(pipeline: CompressionPipeline, cache: Path) -> None:
    assert pipeline.network.skip_blocks == BLOCKS
    again = build_pipeline(
        Study.parse(skippable.STUDY, "the tests' study"),
        lambda step, *_: pytest.fail(step) if "Training" in step else None,
    )
    for name, value in pipeline.network.state_dict().items():
        torch.testing.assert_close(again.network.state_dict()[name], value, rtol=0, atol=0)
    assert "first, second, last; down always run" in pipeline.remarks[0]


def test_flops_are_those_of_the_blocks_that_each_image_ran(pipeline: CompressionPipeline, candidate: Candidate) -> None:
    subject = pipeline.deployed(candidate)
    flops = pipeline.flops.measure(subject)
    counts = count_by_module(ExitNetwork(pipeline.network.trunk, (), ()), torch.zeros(1, 1, 8, 8))
    blocks = np.array([sum(n for path, n in counts.items() if path.startswith(f"trunk.{b}.")) for b in BLOCKS])
    gates = sum(n for path, n in count_by_module(pipeline.network, torch.zeros(1, 1, 8, 8)).items() if "skips." in path)
    ran = ~subject.answers.skipped
    assert 0.2 < ran.mean() < 0.8
    assert flops.value == pytest.approx(sum(counts.values()) + gates - ((~ran) @ blocks).mean())
    assert flops.others["worst"] == pytest.approx(sum(counts.values()) + gates)
    assert flops.notes["blocks_run"] == pytest.approx(ran.mean())
    assert flops.notes["blocks_run_std"] == pytest.approx(ran.mean(axis=1).std())
    assert flops.notes["ran last"] == pytest.approx(ran[:, 2].mean())


def test_gates_have_no_part_in_what_channels_are_ranked_by(pipeline: CompressionPipeline) -> None:
    calibration = pipeline.data.calibration
    evidence = Evidence(torch.from_numpy(calibration.images[:]), torch.from_numpy(calibration.labels))
    (gradients,) = loss_gradients(pipeline.network, evidence, len(calibration))
    assert any(name.startswith("exits.") for name in gradients)
    assert not any(name.startswith("skips.") for name in gradients)


def test_batch_statistics_are_those_of_the_images_that_get_there() -> None:
    network = skippable.gated()
    images = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(4))
    recalibrate_batch_norm(network, images)
    read: list[torch.Tensor] = []
    network.trunk.last.conv1.register_forward_hook(lambda _module, _args, out: read.append(out.mean((0, 2, 3))))
    with torch.no_grad():
        network.run_trunk(images)
        network(images)
    skipping, all_run = ((network.trunk.last.bn1.running_mean - mean).abs().max() for mean in read)
    assert skipping < 0.2 * all_run


def test_params_leave_out_gates_that_are_not_deployed(pipeline: CompressionPipeline, candidate: Candidate) -> None:
    gates = sum(parameter.numel() for parameter in pipeline.network.skips.parameters())
    params = static_evaluators(pipeline.flops)[0]
    closed = pipeline.deployed(pipeline.space.dense())
    assert params.measure(pipeline.deployed(candidate)).value - params.measure(closed).value == gates


def test_latency_is_expected_over_ways_and_the_worst_runs_all(
    pipeline: CompressionPipeline, candidate: Candidate
) -> None:
    subject = pipeline.deployed(candidate)
    references = pipeline.references.artifacts
    latency = pipeline.references.latency_evaluator(dict.fromkeys(references, 1e-3)).measure(subject)
    assert "ways through the blocks" in latency.protocol
    assert latency.statistic == "expected over the validation images"
    assert latency.others["worst"] > 0


def test_a_target_that_does_not_skip_blocks_gets_a_network_without_gates(cache: Path) -> None:
    class Rigid(OnnxRuntime):
        def capabilities(self):
            return replace(super().capabilities(), skips=False)

    pipeline = build_pipeline(Study.parse(skippable.STUDY, "the tests' study"), lambda *_: None, Rigid())
    assert pipeline.network.skip_blocks == ()
    assert "[skips] is left out" in pipeline.remarks[0]
    assert not any("skip" in name for name in pipeline.space.dimensions())


def test_a_bundle_skips_the_same_blocks_elsewhere(pipeline, candidate, tmp_path, capsys) -> None:
    (tmp_path / "study.toml").write_text(skippable.STUDY)
    here = Path.cwd()
    os.chdir(tmp_path)
    try:
        assert run(["--study", "./study.toml", "--search", "one", "--runs", "runs"]) in (0, 1)
    finally:
        os.chdir(here)
    search = stored(tmp_path / "runs")
    budget = Budget.parse(["latency<1000%"])
    latency = pipeline.references.latency_evaluator(search.baseline.reference_seconds)
    version = Version(0, pipeline.evaluate(candidate, latency))
    found = time_again(pipeline, search, [version], budget, "accuracy", lambda _: None)
    assert found.chosen is not None
    confirmed = confirm(pipeline, search, found.chosen)
    assert confirmed.is_same_artifact
    out = tmp_path / "deploy"
    write_bundle(out, pipeline, search, budget, confirmed)  # which lets it check itself
    done = subprocess.run([sys.executable, "-I", str(out / "run.py")], capture_output=True, text=True, check=True)
    passed = confirmed.answers.skipped.sum(axis=0)
    for block, count in zip(BLOCKS, passed, strict=True):
        assert f"skipped {block}: {count}" in done.stdout
    capsys.readouterr()
    assert run(["measure", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["correct"] == found["expected"]
    trials = [trial for trial in search.trials if trial.params.get("threshold.skip.first") not in (None, -4.0)]
    assert trials
