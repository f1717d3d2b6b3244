"""Searches in which residual blocks are left out: recovery, samplers, and from the first trial to the bundle."""

import copy
import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient

from evaluators.deployed import DeployedCandidate
from evaluators.flops.evaluator import count_by_module
from evaluators.runtimes.base import TargetError
from evaluators.runtimes.registry import runtime
from search.cli import run
from search.config.study import ElasticSection, FinetuneSection, Study
from search.loop.sampler_prior import problem_prior
from search.pipeline.pipeline import CompressionPipeline, build_pipeline
from search.recovery.elastic import SharedWeights, random_depth, train_elastic
from search.recovery.finetune import finetune_kept
from search.recovery.gradual_pruning import RAMP, GradualPruning
from search.samplers.distributions import distributions, first_guesses
from search.samplers.hypervolume.encoding import Codec
from search.tracking.store import Tracking
from search.training.loop import TrainingBatches
from search.training.teacher import Teacher
from spaces.candidate import Candidate
from spaces.depth import shortened
from spaces.dynamic.exit_network import ExitNetwork
from tests.helpers import deep, tiny
from tests.helpers.searches import stored

QUIET = lambda *_: None  # noqa: E731


def pipeline_of(recovery: str = "", network: str = "network", exits: str = "") -> CompressionPipeline:
    """Returns the pipeline of the tests' study with another recovery, network or exits."""
    text = deep.STUDY.replace("deep:network", f"deep:{network}")
    if recovery:
        text = text.replace(tiny.RECOVERY, f"recovery = {{images = 64, {recovery}}}")
    if exits:
        text = text.replace('exits = {after = ["stage1"], grid = 2, epochs = 5}', f"exits = {exits}")
    return build_pipeline(Study.parse(text, "the tests' study"), QUIET)


@pytest.fixture(scope="module")
def pipeline(cache) -> CompressionPipeline:
    return pipeline_of()


def without(pipeline: CompressionPipeline, precision: str = "fp32", keep: float = 1.0, depth: float = 0.5) -> Candidate:
    """Returns a version without exits that lacks half of the blocks that can go."""
    candidate = pipeline.space.candidate(pipeline.space.uniform(keep, precision, depth=depth))
    assert candidate.removed_blocks
    return pipeline.space.with_thresholds(candidate, candidate.thresholds.without_exits())


def torch_classes(deployed: DeployedCandidate) -> np.ndarray:
    """Returns the classes that a version's network in torch predicts for its images, without exits."""
    with torch.no_grad():
        logits = deployed.network.trunk(torch.from_numpy(deployed.validation.images[:]))
    return logits.argmax(1).numpy()


def test_each_stage_has_a_dimension_and_the_block_that_an_exit_reads_stays(pipeline) -> None:
    dimensions = {name: each for name, each in pipeline.space.dimensions().items() if name.startswith("depth.")}
    assert {name: (each.low, each.high) for name, each in dimensions.items()} == {
        "depth.stage1": (0, 2),
        "depth.stage2": (0, 2),
    }
    whole = pipeline.space.candidate({**pipeline.space.uniform(1.0, "fp32"), "depth.stage1": 0})
    assert whole.removed_blocks == ("stage1.0", "stage1.1")
    assert not any("depth" in remark for remark in pipeline.remarks)
    assert [stage["name"] for stage in pipeline.structure()["stages"]] == ["stage1", "stage2"]


def test_the_order_is_measured_once_and_the_network_is_the_same_after_it(pipeline) -> None:
    def progress(step: str, *_) -> None:
        assert "which blocks can go" not in step, "it was measured before"

    again = build_pipeline(pipeline.study, progress)
    assert again.space.depth.stages == pipeline.space.depth.stages
    assert again.fingerprint == pipeline.fingerprint, "or a search could not go on"


@pytest.mark.parametrize("setting", ['only = ["channels", "precision"]', "keep_blocks_at_least = 1.0"])
def test_depth_is_left_out_where_it_is_not_searched(setting: str, cache) -> None:
    text = deep.STUDY.replace("keep_blocks_at_least = 0.0", setting)
    pipeline = build_pipeline(Study.parse(text, "test"), QUIET)
    assert not any(name.startswith("depth.") for name in pipeline.space.dimensions())
    assert not any("depth" in remark for remark in pipeline.remarks)


