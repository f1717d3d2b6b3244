"""Zeros inside layers: the masks, the space, the artifact, and training that keeps them."""

import itertools
import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from evaluators.runtimes.base import Capabilities
from evaluators.runtimes.onnxruntime_cpu import OnnxRuntime, load
from search.cli import run
from search.config.study import FinetuneSection, Study, StudyError
from search.pipeline.pipeline import build_pipeline
from search.recovery.finetune import finetune, finetune_kept
from search.recovery.gradual_pruning import RAMP, GradualPruning, SparseRefined, ramp
from search.results.store import SearchFolder, StoredSearch
from search.samplers.distributions import first_guesses
from search.training.loop import TrainingBatches
from spaces.candidate import Candidate
from spaces.joint import JointSpace
from spaces.patterns import PatternError, PatternSpace, apply_patterns, mask, mask_of, offered_patterns, zeros_of
from spaces.testing import SpaceContract
from tests.helpers import tiny

PATTERNS = {"inner.0": "2:4", "outer.0": "75%", "hidden": "50%"}


@pytest.fixture
def patterned(space: JointSpace, network) -> JointSpace:
    offered = offered_patterns(network, space.sparsity.groups, space.sparsity.finest, ("2:4", "75%"))
    return JointSpace(space.sparsity, space.precision, space.thresholds, PatternSpace(offered))


class TestPatternSpace(SpaceContract):
    @pytest.fixture
    def part(self, patterned: JointSpace):
        return patterned.patterns


@pytest.mark.parametrize("shape", [(3, 8), (5, 12, 3, 3), (2, 4, 1, 1)])
def test_two_of_four_keeps_the_two_largest_of_each_four_input_channels(shape) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    kept = mask_of(weight, "2:4")
    assert kept.shape == weight.shape
    rows = weight.abs().reshape(shape[0], shape[1], -1).numpy()
    for out, row in enumerate(kept.reshape(shape[0], shape[1], -1).numpy()):
        for start in range(0, shape[1], 4):
            for place in range(row.shape[1]):
                four, values = row[start : start + 4, place], rows[out, start : start + 4, place]
                assert four.sum() == 2
                assert set(np.flatnonzero(four)) == set(np.argsort(values)[2:])


def test_two_of_four_of_six_channels_is_an_error() -> None:
    with pytest.raises(ValueError, match="divide by 4, got 6"):
        mask_of(torch.ones(2, 6), "2:4")


@given(st.integers(1, 60), st.integers(1, 99))
def test_a_share_of_zeros_takes_the_smallest_weights(size: int, percent: int) -> None:
    weight = torch.randn(size, 1, generator=torch.Generator().manual_seed(size))
    kept = mask_of(weight, f"{percent}%").bool()
    assert int((~kept).sum()) == round(percent / 100 * size)
    if kept.any() and (~kept).any():
        assert weight[kept].abs().min() >= weight[~kept].abs().max()


@pytest.mark.parametrize("pattern", ["0%", "100%", "1:4", "half", "50", "-5%"])
def test_other_patterns_are_refused(pattern: str) -> None:
    with pytest.raises(PatternError, match="2:4 or the share of zeros"):
        zeros_of(pattern)
    with pytest.raises(StudyError, match=r"space\.patterns"):
        Study.parse(tiny.STUDY + f'space = {{patterns = ["{pattern}"]}}', "test")


def test_depthwise_layers_exits_and_odd_inputs_are_not_offered_two_of_four(network, space) -> None:
    offered = offered_patterns(network, space.sparsity.groups, 4, ("2:4", "50%"))
    assert offered["stem.0"] == ("50%",)  # one input channel
    assert offered["inner.0"] == ("2:4", "50%")
    assert "depthwise.0" not in offered
    assert not any(name.startswith("exits.") for name in offered)
    # Channels that go three at a time may leave a number that does not divide by four.
    assert offered_patterns(network, space.sparsity.groups, 3, ("2:4",))["inner.0"] == ()


def test_whatever_is_cut_two_of_four_still_fits(patterned, network) -> None:
    for keep in (0.25, 0.5, 0.8):
        candidate = patterned.candidate(patterned.uniform(keep, "fp32", None, "2:4"))
        pruned = patterned.apply(network, candidate)
        for layer, pattern in candidate.patterns.items():
            weight = pruned.trunk.get_submodule(layer).weight
            assert torch.equal(weight * mask_of(weight, pattern), weight)
            assert float((weight == 0).float().mean()) >= 0.5


