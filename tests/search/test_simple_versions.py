"""The network as it is in each precision: measured first and in full, and nothing on the front is worse than it."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import TrialState
from torch import nn

from evaluators.artifact_builder import ArtifactBuilder
from evaluators.graph.digest import nameless_digest
from evaluators.latency.slow_layers import SlowerLayers, SlowLayers, WholeNetwork
from evaluators.runtimes.onnxruntime_cpu import OnnxRuntime
from search.cli import run
from search.config.budget import Budget
from search.config.objectives import BEFORE
from search.config.overrides import Request
from search.config.study import Study
from search.deploy.bundle import confirm, time_again, write_bundle
from search.loop.baseline import measure_baseline
from search.loop.coordinator import build_coordinator
from search.pipeline.given_network import GivenNetwork
from search.pipeline.pipeline import build_pipeline
from search.report.compare import parse_side
from search.report.describe import simple_lines
from search.report.overview import Overview
from search.results.pareto import beats, front_within
from search.results.simple_versions import GivenMeasurements
from search.results.store import Baseline, SearchFolder, StoredSearch, read_given, store_given
from spaces.candidate import Candidate
from spaces.dynamic.exit_network import ExitHead, ExitNetwork
from spaces.thresholds import Thresholds
from tests.helpers import tiny
from tests.helpers.searches import stored, version

DENSE = version(-1, 0.9, 10e-3, 100.0)
FIGURES = st.tuples(st.integers(50, 100), st.integers(1, 15), st.integers(1, 120))


def versions(figures, first: int) -> list:
    return [
        version(first + place, right / 100, taken * 1e-3, float(flops))
        for place, (right, taken, flops) in enumerate(figures)
    ]


@given(st.lists(FIGURES, max_size=12), st.lists(FIGURES, max_size=2), st.sampled_from(["latency<8ms", "flops<70%"]))
def test_nothing_on_the_front_is_slower_and_less_accurate_than_a_simple_version_in_the_budget(
    figures, others, limit
) -> None:
    budget, lines = Budget.parse([limit]), [DENSE, *(replace(each, name="x") for each in versions(others, -20))]
    trials = versions(figures, 0)
    found = front_within(trials, lines, budget, DENSE.measured, BEFORE)
    inside = [line for line in lines if budget.is_met(line.measured, DENSE.measured)]
    assert not any(beats(line, each) for line in inside for each in found.versions)
    assert all(any(beats(line, each) for line in inside) for each in found.beaten)
    assert all(budget.is_met(each.measured, DENSE.measured) for each in found.versions)
    again = front_within([each for each in found.versions if each.number >= 0], lines, budget, DENSE.measured, BEFORE)
    assert [each.costs(BEFORE).tolist() for each in again.versions] == [
        each.costs(BEFORE).tolist() for each in found.versions
    ]


def test_a_trial_of_a_simple_version_does_not_stand_beside_it() -> None:
    again = replace(DENSE, number=3)
    found = front_within([again], [DENSE], Budget.parse(["latency<20ms"]), DENSE.measured, BEFORE)
    assert found.versions == (DENSE,)
    assert [each.trial for each in found.versions] == ["dense"]


def test_a_version_with_fewer_flops_that_is_worse_otherwise_is_left_out_and_said(folder) -> None:
    search = stored(folder)
    int8 = search.baseline.versions_to_beat[1]
    whole = int8.measured
    slow = {
        **whole,
        "latency": replace(whole["latency"], value=whole["latency"].value * 1.5),
        "accuracy": replace(whole["accuracy"], value=whole["accuracy"].value - 0.5),
        "flops": replace(whole["flops"], value=1.0),
    }
    same = {each.evaluation.candidate.key for each in search.baseline.simple}
    number = next(each.number for each in search.versions if each.evaluation.candidate.key not in same)
    trial = search.trials[number]
    worse = {**trial.user_attrs["evaluation"], "measurements": {name: each.to_dict() for name, each in slow.items()}}
    trial.set_user_attr("evaluation", worse)
    search = replace(search, trials=(trial,), study=search.study.with_objectives(BEFORE))
    loose, tight = (Overview.of(search, Budget.parse([limit])) for limit in ("latency<1000%", "flops<50%"))
    assert [each.number for each in loose.beaten] == [trial.number]
    assert all(each.number < 0 for each in loose.front)
    assert [each.number for each in tight.front] == [trial.number]
    assert [each.number for each in tight.worse_than_simple["plain int8"]] == [trial.number]


def test_every_precision_is_measured_in_full_and_its_file_can_be_made_again(pipeline, folder) -> None:
    baseline = stored(folder).baseline
    assert [(each.precision, each.is_own) for each in baseline.simple] == [("fp32", True), ("int8", True)]
    assert [line.trial for line in baseline.versions_to_beat] == ["dense", "int8"]
    for each in baseline.simple:
        assert each.evaluation.candidate == pipeline.space.whole(each.precision)
        assert each.evaluation.digest == pipeline.deployed(each.evaluation.candidate).artifact.digest
        assert set(each.evaluation.measurements) == {"params", "size", "flops", "latency", "accuracy"}
        assert each.evaluation.measurements["accuracy"].n == len(pipeline.scored)
    assert Baseline.from_dict(json.loads(json.dumps(baseline.to_dict()))) == baseline
    earlier = read_given(SearchFolder(folder / "one").open())
    assert earlier is not None
    for each in baseline.simple:  # frozen exits change no file, so nothing was measured a second time
        for metric in ("latency", "accuracy"):
            assert each.evaluation.measurements[metric] == earlier.of(each.precision).measurements[metric]


def test_they_are_said_before_exits_are_trained(tmp_path, cache, capsys) -> None:
    study = tmp_path / "study.toml"
    study.write_text(tiny.STUDY.replace("epochs = 10", "epochs = 9"))
    run(["--study", str(study), "--search", "early", "--runs", str(tmp_path), "--trials", "1"])
    said = capsys.readouterr().out
    assert said.index("these are the lines to beat") < said.index("Training the exits")
    for precision in ("fp32", "int8"):
        assert f"\n  {precision}  " in said[: said.index("Training the exits")]


def test_a_search_that_was_stopped_while_it_trained_does_not_measure_them_again(tmp_path, cache, capsys) -> None:
    file = tmp_path / "study.toml"
    file.write_text(tiny.STUDY)
    network = GivenNetwork(Request(study=str(file)).to_study(), lambda *_: None)
    found = network.measure(lambda *_: None)
    assert GivenMeasurements.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    for name, kept in {"same": found, "another": replace(found, network="another network")}.items():
        search = SearchFolder(tmp_path / name)
        with search.lock():
            store_given(search.create(), kept)
        run(["--study", str(file), "--search", name, "--runs", str(tmp_path), "--trials", "1"])
        said = capsys.readouterr().out
        assert all(line in said for line in simple_lines(read_given(search.open())))
        assert ("Measuring the network as it is" in said) == (name == "another")
    taken = stored(tmp_path, "same").baseline
    assert taken.evaluation.measurements["latency"] == found.of("fp32").measurements["latency"]


SEARCHED = tiny.STUDY.replace("grid = 2", 'grid = 2, thresholds = "searched"').replace("latency<1000%", "latency<1us")


def test_as_trials_they_are_complete_whatever_limit_they_break(cache, tmp_path) -> None:
    pipeline = build_pipeline(Study.parse(SEARCHED, "test"), lambda *_: None)
    baseline = replace(measure_baseline(pipeline), slow_layers=None)
    search = SearchFolder(tmp_path / "tight")
    with search.lock():
        build_coordinator(pipeline, search.create(), baseline, "random", 0, []).run(4, None)
    trials = search.open().trials
    assert [trial.state for trial in trials[:2]] == [TrialState.COMPLETE] * 2
    for trial, each in zip(trials, baseline.simple, strict=False):
        assert trial.values[1] == each.evaluation.measurements["latency"].value
        assert trial.constraints["latency<1us"] > 0
    assert trials[3].state == TrialState.PRUNED


def test_what_the_guard_does_not_offer_is_a_line_to_beat_all_the_same(pipeline, folder, tmp_path) -> None:
    layers = tuple(layer for layer in pipeline.space.precision.layers if not layer.startswith("exits."))
    slow_layers = SlowLayers(
        (SlowerLayers(layers, "int8", "fp32", 0.3, 0.01),),
        3,
        1.0,
        wholes=(WholeNetwork("int8", "fp32", 7, 0.3, 0.01, True),),
    )
    baseline = replace(stored(folder).baseline, slow_layers=slow_layers)
    search = SearchFolder(tmp_path / "guarded")
    with search.lock():
        study = search.create()
        study.set_user_attr("study", pipeline.study.model_dump(mode="json"))
        study.set_user_attr("baseline", baseline.to_dict())
        build_coordinator(pipeline, study, baseline, "random", 0, []).run(3, None)
    overview = Overview.of(StoredSearch.read(search))
    given = [each.evaluation.candidate.precision for each in overview.versions]
    assert {precision[layer] for precision in given for layer in layers} == {"fp32"}
    assert [line.trial for line in overview.simple] == ["dense", "int8"]
    assert any(line.trial == "int8" for line in [*overview.front, *overview.other_simple])


def test_an_older_journal_has_the_dense_network_to_beat(folder) -> None:
    content = stored(folder).baseline.to_dict()
    del content["simple"]
    old = Baseline.from_dict(content)
    assert [line.trial for line in old.versions_to_beat] == ["dense"]
    overview = Overview.of(replace(stored(folder), baseline=old), Budget.parse(["latency<1000%"]))
    names = [each.trial for each in (*overview.front, *overview.other_simple)]
    assert names.count("dense") == 1
    assert 0 not in names or overview.search.trials[0].user_attrs["evaluation"]["candidate"] != (
        old.evaluation.candidate.to_dict()
    )


def test_a_simple_version_is_named_and_picked_like_a_trial(pipeline, folder, tmp_path) -> None:
    search = stored(folder)
    line = search.baseline.versions_to_beat[1]
    assert parse_side("one:int8", folder).version == line
    budget = Budget.parse(["latency<10000%"])
    taken = time_again(pipeline, search, [line], budget, "accuracy", lambda _: None).chosen
    assert taken is not None
    confirmed = confirm(pipeline, search, taken)
    assert confirmed.is_same_artifact
    write_bundle(tmp_path / "bundle", pipeline, search, budget, confirmed)  # which lets the bundle check itself
    assert json.loads((tmp_path / "bundle" / "bundle.json").read_text())["trial"] == "int8"


JOINT = tiny.STUDY.replace(
    "epochs = 10}", 'epochs = 5, training = "joint", joint = {epochs = 2, batch = 50, learning_rate = 0.05}}'
)


def test_a_network_that_is_trained_further_has_to_beat_what_was_given_too(cache, tmp_path) -> None:
    study = Study.parse(JOINT, "test")
    network = GivenNetwork(study, lambda *_: None)
    found = network.measure(lambda *_: None)
    pipeline = build_pipeline(study, lambda *_: None, given=network)
    baseline = measure_baseline(pipeline, found)
    lines = baseline.versions_to_beat
    assert [line.trial for line in lines] == ["dense", "int8", "given-fp32", "given-int8"]
    for line in lines[2:]:
        precision = str(line.trial).removeprefix("given-")
        assert baseline.given_precision(line) == precision
        assert line.evaluation.digest == network.deployed(precision).artifact.digest
        assert line.measured["accuracy"] == found.of(precision).measurements["accuracy"]
    assert baseline.given_precision(lines[1]) is None
    search = SearchFolder(tmp_path / "joint")
    with search.lock():
        stored_study = search.create()
        stored_study.set_user_attr("study", study.model_dump(mode="json"))
        stored_study.set_user_attr("baseline", baseline.to_dict())
        (search.path / "study.toml").write_text(JOINT)
    read, budget = StoredSearch.read(search), Budget.parse(["latency<10000%"])
    line = read.baseline.versions_to_beat[3]
    taken = time_again(pipeline, read, [line], budget, "accuracy", lambda _: None).chosen
    assert taken is not None
    confirmed = confirm(pipeline, read, taken)
    assert confirmed.is_same_artifact
    write_bundle(tmp_path / "bundle", pipeline, read, budget, confirmed)
    assert (tmp_path / "bundle" / "model.onnx").read_bytes() == network.deployed("int8").artifact.deployed[0]


def test_what_further_training_came_to_is_said_beside_what_was_given(cache, tmp_path, capsys) -> None:
    file = tmp_path / "study.toml"
    file.write_text(JOINT)
    run(["--study", str(file), "--search", "joint", "--runs", str(tmp_path), "--trials", "1"])
    said = capsys.readouterr().out
    assert "what was given has to be beaten as well" in said
    told = stored(tmp_path, "joint").baseline
    for line in told.versions_to_beat[1:]:
        assert f"\n  {line.title}  " in said
    assert run(["front", "--runs", str(tmp_path), "--search", "joint", "--budget", "latency<1us"]) == 1
    assert "The nearest, " in capsys.readouterr().out


def test_a_file_has_the_same_form_whatever_an_exit_calls_its_tensors(network, images, builder) -> None:
    alone = ExitNetwork(network.trunk, [], []).eval()
    other = ArtifactBuilder(alone, images.numpy(), OnnxRuntime())
    changed: nn.Module = tiny.randomized(1)
    with torch.no_grad():
        changed.load_state_dict(network.trunk.state_dict())
        changed.get_parameter("classifier.bias").add_(1.0)
    moved = ExitNetwork(changed, ["pool"], [ExitHead(16, 4, 2)]).eval()
    for precision in ("fp32", "int8"):
        closed = Candidate({}, dict.fromkeys(other.layers, precision), Thresholds(dict.fromkeys(network.exit_names)))
        with_exits = builder.build(network, closed).deployed[0]
        without = other.build(alone, Candidate({}, closed.precision)).deployed[0]
        assert nameless_digest(with_exits) == nameless_digest(without)
        third = ArtifactBuilder(moved, images.numpy(), OnnxRuntime())
        assert nameless_digest(
            third.build(moved, replace(closed, thresholds=Thresholds({"exit1": None}))).deployed[0]
        ) != nameless_digest(without)
    fp32, int8 = (
        nameless_digest(other.build(alone, Candidate({}, dict.fromkeys(other.layers, each))).deployed[0])
        for each in ("fp32", "int8")
    )
    assert fp32 != int8


def test_what_is_said_has_every_precision_and_its_share(folder: Path) -> None:
    found = read_given(SearchFolder(folder / "one").open())
    assert found is not None
    head, fp32, int8 = simple_lines(found)
    share = found.of("int8").measurements["latency"].value / found.of("fp32").measurements["latency"].value
    assert "the lines to beat" in head
    assert fp32.split()[0] == "fp32"
    assert "100.0% of dense" in fp32
    assert f"{share:.1%} of dense" in int8