def test_a_network_without_such_blocks_says_so_once(cache) -> None:
    pipeline = build_pipeline(Study.parse(tiny.STUDY, "test"), QUIET)
    assert not any(name.startswith("depth.") for name in pipeline.space.dimensions())
    (remark,) = [remark for remark in pipeline.remarks if "depth" in remark]
    assert "no residual blocks that return their input's shape" in remark


def test_guesses_try_shorter_networks(pipeline) -> None:
    tried = {len(pipeline.space.candidate(guess).removed_blocks) for guess in first_guesses(pipeline.space)}
    assert tried > {0}


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_a_shorter_version_is_recovered_and_deployed_as_torch_answers(pipeline, precision: str, keep: float) -> None:
    candidate = without(pipeline, precision, keep)
    assert pipeline.compressor.plan(candidate).effort == "bn"
    compressed = pipeline.compress(candidate)
    deployed = pipeline.deploy(candidate, compressed)
    names = compressed.network.state_dict()
    assert not any(name.startswith(f"trunk.{block}.") for name in names for block in candidate.removed_blocks)
    images = pipeline.data.validation.images[:]
    with torch.no_grad():
        expected = compressed.network.trunk(torch.from_numpy(images)).numpy()
    found, _ = pipeline.runtime.open(deployed.artifact.deployed, deployed.artifact.plan, 1).answer(images, 4)
    if precision == "fp32":
        np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.mean(found.argmax(1) == expected.argmax(1)) > 0.9


