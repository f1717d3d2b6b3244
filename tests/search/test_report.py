"""A search as people look at it: pictures, page, report, comparison, and what they say of noise."""

import io
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluators.accuracy import accuracy_of, wilson
from evaluators.deployed import Answers
from evaluators.runtimes.base import Target
from search.cli import run
from search.commands.front import front_json
from search.config.budget import Budget
from search.config.objectives import BEFORE
from search.config.units import milliseconds, threshold
from search.report.axes import staircase
from search.report.caveats import caveats
from search.report.compare import Side, compare, parse_side
from search.report.describe import accuracy_half_width
from search.report.hover import hover
from search.report.html_page import page
from search.report.layers import heat_map, layers_of, leaving_shares, parallel_axes
from search.report.matplotlib_figures import profile_picture, save_pictures
from search.report.overview import Overview, hypervolume_history, notable_versions, write_profile
from search.report.report import report_of
from search.report.significance import difference
from search.report.tables import front_table
from search.report.text_plot import HEIGHT, scatter
from search.report.unmet_budget import unmet_budget
from search.results.pareto import feasible, hypervolume, pareto
from search.results.sensitivity import Point, Profile
from search.results.store import SearchFolder
from spaces.candidate import Candidate
from spaces.thresholds import Thresholds
from tests.helpers.searches import measurement, stored, version

DENSE = version(-1, 0.9, 10e-3, 100)
DENSE_MEASURED = DENSE.measured
BUDGET = Budget.parse(["latency<8ms"])
figures = st.tuples(st.integers(50, 100), st.integers(1, 10), st.integers(1, 100))
PROFILE = Profile("bn", 40, 0.0, (Point("stem.0", 16, 1.0, 0, 0, 1.0), Point("stem.0", 8, 0.5, 0.1, 0.2, 0.6)))


@pytest.fixture(scope="module")
def overview(folder, tmp_path_factory) -> Overview:
    """Of the finished search, of which nothing has been picked."""
    return Overview.of(replace(stored(folder), folder=SearchFolder(tmp_path_factory.mktemp("review") / "one")))


@given(st.lists(figures, min_size=1, max_size=12))
def test_hypervolume_grows_to_that_of_the_front(found) -> None:
    versions = [version(i, a / 100, ms * 1e-3, flops) for i, (a, ms, flops) in enumerate(found)]
    steps = hypervolume_history(versions, BUDGET, DENSE_MEASURED, BEFORE)
    shares = [share for _, share in steps]
    assert [number for number, _ in steps] == list(range(len(found)))
    assert shares == sorted(shares)
    front = pareto(feasible(versions, BUDGET, DENSE_MEASURED), BEFORE)
    assert shares[-1] == pytest.approx(hypervolume(front, BUDGET, DENSE_MEASURED, BEFORE))


@given(st.lists(figures, min_size=1, max_size=12))
def test_the_versions_most_worth_deploying_are_on_the_front_and_named_once(found) -> None:
    versions = [version(i, a / 100, ms * 1e-3, flops) for i, (a, ms, flops) in enumerate(found)]
    front = pareto(versions, BEFORE)
    worth = notable_versions(front, BEFORE)
    numbers = [each.number for _, each in worth]
    assert len(set(numbers)) == len(numbers) <= 3
    assert set(numbers) <= {each.number for each in front}
    assert [name for names, _ in worth for name in names.split(" and ")] != []
    assert sorted(name for names, _ in worth for name in names.split(" and ")) == ["fastest", "knee", "most accurate"]


@given(st.lists(figures, min_size=1, max_size=12))
def test_the_line_of_the_front_never_falls(found) -> None:
    front = pareto([version(i, a / 100, ms * 1e-3, flops) for i, (a, ms, flops) in enumerate(found)], BEFORE)
    corners = staircase(front)
    assert corners == sorted(corners)
    assert [y for _, y in corners] == sorted(y for _, y in corners)
    for each in front:
        at = (each.measured["latency"].value * 1e3, each.measured["accuracy"].value * 100)
        assert any(x <= at[0] and y >= at[1] for x, y in corners)


