"""The sensitivity profile: right figures, kept, shown; and the widths that follow from it."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluators.flops.evaluator import count_by_module
from evaluators.flops.pruned import ScaledFlops
from search.cli import run
from search.config.study import Study
from search.loop.greedy_widths import greedy_seeds, greedy_widths
from search.pipeline.pipeline import CompressionPipeline, build_pipeline
from search.pipeline.sensitivity_profiler import Profiler, widths
from search.results.sensitivity import Point, Profile
from search.results.store import SearchFolder
from search.samplers.distributions import distributions
from tests.helpers import tiny

SEARCH = Path("runs/one")


@pytest.fixture
def fresh(pipeline, tmp_path, monkeypatch) -> CompressionPipeline:
    """The tests' pipeline with an empty cache of profiles."""

    monkeypatch.setattr(pipeline.compressor, "context", replace(pipeline.compressor.context, folder=tmp_path))
    return pipeline


@pytest.fixture(scope="module")
def found(pipeline) -> Profile:
    return Profiler(pipeline).run(lambda *_: None)


@pytest.fixture(scope="module")
def flops(pipeline) -> ScaledFlops:
    image = torch.from_numpy(pipeline.data.calibration.images[:1])
    return ScaledFlops(pipeline.network, pipeline.space.sparsity.groups, image)


def test_a_dense_group_changes_nothing_and_every_width_is_on_offer(found, pipeline) -> None:
    assert set(found.groups) == {name.removeprefix("channels.") for name in pipeline.space.sparsity.dimensions()}
    for name, points in found.groups.items():
        assert (points[0].share, points[0].loss, points[0].divergence, points[0].flops) == (1.0, 0.0, 0.0, 1.0)
        dimension = pipeline.space.sparsity.dimensions()[f"channels.{name}"]
        counts = [point.channels for point in points]
        assert counts == sorted(set(counts), reverse=True)
        assert (counts[0], counts[-1]) == (dimension.high, dimension.low)
        assert all((dimension.high - count) % dimension.step == 0 for count in counts)
        assert all(point.divergence >= 0 for point in points)


def test_a_point_is_the_divergence_from_the_dense_networks_answers(found, pipeline) -> None:
    name, points = next(iter(found.groups.items()))
    network = pipeline.space.sparsity.apply(pipeline.network, {name: points[-1].channels})
    pipeline.compressor.recovery.recover(network, {name: points[-1].channels})
    images, labels = (
        torch.from_numpy(part) for part in (pipeline.data.calibration.images, pipeline.data.calibration.labels)
    )
    with torch.no_grad():
        ours, dense = network.trunk(images), pipeline.network.trunk(images)
    p, q = dense.softmax(1), ours.softmax(1)
    assert points[-1].divergence == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=1e-3)
    change = float(F.cross_entropy(ours, labels) - F.cross_entropy(dense, labels))
    assert points[-1].loss == pytest.approx(change, rel=1e-3, abs=1e-5)