@pytest.mark.parametrize("pruning", ["one-shot", "gradual"])
def test_fine_tuning_of_a_shorter_network_goes_on_after_an_interrupt(pruning, pipeline, tmp_path) -> None:
    options = FinetuneSection(epochs=3, batch=50, learning_rate=0.02, pruning=pruning)
    candidate = replace(without(pipeline, keep=0.5), patterns={"stage2.0.conv1": "50%"})
    images = torch.from_numpy(pipeline.data.train.images[:64])
    steps: list[int] = []

    def tune(folder: Path, say) -> ExitNetwork:
        network = pipeline.space.apply(pipeline.network, candidate)
        before = [parameter.clone() for parameter in network.parameters()]
        ground = replace(pipeline.compressor.context, folder=folder, say=say)
        finetune_kept(ground, network, candidate.channels, options, images, "", candidate.patterns)
        assert any(not torch.equal(old, new) for old, new in zip(before, network.parameters(), strict=True))
        return network

    def crash(_step: str, done: int, _total: int) -> None:
        if done > 40:
            raise KeyboardInterrupt

    dense = {name: value.clone() for name, value in pipeline.network.state_dict().items()}
    straight = tune(tmp_path / "one", QUIET)
    with pytest.raises(KeyboardInterrupt):
        tune(tmp_path / "two", crash)
    resumed = tune(tmp_path / "two", lambda _step, done, _total: steps.append(done))
    assert steps[0] == 33, "percent: the first of three epochs is not repeated"
    for name, value in straight.state_dict().items():
        assert torch.allclose(value, resumed.state_dict()[name], atol=1e-6), name
    assert float((straight.trunk.stage2[0].conv1.weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
    assert all(torch.equal(value, dense[name]) for name, value in pipeline.network.state_dict().items())


def test_versions_of_another_depth_are_trained_apart(pipeline, tmp_path) -> None:
    options, images = FinetuneSection(epochs=1, batch=50), torch.from_numpy(pipeline.data.train.images[:64])
    ground = replace(pipeline.compressor.context, folder=tmp_path)
    channels = pipeline.space.dense().channels
    for blocks in ((), ("stage1.0",), ("stage1.1",)):
        version = shortened(copy.deepcopy(pipeline.network), blocks)
        finetune_kept(ground, version, channels, options, images, "")
    assert len(list((tmp_path / "recovered").glob("finetune-*.pt"))) == 3


def test_gradual_training_of_a_shorter_network_narrows_to_the_candidate(pipeline) -> None:
    candidate = without(pipeline, keep=0.5)
    wide = shortened(pipeline.network, candidate.removed_blocks)
    narrowing = GradualPruning(wide, {}, candidate.channels, pipeline.space.sparsity)
    images = torch.from_numpy(pipeline.data.train.images[:8])
    with torch.no_grad():
        found = narrowing.logits(images, RAMP)[-1]
        expected = pipeline.space.apply(pipeline.network, candidate).train().trunk(images)
    torch.testing.assert_close(found, expected)


@settings(deadline=None, max_examples=10)
@given(st.sets(st.sampled_from(deep.REMOVABLE)), st.sampled_from([0.5, 1.0]))
def test_the_weights_of_a_shorter_network_are_a_slice_of_the_shared_ones(pipeline, blocks, keep) -> None:
    space = pipeline.space.sparsity
    channels = {group.name: round(group.channels * keep) for group in space.groups}
    shared = SharedWeights(pipeline.network, space)
    part = shared.slice(channels, sorted(blocks))
    expected = shortened(space.apply(pipeline.network, channels), blocks).train()
    images = torch.from_numpy(pipeline.data.train.images[:8])
    with torch.no_grad():
        torch.testing.assert_close(shared.logits(part, images)[-1], expected.trunk(images))
    loss = shared.logits(part, images)[-1].square().sum()
    pipeline.network.zero_grad()
    loss.backward()
    for block in deep.REMOVABLE:
        gradient = pipeline.network.trunk.get_submodule(block).conv1.weight.grad
        assert (gradient is None or not gradient.abs().sum()) == (block in blocks)
    pipeline.network.zero_grad()


def test_elastic_training_draws_every_depth(pipeline) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [random_depth(pipeline.space.depth, generator) for _ in range(200)]
    assert {len(blocks) for blocks in drawn} == {0, 1, 2, 3, 4}
    for blocks in drawn:
        for stage in pipeline.space.depth.stages:
            gone = [block for block in stage.leaving if block in blocks]
            assert gone == list(stage.leaving[: len(gone)]), "in the order of leaving"


def test_an_elastic_training_with_depth_goes_on_after_an_interrupt(pipeline, tmp_path) -> None:
    options = ElasticSection(epochs=3, batch=50)
    file = tmp_path / "checkpoint.pt"

    def train(checkpoint: Path, say) -> dict[str, torch.Tensor]:
        network = copy.deepcopy(pipeline.network)
        batches = TrainingBatches(pipeline.data.train, options.batch, 0)
        teacher, space = pipeline.network, pipeline.space
        train_elastic(
            network, Teacher(teacher.trunk), space.sparsity, batches, options, checkpoint, say, None, space.depth
        )
        return network.state_dict()

    def crash(done: int, _total: int) -> None:
        if done > 40:
            raise KeyboardInterrupt

    straight = train(tmp_path / "straight.pt", QUIET)
    with pytest.raises(KeyboardInterrupt):
        train(file, crash)
    steps: list[int] = []
    resumed = train(file, lambda done, _total: steps.append(done))
    assert steps[0] == 33, "percent: the first of three epochs is not repeated"
    assert all(torch.equal(value, resumed[name]) for name, value in straight.items())


def test_shared_weights_depend_on_which_blocks_may_go(cache) -> None:
    recovery = 'level = "elastic", elastic = {epochs = 1, batch = 50}'
    deep_ones, whole = pipeline_of(recovery), pipeline_of(recovery)
    candidate = without(deep_ones, keep=0.5)
    compressed = deep_ones.compress(candidate)
    assert compressed.plan.effort.startswith("elastic 1 epoch")
    again = whole.compress(candidate)
    for name, value in compressed.network.state_dict().items():
        assert torch.equal(value, again.network.state_dict()[name]), "trained once, and read again"


QAT = "qat = {epochs = 1, batch = 50}"


@pytest.mark.parametrize(
    ("network", "exits"), [("network", ""), ("normalising", "{after = []}")], ids=["residual", "normalising first"]
)
@pytest.mark.parametrize(
    "level",
    [
        f'level = "finetune", finetune = {{epochs = 1, batch = 50}}, {QAT}',
        f'level = "elastic", elastic = {{epochs = 1, batch = 50}}, {QAT}',
    ],
    ids=["each", "shared"],
)
def test_a_shorter_version_feels_int8_and_is_rebuilt_byte_for_byte(level, network, exits, cache) -> None:
    pipeline = pipeline_of(level, network, exits)
    for depth in (0.5, 0.0):
        candidate = without(pipeline, "int8", depth=depth)
        assert "qat" in pipeline.compressor.plan(candidate).effort
        deployed = pipeline.deployed(candidate)
        assert np.mean(deployed.answers.classes == torch_classes(deployed)) > 0.8
        assert pipeline_of(level, network, exits).deployed(candidate).artifact.digest == deployed.artifact.digest


def test_rounding_is_learned_for_a_shorter_version_that_is_fine_tuned(cache) -> None:
    text = deep.STUDY + 'quantization = {rounding = "adaround", rounding_steps = 20}\n'
    pipeline = build_pipeline(Study.parse(text, "test"), QUIET)
    candidate, more = without(pipeline, "int8", 0.5), FinetuneSection(epochs=1, batch=50)
    plan = pipeline.compressor.plan(candidate, more)
    assert plan.effort == "bn + finetune 1 epoch + adaround"
    compressed = pipeline.compress(candidate, more)
    assert compressed.grids
    digest = pipeline.deploy(candidate, compressed).artifact.digest
    again = build_pipeline(Study.parse(text, "test"), QUIET)
    assert again.deployed(candidate, more).artifact.digest == digest


def test_gates_and_masks_are_searched_together_with_depth(cache) -> None:
    skips = 'skips = {blocks = "all", epochs = 1, batch = 50}\n'
    masks = 'masks = {method = "dgnet", keep = 0.6, epochs = 1, batch = 50}\n'
    for section, prefix in ((skips, "threshold.skip."), (masks, "threshold.mask.")):
        pipeline = build_pipeline(Study.parse(deep.STUDY + section, "test"), QUIET)
        values = pipeline.space.uniform(1.0, "fp32", 0.7, depth=0.5)
        assert any(name.startswith(prefix) for name in values)
        assert any(name.startswith("depth.") for name in values)
        candidate = pipeline.space.candidate(values)
        assert candidate.removed_blocks
        deployed = pipeline.deployed(candidate)
        assert pipeline.flops.measure(deployed).value > 0
        assert not any(candidate.lacks(block) for block in deployed.artifact.blocks)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, cache) -> Path:
    """A finished search with depth, taken up again once, and where it lies."""
    home = tmp_path_factory.mktemp("deep")
    (home / "study.toml").write_text(deep.STUDY)
    here = Path.cwd()
    os.chdir(home)
    try:
        arguments = ["--study", "./study.toml", "--search", "one", "--runs", "runs"]
        assert run([*arguments, "--trials", "12"]) in (0, 1)
        assert run([*arguments, "--trials", "18"]) in (0, 1)
    finally:
        os.chdir(here)
    return home / "runs"


def shorter_ones(runs: Path) -> list:
    return [each for each in stored(runs).versions if each.is_complete and each.evaluation.candidate.removed_blocks]


@pytest.mark.slow
def test_the_sampler_reckons_with_the_work_of_shortened_networks(runs, pipeline) -> None:
    structure = problem_prior(pipeline, pipeline.space, stored(runs).baseline).structure
    codec, image = Codec(distributions(pipeline.space)), torch.zeros(1, 1, 8, 8)

    def reckoned_and_counted(**kept: int) -> tuple[float, float]:
        values = pipeline.space.uniform(1.0, "fp32") | {f"depth.{stage}": count for stage, count in kept.items()}
        network = pipeline.space.apply(pipeline.network, pipeline.space.candidate(values))
        return structure.work(codec, codec.encode([values])).sum(), sum(count_by_module(network, image).values())

    dense = reckoned_and_counted()
    for stage1, stage2 in itertools.product(range(3), repeat=2):
        reckoned, counted = reckoned_and_counted(stage1=stage1, stage2=stage2)
        assert dense[0] - reckoned == pytest.approx(dense[1] - counted)
    damages = structure.damage["depth.stage1"]
    assert list(damages) == sorted(damages, reverse=True)
    assert damages[-1] == 0
    depths = [max(costs) for name, costs in structure.damage.items() if name.startswith("depth.")]
    assert sum(depths) == pytest.approx(0.3), "what it costs after recovery, however much before"


@pytest.mark.slow
def test_a_search_finds_versions_with_fewer_blocks_and_goes_on(runs) -> None:
    search = stored(runs)
    assert len(search.trials) == 18
    assert all("depth.stage1" in trial.params for trial in search.trials if trial.params)
    shorter = shorter_ones(runs)
    assert shorter
    dense = search.baseline.evaluation.measurements
    for version in shorter:
        assert version.measured["flops"].value < dense["flops"].value
        assert version.measured["params"].value < dense["params"].value
        assert version.evaluation.effort == "bn"
    numbers = {trial.number for trial in search.trials if trial.number >= 12}
    assert numbers, "it went on"


@pytest.mark.slow
def test_what_is_left_out_is_told(runs, capsys) -> None:
    version = shorter_ones(runs)[0]
    assert run(["front", "--runs", str(runs), "--search", "one", "--json"]) == 0
    front = json.loads(capsys.readouterr().out)
    removed = [each["candidate"].get("removed_blocks") for each in front["front"]]
    assert run(["front", "--runs", str(runs), "--search", "one"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    if any(removed):
        assert "how many residual blocks are left out" in text
    assert run(["compare", "one:dense", f"one:{version.number}", "--runs", str(runs)]) == 0
    told = capsys.readouterr().out
    for block in version.evaluation.candidate.removed_blocks:
        assert block in told
    assert run(["report", "--runs", str(runs), "--search", "one"]) == 0
    capsys.readouterr()
    arguments = ["diagnose", "--trial", str(version.number), "--search", "one", "--runs", str(runs), "--json"]
    assert run(arguments) == 0
    diagnosed = json.loads(capsys.readouterr().out)
    assert diagnosed["unmatched"] == []
    assert diagnosed["layers"]
    for block in version.evaluation.candidate.removed_blocks:
        assert not any(layer["name"].startswith(f"{block}.") for layer in diagnosed["layers"])


@pytest.mark.slow
def test_mlflow_has_the_depths(runs) -> None:
    client = Tracking.of(runs).client()
    assert isinstance(client, MlflowClient)
    experiments = [found.experiment_id for found in client.search_experiments() if found.name == "deep"]
    logged = client.search_runs(experiments, "tags.role = 'trial'")
    assert len(logged) == 18
    trials = {trial.number: trial for trial in stored(runs).trials}
    for each in logged:
        params = trials[int(each.data.tags["trial"])].params
        assert {each.data.params[name] for name in params if name.startswith("depth.")} == {
            str(value) for name, value in params.items() if name.startswith("depth.")
        }


@pytest.mark.slow
def test_a_shorter_version_is_picked_and_its_bundle_answers_as_torch(runs, tmp_path, capsys, pipeline) -> None:
    version = min(shorter_ones(runs), key=lambda each: each.measured["flops"].value)
    out = tmp_path / "out"
    share = version.measured["flops"].value / stored(runs).baseline.evaluation.measurements["flops"].value
    budget = ["--budget", "latency<9999%", "--budget", f"flops<{100 * share + 0.5:.1f}%"]
    assert run(["pick", "--search", "one", "--runs", str(runs), "--prefer", "flops", *budget, "--out", str(out)]) == 0
    candidate = Candidate.from_dict(json.loads((out / "candidate.json").read_text()))
    assert candidate.removed_blocks
    assert json.loads((out / "evaluation.json").read_text())["confirmed"]["same_artifact"]
    done = subprocess.run([sys.executable, "-I", str(out / "run.py")], capture_output=True, text=True, check=True)
    deployed = pipeline.deployed(candidate)
    accuracy = float(np.mean(deployed.answers_to(pipeline.data.test).correct))
    assert f"accuracy: {accuracy:.4%}" in done.stdout
    capsys.readouterr()
    assert run(["measure", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["correct"] == found["expected"]


def test_versions_with_fewer_blocks_run_on_openvino(cache) -> None:
    try:
        runtime("openvino")
    except TargetError as error:
        pytest.skip(str(error))
    text = deep.STUDY.replace("target = {batch = 4}", 'target = {batch = 4, runtime = "openvino"}')
    pipeline = build_pipeline(Study.parse(text, "test"), QUIET)
    for precision in ("fp32", "int8"):
        deployed = pipeline.deployed(without(pipeline, precision, 0.5))
        assert np.mean(deployed.answers.classes == torch_classes(deployed)) > 0.9