def test_shares_differ_as_newcombe_says() -> None:
    """His own example: 56 of 70 against 48 of 80 differ by 0.2, between 0.0524 and 0.3339."""
    found = difference(measurement("accuracy", 48 / 80, n=80), measurement("accuracy", 56 / 70, n=70))
    assert found.change == pytest.approx(0.2)
    assert found.change - found.noise == pytest.approx(0.0524, abs=5e-5)
    assert not found.is_noise
    other = difference(measurement("accuracy", 56 / 70, n=70), measurement("accuracy", 48 / 80, n=80))
    assert other.change == pytest.approx(-0.2)
    assert not other.is_noise
    assert difference(measurement("accuracy", 1.0, n=40), measurement("accuracy", 0.975, n=40)).is_noise


def test_latencies_differ_where_their_intervals_and_the_machine_leave_no_other_way() -> None:
    first = replace(measurement("latency", 1e-3), notes={"half_width": 0.03})
    second = replace(measurement("latency", 1.06e-3), notes={"half_width": 0.04})
    assert not difference(first, second).is_noise  # 6% against 5%
    assert difference(first, second).noise == pytest.approx(0.05)
    assert difference(first, second, machine=0.05).is_noise
    assert not difference(measurement("size", 100), measurement("size", 101)).is_noise


def test_accuracy_is_doubted_even_where_every_image_was_right() -> None:
    assert accuracy_half_width(measurement("accuracy", 1.0, n=175)) == pytest.approx(1 - wilson(1.0, 175)[0])
    assert 0.02 < accuracy_half_width(measurement("accuracy", 1.0, n=175)) < 0.022


def test_times_below_a_tenth_of_a_millisecond_are_in_microseconds() -> None:
    seconds = (28.46e-6, 99.9e-6, 0.1e-3, 4.974e-3, 0.25, 0.0)
    assert [milliseconds(each) for each in seconds] == ["28.5 µs", "99.9 µs", "0.10 ms", "4.97 ms", "250 ms", "0.00 ms"]


def test_where_all_frames_are_right_each_clip_counts_as_one_image() -> None:
    right, clips = np.ones(400, bool), np.repeat(np.arange(8), 50)
    nothing = np.zeros(400, np.int64)
    answers = Answers(nothing, right, nothing, 1, ((0, 1),), np.zeros((400, 0), bool), 1, clips=clips)
    accuracy = accuracy_of(answers, Target("onnxruntime", "here", 1, 1), "validation")
    assert accuracy_half_width(accuracy) == pytest.approx(1 - wilson(1.0, 8)[0])
    assert difference(accuracy, replace(accuracy, value=0.8)).is_noise
    assert f"100.00% ± {accuracy_half_width(accuracy) * 100:.1f} points" in hover(with_accuracy(DENSE, accuracy), DENSE)


def with_accuracy(one, accuracy):
    """Returns a version with another measurement of its accuracy."""
    measured = {**one.measured, "accuracy": accuracy}
    return replace(one, evaluation=replace(one.evaluation, measurements=measured))


@given(st.floats(0, 1, exclude_max=True))
def test_a_threshold_below_1_is_shown_below_1(value) -> None:
    assert float(threshold(value)) == pytest.approx(value, rel=0.005, abs=1e-300)
    assert float(threshold(value)) < 1
    assert threshold(0.99986) == "0.99986"
    assert threshold(0.9514678) == "0.951"


def test_layers_follow_their_groups_and_leave_with_their_exits() -> None:
    dense = Candidate(
        {"a": 16}, {"a": "fp32", "b": "fp32", "exits.exit1.classifier": "fp32"}, Thresholds({"exit1": None})
    )
    small = Candidate(
        {"a": 8},
        {"a": "int8", "b": "fp32", "exits.exit1.classifier": "int8"},
        Thresholds({"exit1": None}),
        {"b": "2:4"},
    )
    assert [str(layer) for layer in layers_of(small, dense, {"b": "a"})] == ["8/16 int8", "8/16 fp32 2:4", "-"]
    leaving = replace(small, thresholds=Thresholds({"exit1": 0.9}))
    assert [str(layer) for layer in layers_of(leaving, dense, {})] == ["8/16 int8", "fp32 2:4", "int8"]


def test_every_layer_whose_channels_go_together_is_known(overview) -> None:
    assert overview.search.members == {
        "stem.0": "stem.0", "outer.0": "stem.0", "depthwise.0": "stem.0", "inner.0": "inner.0",
        "pointwise.0": "pointwise.0", "hidden": "hidden",
    }  # fmt: skip


