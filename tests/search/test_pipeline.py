"""Training, recovery, and what a search's trials share."""

from dataclasses import replace

import numpy as np
import pytest

from evaluators.runtimes.base import Target, allows
from evaluators.runtimes.onnxruntime_cpu import OnnxRuntime
from search.config.study import Study, StudyError
from search.pipeline.pipeline import build_pipeline
from spaces.errors import UserError
from tests.helpers import deep, tiny


def test_compression_recovers_and_the_dense_network_is_left_alone(pipeline) -> None:
    import copy

    before = copy.deepcopy(pipeline.network.state_dict())
    candidate = pipeline.space.candidate(pipeline.space.uniform(0.5, "fp32"))
    recovered = pipeline.compress(candidate).network
    plain = pipeline.space.apply(pipeline.network, candidate)
    means = [name for name in recovered.state_dict() if name.endswith("running_mean")]
    assert any(not np.allclose(recovered.state_dict()[name], plain.state_dict()[name]) for name in means)
    for name, tensor in pipeline.network.state_dict().items():
        assert (tensor == before[name]).all(), name
    assert pipeline.compress(candidate).network.state_dict().keys() == recovered.state_dict().keys()
    for name, tensor in pipeline.compress(candidate).network.state_dict().items():
        assert (tensor == recovered.state_dict()[name]).all(), "recovery repeats bit for bit"


def test_tf32_is_refused_where_the_device_has_none() -> None:
    study = Study.parse(tiny.STUDY.replace("batch = 4", 'batch = 4, fp32_in = "tf32"'), "test")
    with pytest.raises(StudyError, match=r"Ampere on, got onnxruntime on .*; leave it out"):
        build_pipeline(study, lambda *_: None)


def test_tf32_is_part_of_every_record(cache) -> None:
    class Ampere(OnnxRuntime):
        def capabilities(self):
            return replace(super().capabilities(), fp32_in=("tf32",))

    study = Study.parse(tiny.STUDY.replace("batch = 4", 'batch = 4, fp32_in = "tf32"'), "test")
    pipeline = build_pipeline(study, lambda *_: None, Ampere())
    assert str(pipeline.target).endswith(", fp32 in TF32")
    assert Target(**pipeline.target.to_dict()) == pipeline.target
    for artifact in pipeline.references.artifacts.values():
        assert all(allows(stage, "tf32") for stage in artifact.stages)


def test_the_trained_network_is_cached_and_training_goes_on_after_a_crash(cache, tmp_path, monkeypatch) -> None:
    from search.loading.models import build_model
    from search.training import dense as training

    monkeypatch.setenv("DEPLOYFRONT_CACHE", str(tmp_path))
    study, data = Study.parse(tiny.STUDY, "test"), tiny.splits()
    steps: list[int] = []

    def trained(progress):
        return training.trained_network(
            study, build_model(study.model, None, data.classes, 0, lambda: data.calibration.images[:2]), data, progress
        )

    def crash(step: str, done: int, total: int) -> None:
        if done >= 50:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(crash)
    resumed = trained(lambda step, done, total: steps.append(done))
    assert steps[0] == 50, "two of four epochs are not repeated"
    monkeypatch.setenv("DEPLOYFRONT_CACHE", str(tmp_path / "other"))
    straight = trained(lambda *_: None)
    for name, tensor in straight.state_dict().items():
        assert np.allclose(tensor, resumed.state_dict()[name], atol=1e-6), name

    def never(*_: object) -> None:
        raise AssertionError("trained again")

    again = trained(never)
    assert (again.trunk.classifier.weight == straight.trunk.classifier.weight).all()


NETWORKS = """
import torch
from torch import nn


class Bessel(nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x)


def unexportable():
    return nn.Sequential(nn.Conv2d(1, 8, 3), Bessel(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def of_one_size():
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(288, 4))
"""


def with_network(name: str) -> str:
    """Returns the study of one of these networks, without exits."""
    return tiny.STUDY.replace('after = ["pool"]', "after = []").replace("tests.helpers.tiny:network", f"nets.py:{name}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (tiny.STUDY.replace('["pool"]', '["pol"]'), "module of the network, got 'pol'"),
        (tiny.STUDY.replace("epochs = 10", "epochs = 10, weights = [1, 2, 3]"), "one for each exit .* got 3"),
        (f'{deep.STUDY}skips = {{blocks = ["stage1.9"]}}', "stage1.9"),
        (f'{deep.STUDY}masks = {{method = "dgnet", blocks = ["stage1.9"]}}', "got 'stage1.9'; able: stage1.0"),
        (f'{deep.STUDY}masks = {{method = "dgnet"}}\nskips = {{blocks = "all"}}', r"got \[masks\] and \[skips\]"),
        (f'{tiny.STUDY}space = {{precision = "fp8"}}', "got 'fp8'"),
        (f"{with_network('of_one_size')}space = {{sizes = [4]}}", "at which the network runs .* got 4"),
        (with_network("unexportable"), r"'1' \(Bessel\): .*bessel_j0"),
    ],
)
def test_what_can_be_refused_is_refused_before_anything_is_trained(text, words, cache, tmp_path) -> None:
    (tmp_path / "nets.py").write_text(NETWORKS)
    steps: list[str] = []
    with pytest.raises(UserError, match=words):
        build_pipeline(Study.parse(text, "test", tmp_path), lambda step, *_: steps.append(step))
    assert not [step for step in steps if "rain" in step]