def test_a_dense_layer_has_no_pattern_and_old_candidates_are_dense(patterned) -> None:
    assert patterned.candidate(patterned.uniform(1.0, "fp32")) == patterned.dense()
    assert patterned.dense().patterns == {}
    content = patterned.dense().to_dict()
    content.pop("patterns")
    assert Candidate.from_dict(json.loads(json.dumps(content))) == patterned.dense()
    some = replace(patterned.dense(), patterns=PATTERNS)
    assert Candidate.from_dict(json.loads(json.dumps(some.to_dict()))) == some
    assert some.key != patterned.dense().key


def test_guesses_try_each_pattern(patterned) -> None:
    tried = {pattern for guess in first_guesses(patterned) for pattern in patterned.candidate(guess).patterns.values()}
    assert tried == {"2:4", "75%"}


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_artifact_has_the_zeros_and_answers_as_torch_does(precision, builder, patterned, network, images) -> None:
    candidate = replace(patterned.candidate(patterned.uniform(0.5, precision)), patterns=PATTERNS)
    pruned = patterned.apply(network, candidate)
    artifact = builder.build(pruned, candidate)
    arrays = {
        tensor.name: onnx.numpy_helper.to_array(tensor)
        for tensor in onnx.load_from_string(artifact.stages[0]).graph.initializer
    }
    for layer, pattern in PATTERNS.items():
        named = [array for name, array in arrays.items() if name.startswith(f"trunk.{layer}.weight")]
        weight = next(array for array in named if array.ndim > 1)
        assert np.mean(weight == 0) >= zeros_of(pattern)
        if pattern == "2:4":
            fours = np.moveaxis(weight != 0, 1, -1).reshape(-1, 4)
            assert fours.sum(axis=1).max() <= 2
    if precision == "fp32":
        with torch.no_grad():
            expected = pruned(images)[-1].numpy()
        np.testing.assert_allclose(load(artifact.deployed[0], 1)(images.numpy())[0], expected, atol=1e-5)


def test_the_gradient_of_masked_weights_is_that_of_sr_ste() -> None:
    weight = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    kept = mask(weight, 0.5, two_of_four=True)
    upstream = torch.randn(4, 8, dtype=torch.float64)
    masked = SparseRefined.apply(weight, kept)
    torch.testing.assert_close(masked, weight * kept)
    (masked * upstream).sum().backward()
    torch.testing.assert_close(weight.grad, upstream + 2e-4 * (1 - kept) * weight.detach())


def test_the_ramp_is_cubic() -> None:
    expected = [16.26, 29.28, 39.42, 47.04, 52.50, 56.16, 58.38, 59.52, 59.94, 60.00]
    assert [100 * ramp(epoch / 10, 0.6) for epoch in range(1, 11)] == pytest.approx(expected)
    assert ramp(0, 0.6, 0.2) == pytest.approx(0.2)
    assert ramp(1, 0.6, 0.2) == pytest.approx(0.6)


def test_channels_narrow_step_by_step_to_the_candidates(space, network) -> None:
    final = {group.name: space.sparsity.smallest(group) for group in space.sparsity.groups}
    narrowing = GradualPruning(network, {}, final, space.sparsity)
    places = [narrowing.channels_at(place / 20) for place in range(21)]
    assert places[0] == {group.name: group.channels for group in space.sparsity.groups}
    assert places[-1] == final
    for before, after in itertools.pairwise(places):
        for group in space.sparsity.groups:
            assert after[group.name] <= before[group.name]
            assert (group.channels - after[group.name]) % space.sparsity.step(group) == 0
    halfway = narrowing.channels_at(0.5)["inner.0"]
    assert halfway == pytest.approx(24 * (1 - ramp(0.5, 1 - final["inner.0"] / 24)), abs=2)