def test_heat_maps_have_a_column_for_each_version_up_to_forty() -> None:
    versions = [version(i, 0.9, 1e-3 * (i + 1), 10) for i in range(100)]
    found = heat_map(versions, DENSE)
    assert len(found.versions) == 40
    assert (found.versions[0].number, found.versions[-1].number) == (0, 99)
    assert found.share.shape == (len(found.groups), 40)
    assert heat_map([], DENSE).share.shape == (len(found.groups), 0)
    assert {len(axis.values) for axis in parallel_axes(versions, DENSE)} == {100}


def test_what_leaves_at_an_exit_is_told_by_the_networks_own_order() -> None:
    made = version(0, 0.9, 1e-3, 10)
    thresholds = Thresholds({"exit1": None, "exit2": 0.5})  # the second is the first that fires
    candidate = replace(made.evaluation.candidate, thresholds=thresholds)
    measured = dict(made.measured) | {"accuracy": replace(made.measured["accuracy"], notes={"exit1": 0.25})}
    made = replace(made, evaluation=replace(made.evaluation, candidate=candidate, measurements=measured))
    assert leaving_shares(made) == [0.0, 0.25]


def test_the_page_has_everything_and_needs_nothing(overview, tmp_path) -> None:
    text = page(overview, lambda each: f"http://mlflow.example/#/runs/{each.number}")
    assert text.count("plotly.js v") == 1
    outside = re.sub(r"<script.*?</script>", "", text, flags=re.S)
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", outside)
    assert "<script src" not in text
    for heading in ("Front", "All measured versions", "Layers along the front", "Progress", "Where inputs leave"):
        assert f">{heading}</h" in outside
    for each in overview.front:
        assert f'href="http://mlflow.example/#/runs/{each.number}"' in outside
    assert overview.search.study.question in outside
    save_pictures(overview, tmp_path)
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"front.png", "parallel.png", "layers.png", "hypervolume.png", "exits.png"}
    assert len(text) + sum(file.stat().st_size for file in tmp_path.iterdir()) < 10e6


def test_a_profile_that_was_measured_is_shown(folder, overview, tmp_path) -> None:
    search = replace(overview.search, folder=SearchFolder(tmp_path))
    assert Overview.of(search).profile is None
    write_profile(tmp_path, PROFILE)
    shown = Overview.of(search)
    assert shown.profile == PROFILE
    assert "Which channels matter" in page(shown)
    save_pictures(shown, tmp_path)
    assert (tmp_path / "profile.png").is_file()


def test_names_are_text_on_the_page(overview) -> None:
    study = overview.search.study.model_copy(update={"question": "Is <b> & 'b' worth it?"})
    text = page(replace(overview, search=replace(overview.search, study=study)))
    assert "Is &lt;b&gt; &amp; &#x27;b&#x27; worth it?" in text


def test_a_reports_commands_can_be_pasted(overview) -> None:
    moved = replace(overview, search=replace(overview.search, folder=SearchFolder(Path("my runs/one"))))
    lines = [line for line in report_of(moved).to_markdown().splitlines() if "python -m search pick" in line]
    assert len(lines) == len(overview.notable)
    for line in lines:
        words = shlex.split(line.partition(": ")[2])
        assert words[3:6] == ["pick", "--budget", str(overview.budget)]
        assert words[-4:] == ["--search", "one", "--runs", "my runs"]


def test_a_report_says_what_was_asked_found_and_to_be_doubted(overview) -> None:
    text = report_of(overview).to_markdown()
    for words in ("## Question", "## Front", "## Worth deploying", "## Dense baseline", "## Caveats"):
        assert words in text
    assert overview.search.study.question in text
    assert str(overview.budget) in text
    assert overview.dense.measured["latency"].protocol in text
    for name, each in overview.notable:
        assert f"{name}: trial {each.number}" in text
    for layer in overview.dense.evaluation.candidate.precision:
        assert f"| {layer} |" in text
    assert "No version has been confirmed" in text
    search = replace(overview.search, report={"remarks": ["surrogate of latency: R² 0.97"]})
    assert "Surrogate of latency: R² 0.97." in report_of(Overview.of(search)).to_markdown()


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_every_column_of_the_front_is_explained(overview, width) -> None:
    table = front_table(overview.front, overview.dense, "front", width, overview.other_simple)
    shown = [str(column.header) for column in table.columns]
    explained = str(table.caption)
    assert all(heading in explained for heading in shown if heading != "trial"), explained
    assert ("exits: share" in explained) == ("exits" in shown)
    page_of_all = report_of(overview).to_markdown()
    assert all(f"{heading}:" in page_of_all for heading in ("FLOPs", "size", "kept", "int8", "exits"))


