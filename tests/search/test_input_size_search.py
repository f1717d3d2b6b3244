"""A search over input sizes, from the study to the bundle."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from search.cli import run
from search.config.budget import Budget
from search.config.study import Study, StudyError
from search.pipeline.diagnosis import DiagnosisRequest, diagnose
from search.pipeline.pipeline import CompressionPipeline, build_pipeline
from search.pipeline.search_space import asked_sizes
from search.recovery.elastic import random_size, train_elastic
from search.report.overview import Overview
from search.results.evaluation import Evaluation
from search.samplers.distributions import first_guesses
from search.training.loop import TrainingBatches
from spaces.input_size import InputSizeSpace
from tests.helpers import skippable, tiny
from tests.helpers.searches import stored

STUDY = skippable.STUDY + '\nspace = {sizes = [4, 6], only = ["channels", "depth", "precision", "size"]}\n'
"""A residual network for bars of 8x8 pixels."""


@pytest.fixture(scope="module")
def pipeline(cache) -> CompressionPipeline:
    return build_pipeline(Study.parse(STUDY, "the tests' study"), lambda *_: None)


def test_the_space_has_the_sizes_of_the_study(pipeline: CompressionPipeline) -> None:
    assert pipeline.space.dimensions()["input.size"].choices == ("4", "6", "8")
    sizes = {pipeline.space.candidate(guess).input_size for guess in first_guesses(pipeline.space)}
    assert sizes == {None, 4}


def test_what_is_measured_is_at_the_size(pipeline: CompressionPipeline) -> None:
    candidate = pipeline.space.candidate(pipeline.space.uniform(1.0, "int8", size=0.5))
    assert candidate.input_size == 4
    subject = pipeline.deployed(candidate)
    with torch.no_grad():
        expected = subject.network(torch.from_numpy(pipeline.scored.images[:]))[-1].argmax(1).numpy()
    assert np.mean(subject.answers.classes == expected) > 0.95
    dense = pipeline.flops.measure(pipeline.deployed(pipeline.space.dense())).value
    assert pipeline.flops.measure(subject).value == pytest.approx(dense / 4, rel=0.05)
    assert pipeline.compressor.plan(candidate).recovers


@pytest.mark.parametrize(("sizes", "reason"), [("[16]", "got 16"), ("[4, 9]", "got 9")])
def test_a_size_above_the_images_own_is_refused(sizes, reason, cache) -> None:
    study = Study.parse(STUDY.replace("[4, 6]", sizes), "the tests' study")
    with pytest.raises(StudyError, match=rf"space\.sizes are sizes below 8.*{reason}"):
        build_pipeline(study, lambda *_: None)


@pytest.mark.parametrize("sizes", ['"small"', "[-4]", "[0]", "[4.0]", "[true]", '["4"]', '["auto"]'])
def test_what_is_no_choice_of_sizes_is_one_clear_line(sizes) -> None:
    with pytest.raises(StudyError, match=r"space\.sizes is 'auto' or a list of whole numbers of at least 1, got"):
        Study.parse(STUDY.replace("[4, 6]", sizes), "the tests' study")


def test_the_same_sizes_are_the_same_question() -> None:
    usual = Study.parse(STUDY, "the tests' study")
    again = Study.parse(STUDY.replace("[4, 6]", "[6, 4, 6]"), "the tests' study")
    assert again.question_key == usual.question_key


@pytest.mark.parametrize(
    ("shape", "sizes", "words"),
    [
        ((1, 8, 12), "[4]", "sizes of square images, got images of 8x12"),
        ((1, 8, 8), "[4, 16]", "sizes below 8, the images' own, got 16"),
    ],
)
def test_what_the_images_tell_is_refused_before_anything_is_trained(shape, sizes, words) -> None:
    with pytest.raises(StudyError, match=words):
        asked_sizes(Study.parse(STUDY.replace("[4, 6]", sizes), "the tests' study"), shape)


def test_masks_are_learnt_at_one_size() -> None:
    study = Study.parse(
        STUDY.replace('"size"]}', '"size", "masks"]}') + 'masks = {method = "dgnet"}', "the tests' study"
    )
    with pytest.raises(StudyError, match="masks are learnt at one size"):
        asked_sizes(study, (1, 8, 8))


def test_sizes_that_cannot_be_are_said(cache) -> None:
    study = Study.parse(tiny.STUDY + 'space = {sizes = "auto"}', "the tests' study")
    pipeline = build_pipeline(study, lambda *_: None)
    said = any("input size is no dimension" in remark for remark in pipeline.remarks)
    assert said == (not pipeline.space.input_size.dimensions())


def test_automatic_sizes_leave_out_what_the_network_does_not_run_at(cache) -> None:
    study = Study.parse(tiny.STUDY + 'space = {sizes = "auto"}', "the tests' study")
    assert build_pipeline(study, lambda *_: None).space.input_size.sizes[-1] == 8


def test_shared_weights_are_trained_at_every_size(pipeline: CompressionPipeline) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = InputSizeSpace((4, 6, 8))
    assert {random_size(sizes, generator) for _ in range(50)} == {4, 6, None}
    network = pipeline.space.apply(pipeline.network, pipeline.space.dense())
    settings = pipeline.study.recovery.elastic.model_copy(update={"epochs": 1, "batch": 50})
    batches = TrainingBatches(pipeline.data.train, 50, 0)
    before = network.trunk.classifier.weight.detach().clone()
    train_elastic(
        network, pipeline.compressor.context.teacher, pipeline.space.sparsity, batches, settings, input_size=sizes
    )
    after = network.trunk.classifier.weight
    assert torch.isfinite(after).all()
    assert not torch.equal(after, before)


def test_a_smaller_version_is_diagnosed_at_its_size(pipeline: CompressionPipeline) -> None:
    candidate = pipeline.space.candidate(pipeline.space.uniform(1.0, "int8", size=0.5))
    evaluation = Evaluation(candidate, {}, "", {})
    found = diagnose(pipeline, DiagnosisRequest(trial=0, images=20), evaluation, lambda *_: None)
    assert {layer.name for layer in found.compared.layers} >= {"classifier"}


@pytest.mark.slow
def test_a_picked_smaller_version_answers_elsewhere_as_measured(cache, tmp_path) -> None:
    sizes_alone = STUDY.replace('"channels", "depth", "precision", "size"', '"size"')
    (tmp_path / "study.toml").write_text(sizes_alone)
    where = ["--runs", str(tmp_path), "--search", "sizes", "--budget", "flops<50%"]
    assert run(["--study", str(tmp_path / "study.toml"), *where, "--trials", "3"]) == 0
    out = tmp_path / "deploy"
    assert run(["pick", *where, "--trial", "99", "--out", str(out)]) == 2, "no such trial"
    within = Overview.of(stored(tmp_path, "sizes"), Budget.parse(["flops<50%"])).feasible
    trial = next(version for version in within if version.evaluation.candidate.input_size == 4).trial
    assert run(["pick", *where, "--trial", str(trial), "--out", str(out)]) == 0
    assert json.loads((out / "bundle.json").read_text())["input_size"] == 4
    assert json.loads((out / "candidate.json").read_text())["input_size"] == 4
    done = subprocess.run([sys.executable, "-I", str(out / "run.py")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "resizing to 4 included" in done.stdout
    oblong = f"import numpy, sys; sys.path.insert(0, {str(out)!r}); import run; run.load({str(out)!r})"
    oblong += "(numpy.zeros((5, 1, 8, 12), numpy.float32))"
    refused = subprocess.run([sys.executable, "-c", oblong], capture_output=True, text=True, check=False)
    assert "images are a float32 array (n, 1, 8, 8), got float32 (5, 1, 8, 12)" in refused.stderr
    assert run(["measure", str(out)]) == 0
