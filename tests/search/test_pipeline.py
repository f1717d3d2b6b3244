"""Training, recovery, and what a search's trials share."""

from dataclasses import replace

import numpy as np
import pytest

from evaluators.runtimes.base import Target, allows
from evaluators.runtimes.onnxruntime_cpu import OnnxRuntime
from search.config.study import Study, StudyError
from search.pipeline.pipeline import build_pipeline
from tests.helpers import tiny


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
            study, build_model(study.model, None, data.classes, 0, data.calibration.images[:2]), data, progress
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