def test_caveats_name_what_may_break_a_limit_or_is_known_badly(overview) -> None:
    front = list(overview.front)
    latency = front[0].measured["latency"]
    doubtful = replace(latency, notes={**latency.notes, "half_width": 0.5}, remarks=("the clock moved",))
    measured = dict(front[0].measured) | {"latency": doubtful}
    front[0] = replace(front[0], evaluation=replace(front[0].evaluation, measurements=measured))
    tight = Budget.parse([f"latency<{latency.value * 1.2e6:.6f}us"])
    told = "\n".join(caveats(replace(overview, budget=tight, front=(front[0],))))
    assert f"Trial {front[0].number} keeps {tight} by less than the measurement's 95% interval" in told
    assert f"trial {front[0].number} is uncertain by more than 10%" in told
    assert f"Trial {front[0].number}: the clock moved" in told
    nothing = Overview.of(overview.search, Budget.parse(["latency<1us"]))
    assert "No version keeps latency<1us. The nearest" in caveats(nothing)[0]
    assert "None." in report_of(nothing).to_markdown()
    assert "plotly.js v" in page(nothing)


def unscored(number: int, latency: float):
    """Returns a version that was ended when it broke a limit on latency."""
    whole = version(number, 0.1, latency, 10)
    measured = {name: value for name, value in whole.measured.items() if name != "accuracy"}
    return replace(whole, evaluation=replace(whole.evaluation, measurements=measured))


def test_a_budget_that_nothing_keeps_is_told_by_each_limit_and_by_what_would_help(overview, capsys) -> None:
    budget = Budget.parse(["latency<5ms", "accuracy_drop<2%"])
    study = overview.search.study.model_copy(update={"budget": budget})
    versions = (unscored(0, 5.1e-3), unscored(1, 9e-3), version(2, 0.69, 4e-3, 40), version(3, 0.66, 3e-3, 30))
    search = replace(overview.search, study=study)
    unmet = replace(
        overview, search=search, budget=budget, dense=DENSE, simple=(DENSE,), versions=versions, front=(), feasible=()
    )
    told = unmet_budget(unmet)
    assert told[1].startswith("latency<5ms: 2 of 5 versions measured on it keep it; the best, trial 3, has")
    assert told[2].startswith("accuracy_drop<2%: 1 of 3 versions measured on it keep it; the best, dense, has")
    assert told[3].startswith(
        "2 of 4 versions were ended before their accuracy was known: 2 when they broke latency<5ms"
    )
    assert (
        "The nearest, dense: latency 10.00 ms, 100% over latency<5ms; accuracy_drop 0.00% keeps accuracy_drop<2%."
        in told
    )
    assert "more recovery. Of 2 scored versions within latency<5ms the most accurate, trial 2, has 69.00%" in told[-1]
    assert all(line in report_of(unmet).to_markdown() for line in told)
    found = front_json(unmet)
    assert found["unmet"]["nearest"] == "dense"
    assert found["unmet"]["exceeded"] == {"latency<5ms": 1.0}
    assert [entry["trial"] for entry in found["not_scored"]] == [0, 1]


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ("latency<1ms", "a looser limit than latency<1ms, which nothing keeps"),
        ("accuracy>95%", "a better network. The dense one itself has an accuracy of 90.00%"),
        ("latency<5ms,flops<20,accuracy>80%", "looser limits. Each of latency<5ms,flops<20 is kept by some version"),
    ],
)
def test_what_would_help_follows_the_limit_that_is_in_the_way(overview, limits, words) -> None:
    versions = (version(0, 0.69, 4e-3, 40), version(1, 0.66, 6e-3, 10))
    budget = Budget.parse([limits])
    parts = {"dense": DENSE, "simple": (DENSE,), "versions": versions, "front": (), "feasible": ()}
    assert words in unmet_budget(replace(overview, budget=budget, **parts))[-1]


def test_a_pick_is_told_as_confirmed(overview, tmp_path) -> None:
    number = next(version.number for version in overview.front if version.number >= 0)  # no simple version
    (tmp_path / "picks.jsonl").write_text(json.dumps({"trial": number, "test_accuracy": 0.975}) + "\n")
    told = caveats(replace(overview, search=replace(overview.search, folder=SearchFolder(tmp_path))))
    assert f"Trial {number} was picked and measured again: 97.50% on test images." in told
    others = len(overview.front) > 1
    assert any(line.startswith("No other version has been confirmed") for line in told) == others