def test_it_is_measured_once_and_goes_on_after_an_interrupt(fresh, found) -> None:
    steps: list[int] = []

    def stop_at_two(step: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Profiler(fresh).run(stop_at_two)
    resumed = Profiler(fresh).run(lambda step, done, total: steps.append(done))
    assert steps[0] == 2
    assert resumed == found

    def never(*_: object) -> None:
        raise AssertionError("measured again")

    again = Profiler(fresh)
    assert again.expected_seconds() == 0
    assert again.run(never) == resumed


def test_a_torn_file_is_measured_again(fresh, found) -> None:
    Profiler(fresh).run(lambda *_: None)
    (file,) = (fresh.compressor.context.folder / "profiles").iterdir()
    file.write_text(file.read_text()[:50])
    assert Profiler(fresh).run(lambda *_: None) == found


def test_another_effort_has_a_profile_of_its_own(pipeline) -> None:
    other = Study.parse(tiny.STUDY.replace('level = "bn"', 'level = "none"'), "test")
    none = Profiler(build_pipeline(other, lambda *_: None)).run(lambda *_: None)
    assert none.effort == "none"
    assert none.floor == 0
    assert none.points != Profiler(pipeline).run(lambda *_: None).points


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_scaled_flops_are_those_of_the_pruned_network(data, pipeline, flops) -> None:
    kept = {name: data.draw(st.sampled_from(counts)) for name, counts in widths(pipeline.space.sparsity).items()}
    pruned = pipeline.space.sparsity.apply(pipeline.network, kept)
    counted = count_by_module(pruned, torch.from_numpy(pipeline.data.calibration.images[:1]))
    layers = [path for path, module in pruned.trunk.named_modules(prefix="trunk") if hasattr(module, "weight")]
    assert flops.count(kept) == pytest.approx(sum(counted[path] for path in layers))


def test_greedy_widths_shrink_step_by_step_to_the_shares(found, pipeline, flops) -> None:
    shares = (0.9, 0.7, 0.5)
    proposals = greedy_widths(found, flops, shares)
    assert len(proposals) == len(shares)
    on_offer = {name: {point.channels for point in points} for name, points in found.groups.items()}
    before = {name: max(counts) for name, counts in on_offer.items()}
    for kept, share in zip(proposals, shares, strict=True):
        assert flops.count(kept) <= share * flops.count({})
        for name, count in kept.items():
            assert count in on_offer[name]
            assert count <= before[name]
        before = kept


def test_greedy_takes_what_costs_least_and_ends_where_nothing_is_left(found, pipeline, flops) -> None:
    dear = next(iter(found.groups))
    points = tuple(
        Point(p.group, p.channels, p.share, 0.0, (1 - p.share) * (1e6 if p.group == dear else 1e-3), p.flops)
        for p in found.points
    )
    made = Profile("bn", 1, 0.0, points)
    (kept,) = greedy_widths(made, flops, [0.9])
    assert kept[dear] == found.groups[dear][0].channels
    assert greedy_widths(made, flops, [0.9, 0.001]) == [kept]


def test_seeds_are_on_offer_and_int8(pipeline) -> None:
    seeds = greedy_seeds(pipeline, lambda *_: None, lambda _: None, SEARCH)
    assert seeds
    assert all(pipeline.space.candidate(seed).is_unsolved for seed in seeds), "thresholds are solved for each"
    searched = Study.parse(tiny.STUDY.replace("grid = 2", 'grid = 2, thresholds = "searched"'), "test")
    pairs = greedy_seeds(other := build_pipeline(searched, lambda *_: None), lambda *_: None, lambda _: None, SEARCH)
    assert [other.space.candidate(seed).active_exits for seed in pairs[:2]] == [(), ("exit1",)]
    for seed in seeds:
        candidate = pipeline.space.candidate(seed)
        trunk = [value for layer, value in candidate.precision.items() if not layer.startswith("exits.")]
        assert set(trunk) == {"int8"}
        for name, distribution in distributions(pipeline.space).items():
            assert distribution._contains(distribution.to_internal_repr(seed[name])), name


def test_a_profile_that_takes_too_long_is_left_to_a_command(pipeline, monkeypatch) -> None:
    monkeypatch.setattr("search.loop.greedy_widths.AFFORDABLE_S", -1.0)
    said: list[str] = []
    assert greedy_seeds(pipeline, lambda *_: None, said.append, Path("my runs/one")) == []
    words = shlex.split(said[0].partition("once with: ")[2])
    assert words == ["python", "-m", "search", "profile", "--search", "one", "--runs", "my runs"]


def test_the_command_shows_the_profile_and_writes_it(tmp_path, capsys, pipeline, found, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    (tmp_path / "study.toml").write_text(tiny.STUDY)
    arguments = ["profile", "--study", str(tmp_path / "study.toml"), "--runs", str(tmp_path / "runs")]
    assert run(arguments) == 0
    text = capsys.readouterr().out
    for name in found.groups:
        assert name in text
    picture = tmp_path / "runs" / "profile-tiny.png"
    assert f"Wrote {picture}" in text
    for meaning in ("with that one group cut", "Divergence: how far its answers move", "Loss: how much less"):
        assert meaning in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert run([*arguments, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert Profile.from_dict({name: content[name] for name in found.to_dict()}) == found
    shares = [kept["flops"] for kept in content["greedy"]]
    assert shares == sorted(shares, reverse=True)


def test_a_search_that_asks_for_it_tries_the_greedy_widths(tmp_path, pipeline) -> None:
    text = tiny.STUDY.replace("search = {trials = 12}", "search = {trials = 1, warm_start = true}")
    (tmp_path / "study.toml").write_text(text)
    arguments = ["--study", str(tmp_path / "study.toml"), "--runs", str(tmp_path), "--search", "one"]
    assert run([*arguments, "--budget", "latency<1000%"]) in (0, 1)
    queued = [trial.system_attrs.get("fixed_params") for trial in SearchFolder(tmp_path / "one").open().trials]
    for seed in greedy_seeds(pipeline, lambda *_: None, lambda _: None, SEARCH):
        assert seed in queued


def test_a_profile_of_no_search_is_a_mistake(tmp_path, capsys) -> None:
    assert run(["profile", "--search", "nothing", "--runs", str(tmp_path)]) == 2
    assert "journal.log" in capsys.readouterr().err
