"""Training, recovery, and what a search's trials share."""

from dataclasses import replace

import numpy as np
import pytest

from evaluators.runtimes.base import Target, allows
from evaluators.runtimes.onnxruntime_cpu import OnnxRuntime
from search.config.study import Study, StudyError
from search.pipeline.workbench import Workbench
from tests.helpers import tiny


def test_compression_recovers_and_the_dense_network_is_left_alone(bench) -> None:
    import copy

    before = copy.deepcopy(bench.network.state_dict())
    candidate = bench.space.candidate(bench.space.uniform(0.5, "fp32", 1.0))
    recovered = bench.compress(candidate)
    plain = bench.space.apply(bench.network, candidate)
    means = [name for name in recovered.state_dict() if name.endswith("running_mean")]
    assert any(not np.allclose(recovered.state_dict()[name], plain.state_dict()[name]) for name in means)
    for name, tensor in bench.network.state_dict().items():
        assert (tensor == before[name]).all(), name
    assert bench.compress(candidate).state_dict().keys() == recovered.state_dict().keys()
    for name, tensor in bench.compress(candidate).state_dict().items():
        assert (tensor == recovered.state_dict()[name]).all(), "recovery repeats bit for bit"


def test_tf32_is_refused_where_the_device_has_none() -> None:
    study = Study.parse(tiny.STUDY.replace("batch = 4", "batch = 4, tf32 = true"), "test")
    with pytest.raises(StudyError, match=r"Ampere on, got onnxruntime on .*; leave it out"):
        Workbench(study, lambda *_: None)


def test_tf32_is_part_of_every_record(cache) -> None:
    class Ampere(OnnxRuntime):
        def capabilities(self):
            return replace(super().capabilities(), fp32_in=("tf32",))

    study = Study.parse(tiny.STUDY.replace("batch = 4", "batch = 4, tf32 = true"), "test")
    bench = Workbench(study, lambda *_: None, Ampere())
    assert str(bench.target).endswith(", fp32 in TF32")
    assert Target(**bench.target.to_dict()) == bench.target
    for artifact in bench.references().values():
        assert all(allows(stage, "tf32") for stage in artifact.stages)


def test_the_trained_network_is_cached_and_training_goes_on_after_a_crash(cache, tmp_path, monkeypatch) -> None:
    from search.loading.models import build_model
    from search.training import dense as training

    monkeypatch.setenv("DEPLOYFRONT_CACHE", str(tmp_path))
    study, data = Study.parse(tiny.STUDY, "test"), tiny.splits()
    steps: list[int] = []

    def trained(progress):
        return training.trained_network(study, build_model(study.model, None, data.classes, 0), data, progress)

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