def test_a_version_compared_with_itself_is_the_same(overview) -> None:
    best = overview.front[0]
    found = compare(Side(overview, best), Side(overview, best))
    assert f"All {len(found.layers)} layers have the same width and precision." in found.parts()
    assert all(figure.difference.is_noise for figure in found.figures if figure.difference)


def test_what_two_searches_both_timed_tells_what_is_noise_between_them(overview) -> None:
    slower = []
    for each in overview.versions:
        latency = each.measured["latency"]
        slow = replace(latency, value=latency.value * 1.3) if not each.evaluation.candidate.active_exits else latency
        measured = {**each.measured, "latency": slow}
        slower.append(replace(each, evaluation=replace(each.evaluation, measurements=measured)))
    search = replace(overview.search, folder=SearchFolder(overview.search.folder.path.parent / "another"))
    other = replace(overview, search=search, versions=tuple(slower))
    pairs = [
        (one, two)
        for one, two in zip(overview.versions, slower, strict=True)
        if not one.evaluation.candidate.active_exits and one.evaluation.candidate != overview.dense.evaluation.candidate
    ]
    one, two = pairs[0]
    found = compare(Side(overview, one), Side(other, two))
    latency = next(figure for figure in found.figures if figure.metric == "latency")
    assert latency.difference.change == pytest.approx(0.3)
    assert "within noise" in latency.verdict
    (remark,) = found.remarks
    assert "versions that both searches timed" in remark
    assert "A and B are the same version" in remark
    dense = compare(Side(overview, overview.dense), Side(other, two))
    assert "A and B are the same version" not in dense.remarks[0]
    assert next(figure for figure in dense.figures if figure.metric == "latency").difference.noise > 0.26


def test_versions_are_compared_layer_by_layer(overview) -> None:
    best = overview.front[0]
    found = compare(Side(overview, overview.dense), Side(overview, best))
    kept = best.evaluation.candidate.channels
    for group, channels in overview.dense.evaluation.candidate.channels.items():
        (pair,) = [pair for pair in found.layers if pair.name == group]
        assert pair.differs == (kept[group] != channels or best.evaluation.candidate.precision[group] != "fp32")
    assert next(figure for figure in found.figures if figure.metric == "size").verdict.startswith("-")
    json.dumps(found.to_dict())


def test_compare_takes_searches_versions_and_trials_of_the_latest(folder, capsys) -> None:
    runs = ["--runs", str(folder)]
    assert run(["compare", "one", "one", *runs]) == 0
    assert "hypervolume" in capsys.readouterr().out
    assert run(["compare", "one:dense", "dense", *runs, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["first"] == "one: dense"
    front = parse_side("one", folder).overview.front
    trial = next(version.number for version in front if version.number >= 0)
    assert parse_side(str(trial), folder).version == parse_side(f"one:{trial}", folder).version
    for sides, words in ((["one", "one:dense"], "both"), (["one:999", "dense"], "one:999"), (["two", "one"], "two")):
        assert run(["compare", *sides, *runs]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1


def test_report_is_written_where_it_is_asked_for(folder, tmp_path, capsys) -> None:
    arguments = ["report", "--runs", str(folder), "--search", "one"]
    assert run([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["search"] == "one"
    assert found["caveats"]
    assert [file.rsplit(".", 1)[1] for file in found["files"]] == ["html", "md"]
    assert run([*arguments, "--out", str(tmp_path / "new" / "it.md"), "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert (tmp_path / "new" / "it.md").read_text().startswith("# tiny within")
    assert run([*arguments, "--out", str(tmp_path / "it.pdf")]) == 2
    assert ".html or .md" in capsys.readouterr().err


@pytest.mark.parametrize("width", [30, 80, 300])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_the_plot_of_characters_fits_and_shows_the_front(overview, width, ascii_only) -> None:
    lines = scatter(overview, width, ascii_only).splitlines()
    assert max(map(len, lines[: HEIGHT + 2])) <= max(width, 60)
    assert max(map(len, lines)) <= max(width, 80)
    assert sum(line.count("#") for line in lines[:HEIGHT]) >= 1
    assert not ascii_only or all(character.isascii() for line in lines for character in line)


def test_a_profile_without_any_loss_is_drawn() -> None:
    groups = {"stem": [Point("stem", 16, 1.0, 0.0, 0.0, 1.0), Point("stem", 8, 0.5, -0.01, 0.0, 0.6)]}
    profile_picture(groups, "nothing is lost").savefig(io.BytesIO())