@pytest.mark.parametrize("pruning", ["one-shot", "gradual"])
def test_fine_tuning_keeps_the_zeros_and_goes_on_after_an_interrupt(pruning, pipeline, tmp_path, monkeypatch) -> None:
    settings = FinetuneSection(epochs=3, batch=50, learning_rate=0.02, pruning=pruning)
    candidate = replace(pipeline.space.candidate(pipeline.space.uniform(0.5, "fp32")), patterns=PATTERNS)
    images = torch.from_numpy(pipeline.data.train.images[:64])
    steps: list[int] = []

    def tune(folder, say):
        network = pipeline.space.apply(pipeline.network, candidate)
        before = [parameter.clone() for parameter in network.parameters()]
        ground = replace(pipeline.compressor.context, folder=folder, say=say)
        finetune_kept(ground, network, candidate.channels, settings, images, "", candidate.patterns)
        assert any(not torch.equal(old, new) for old, new in zip(before, network.parameters(), strict=True))
        return network

    def crash(step: str, done: int, total: int) -> None:
        if done > 40:
            raise KeyboardInterrupt

    straight = tune(tmp_path / "one", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        tune(tmp_path / "two", crash)
    resumed = tune(tmp_path / "two", lambda step, done, total: steps.append(done))
    assert steps[0] == 33
    for name, value in straight.state_dict().items():
        assert torch.allclose(value, resumed.state_dict()[name], atol=1e-6), name
    for layer, pattern in PATTERNS.items():
        weight = straight.trunk.get_submodule(layer).weight
        zeros = float((weight == 0).float().mean())
        assert zeros == pytest.approx(zeros_of(pattern), abs=0.5 / weight.numel())
        assert torch.equal(weight * mask_of(weight, pattern), weight)


def test_gradual_training_starts_wide_and_ends_as_the_candidate(pipeline) -> None:
    candidate = pipeline.space.candidate(pipeline.space.uniform(0.25, "fp32"))
    narrowing = GradualPruning(pipeline.network, {}, candidate.channels, pipeline.space.sparsity)
    images = torch.from_numpy(pipeline.data.train.images[:8])
    with torch.no_grad():
        wide = narrowing.logits(images, 0.0)[-1]
        narrow = narrowing.logits(images, RAMP)[-1]
    pipeline.network.train()
    with torch.no_grad():
        state = {name: value.clone() for name, value in pipeline.network.state_dict().items()}
        torch.testing.assert_close(wide, pipeline.network.trunk(images))
    pipeline.network.load_state_dict(state)
    pipeline.network.eval()
    sliced = pipeline.space.apply(pipeline.network, candidate).train()
    with torch.no_grad():
        torch.testing.assert_close(narrow, sliced.trunk(images))


def test_gradual_fine_tuning_learns(pipeline) -> None:
    candidate = pipeline.space.candidate(pipeline.space.uniform(0.25, "fp32"))
    settings = FinetuneSection(epochs=6, batch=50, learning_rate=0.02, pruning="gradual")
    network = pipeline.space.apply(pipeline.network, candidate)
    narrowing = GradualPruning(pipeline.network, {}, candidate.channels, pipeline.space.sparsity)
    batches = TrainingBatches(pipeline.data.train, settings.batch, 0)
    before = _accuracy(network, pipeline)
    finetune(network, pipeline.compressor.context.teacher, batches, settings, gradual=narrowing)
    pipeline.compressor.recovery.recover(network, candidate.channels)
    assert _accuracy(network, pipeline) > max(before, 0.5)


def _accuracy(network: nn.Module, pipeline) -> float:
    with torch.no_grad():
        answers = network.trunk(torch.from_numpy(pipeline.data.train.images)).argmax(1).numpy()
    return float(np.mean(answers == pipeline.data.train.labels))


class Sparse(OnnxRuntime):
    """ONNX Runtime, as if the CPU had sparse kernels."""

    def capabilities(self) -> Capabilities:
        return replace(super().capabilities(), sparse_2_4=True)


def test_two_of_four_is_offered_where_the_target_runs_it(cache) -> None:
    study = Study.parse(tiny.STUDY + 'space = {patterns = ["2:4", "75%"]}', "test")
    able = build_pipeline(study, lambda *_: None, Sparse())
    assert not [remark for remark in able.remarks if "left out" in remark]
    assert able.space.patterns.patterns["pointwise.0"] == ("2:4", "75%")
    unable = build_pipeline(study, lambda *_: None)
    assert unable.space.patterns.patterns["pointwise.0"] == ("75%",)
    assert "2:4 is left out" in unable.remarks[0]


def test_a_search_with_patterns_says_what_they_are_worth(cache, tmp_path, capsys) -> None:
    (tmp_path / "study.toml").write_text(tiny.STUDY + 'space = {patterns = ["2:4", "50%"]}')
    arguments = ["--study", str(tmp_path / "study.toml"), "--runs", str(tmp_path / "runs"), "--search", "one"]
    assert run([*arguments, "--trials", "25", "--budget", "latency<1000%"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "2:4 is left out" in text
    assert "save no time on this target" in text
    versions = StoredSearch.read(SearchFolder(tmp_path / "runs" / "one")).versions
    sparse = [version for version in versions if version.evaluation.candidate.patterns]
    assert sparse
    for version in sparse:
        assert 0 < version.measured["flops"].notes["nonzero"] < 1
        assert 0 < version.measured["params"].notes["nonzero"] < 1
        assert version.evaluation.effort == "bn"


def test_patterns_are_kept_when_applied_twice(network) -> None:
    import copy

    once = copy.deepcopy(network)
    apply_patterns(once, PATTERNS)
    twice = copy.deepcopy(once)
    apply_patterns(twice, PATTERNS)
    for one, other in zip(once.parameters(), twice.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="nowhere"):
        apply_patterns(once, {"nowhere": "50%"})
