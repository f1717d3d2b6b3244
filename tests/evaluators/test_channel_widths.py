"""Widths that are slower than wider ones: the decision on given tables, a real table, and what a space offers."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evaluators.latency.cache import LatencyCache
from evaluators.latency.channel_width_timing import CONFIRMATIONS, QUICK, known_widths, timed_ratio
from evaluators.latency.channel_widths import OfferedWidths, WidthTimes, offered_widths
from evaluators.latency.slow_layers import Interval
from evaluators.runtimes.base import Target
from evaluators.runtimes.onnxruntime_cpu import OnnxRuntime
from search.cli import run
from search.config.study import Study
from search.pipeline.channel_steps import (
    NOT_MEASURED,
    ChannelSteps,
    channel_steps,
    measured_widths,
    stated_reason,
    width_remarks,
)
from search.pipeline.pipeline import build_pipeline
from search.results.store import SearchFolder, StoredSearch, read_widths, store_widths
from spaces.precision import PrecisionSpace
from tests.helpers import tiny
from tests.helpers.searches import ROOT

WIDTHS = tuple(range(8, 65, 8))
TARGET = Target("onnxruntime", OnnxRuntime().device(), 4, 1)


def table(*ratios: float, half_width: float = 0.01) -> WidthTimes:
    return WidthTimes(WIDTHS, tuple(Interval(ratio, half_width) for ratio in ratios))


FALLING = table(0.9, 0.4, 0.95, 0.5, 0.97, 0.6, 0.98)
EIGHT_IS_SLOW = table(1.24, 0.7, 0.88, 0.71, 0.9, 0.74, 0.9)
SIXTEENS = table(1.2, 0.5, 1.1, 0.6, 1.05, 0.7, 1.05)
THIRTY_TWOS = table(1.1, 1.0, 1.1, 0.6, 1.0, 1.05, 1.0)


@pytest.mark.parametrize(
    ("times", "slower", "offered"),
    [
        (FALLING, set(), OfferedWidths(8, 8)),
        (EIGHT_IS_SLOW, {8}, OfferedWidths(8, 16)),
        (SIXTEENS, {8, 24, 40, 56}, OfferedWidths(16, 16)),
        (THIRTY_TWOS, {8, 16, 24, 40, 48}, OfferedWidths(32, 32)),
    ],
)
def test_no_width_that_is_slower_than_a_wider_one_is_offered(times, slower, offered) -> None:
    assert times.slower == slower
    assert offered_widths([times]) == offered


def test_a_difference_within_the_tolerance_or_the_interval_is_none() -> None:
    assert table(1.03, *[1.0] * 6).slower == frozenset()
    assert table(1.2, *[0.9] * 6, half_width=0.2).slower == frozenset()


def test_small_differences_add_up() -> None:
    assert table(1.03, 1.03, 0.9, 1.0, 1.0, 1.0, 1.0, half_width=0.001).slower == {8}


def test_a_width_is_offered_if_it_is_no_slower_in_one_precision() -> None:
    assert offered_widths([FALLING, EIGHT_IS_SLOW]) == OfferedWidths(8, 8)
    assert offered_widths([EIGHT_IS_SLOW, SIXTEENS]) == OfferedWidths(8, 16)


@given(st.lists(st.floats(0.3, 1.5), min_size=7, max_size=7))
def test_what_is_offered_is_never_slower_and_never_nothing(ratios: list[float]) -> None:
    times = table(*ratios)
    offered = offered_widths([times])
    left = [width for width in WIDTHS if width % offered.step == 0 and width >= offered.least]
    assert left
    assert not times.slower & set(left)


def test_a_table_comes_back_from_json() -> None:
    assert WidthTimes.from_dict(json.loads(json.dumps(SIXTEENS.to_dict()))) == SIXTEENS


def scripted(*ratios: float):
    """Returns what times a pair, with given results in turn, and the protocols that it was asked for."""
    asked, left = [], list(ratios)

    def times(narrow, wide, protocol) -> Interval:
        asked.append(protocol)
        return Interval(left.pop(0), 0.01)

    return times, asked


def test_a_pair_that_is_clearly_no_slower_is_timed_once() -> None:
    times, asked = scripted(0.8)
    assert timed_ratio(times, 8, 16, lambda: False) == Interval(0.8, 0.01)
    assert asked == [QUICK]


def test_a_width_is_slower_only_if_all_timings_agree() -> None:
    times, asked = scripted(1.3, 1.25, 1.2)
    assert timed_ratio(times, 8, 16, lambda: False) == Interval(1.2, 0.01)
    assert len(asked) == 1 + CONFIRMATIONS
    times, _ = scripted(1.3, 1.0)
    assert timed_ratio(times, 8, 16, lambda: False) == Interval(1.0, 0.01)


def test_what_is_undecided_when_the_time_is_up_is_offered() -> None:
    times, _ = scripted(1.3)
    late = timed_ratio(times, 8, 16, lambda: True)
    assert late.ratio == 1.3
    assert WidthTimes((8, 16), (late,)).slower == frozenset()


@pytest.fixture(scope="module")
def measured(cache) -> tuple[LatencyCache, dict[str, WidthTimes]]:
    kept = LatencyCache(cache / "widths")  # the tests' searches use it, too
    return kept, known_widths(OnnxRuntime(), TARGET, kept)


def test_each_precision_of_a_real_target_gets_a_step(measured) -> None:
    _, tables = measured
    assert tuple(tables) == OnnxRuntime().capabilities().precisions
    for times in tables.values():
        assert times.widths == WIDTHS
        assert all(ratio.ratio > 0 for ratio in times.ratios)
        assert offered_widths([times]).step in (8, 16, 32)


def test_a_table_is_timed_once_for_each_target(measured) -> None:
    kept, tables = measured

    def never(*_: object) -> None:
        raise RuntimeError("timed again")

    before = torch.random.get_rng_state()
    assert known_widths(OnnxRuntime(), TARGET, kept, never) == tables
    assert known_widths(OnnxRuntime(), replace(TARGET, batch=64), kept, never) == tables
    with pytest.raises(RuntimeError, match="timed again"):
        known_widths(OnnxRuntime(), replace(TARGET, batch=3), kept, never)
    assert torch.equal(torch.random.get_rng_state(), before), "trainings are the same, timed or not"


ABLE = OnnxRuntime().capabilities()
PLAIN = Study.parse(tiny.STUDY, "test")


def steps(study: Study, allowed: tuple[str, ...], widths) -> ChannelSteps:
    space = PrecisionSpace(("a", "skips.b.gate"), ("fp32", "int8"), {"a": allowed, "skips.b.gate": ("fp32",)})
    return channel_steps(study, ABLE, space, widths)


def test_steps_suit_the_precisions_that_layers_may_have() -> None:
    widths = {"fp32": FALLING, "int8": SIXTEENS}
    assert steps(PLAIN, ("fp32", "int8"), widths) == ChannelSteps(8, 16, 8)
    assert steps(PLAIN, ("fp32",), widths) == ChannelSteps(8, 8, 8)
    assert steps(PLAIN, ("int8",), widths) == ChannelSteps(16, 16, 16)
    assert steps(PLAIN, ("int8",), {**widths, "int8": EIGHT_IS_SLOW}) == ChannelSteps(8, 8, 16)


def test_without_a_table_the_runtimes_own_steps_hold() -> None:
    assert steps(PLAIN, ("int8",), NOT_MEASURED) == ChannelSteps(8, 8)


def test_a_given_step_holds_and_nothing_is_timed() -> None:
    study = Study.parse(f"{tiny.STUDY}\n[space]\nchannel_step = 4", "test")

    def never(*_: object) -> None:
        raise AssertionError("timed")

    assert measured_widths(study, OnnxRuntime(), TARGET, never, never) == NOT_MEASURED
    assert steps(study, ("fp32", "int8"), {"fp32": SIXTEENS, "int8": SIXTEENS}) == ChannelSteps(4, 4)
    assert width_remarks(study, OnnxRuntime(), NOT_MEASURED) == []
    assert study.question_key != PLAIN.question_key
    assert Study.parse(study.to_toml(), "again") == study


def test_a_runtime_that_compiles_keeps_its_own_steps_and_says_so() -> None:
    class Compiling(OnnxRuntime):
        def capabilities(self):
            return replace(super().capabilities(), compiles=True, channel_steps={"fp32": 8, "int8": 32})

    assert stated_reason(Compiling()) is not None
    assert measured_widths(PLAIN, Compiling(), TARGET, lambda *_: None, lambda _: None) == NOT_MEASURED
    (remark,) = width_remarks(PLAIN, Compiling(), NOT_MEASURED)
    assert remark.startswith("widths in steps of 8 (fp32), steps of 32 (int8): as onnxruntime ")
    assert remark.endswith(" states, not measured: it compiles every network that is timed")


def test_a_runtime_that_refuses_keeps_its_own_steps_and_says_why(cache) -> None:
    class Refusing(OnnxRuntime):
        def version(self) -> str:
            return "onnxruntime of another kind"

        def open(self, *_: object):
            raise RuntimeError("no convolutions here")

    told: list[str] = []
    assert measured_widths(PLAIN, Refusing(), TARGET, lambda *_: None, told.append) == NOT_MEASURED
    assert told == ["Note: widths of layers could not be timed, so the runtime's steps hold: no convolutions here."]


def test_what_was_measured_is_said_in_one_line() -> None:
    def said(fp32: WidthTimes, int8: WidthTimes) -> list[str]:
        return width_remarks(PLAIN, OnnxRuntime(), {"fp32": fp32, "int8": int8})

    assert said(SIXTEENS, SIXTEENS) == [
        "widths in steps of 16: measured on this target, layers of other widths are no faster"
    ]
    assert said(FALLING, FALLING) == ["widths in steps of 8: measured on this target, no wider layer is faster"]
    assert said(FALLING, EIGHT_IS_SLOW) == [
        "widths in steps of 8 (fp32), steps of 8 from 16 on (int8): measured on this target, layers of other widths"
        " are no faster"
    ]


def test_a_space_offers_what_suits_its_target(cache) -> None:
    study = Study.parse(f'{tiny.STUDY}\n[space]\nprecision = "int8"\nkeep_at_least = 0.1', "test")
    plain, wide = (
        build_pipeline(study, lambda *_: None, widths=widths) for widths in ({}, {"fp32": FALLING, "int8": SIXTEENS})
    )
    narrowest = {name: each.low for name, each in plain.space.sparsity.dimensions().items()}
    assert min(narrowest.values()) < 16
    for name, dimension in wide.space.sparsity.dimensions().items():
        assert dimension.low >= 16, name
        assert dimension.step % 16 == 0, name
    assert any(remark.startswith("widths in steps of 8 (fp32), steps of 16") for remark in wide.remarks)


@pytest.mark.slow
def test_a_search_goes_on_with_the_widths_that_it_began_with(folder, tmp_path, capsys) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(folder / "one", runs / "one")
    began = StoredSearch.read(SearchFolder(runs / "one"))
    assert tuple(began.widths) == ("fp32", "int8")
    others = {"fp32": SIXTEENS, "int8": SIXTEENS}
    store_widths(began.folder.open(), others)
    asked = ["--study", str(folder.parent / "study.toml"), "--search", "one", "--runs", str(runs), "--trials", "13"]
    assert run(asked) in (0, 1)
    assert "widths in steps of 16: measured on this target" in " ".join(capsys.readouterr().out.split())
    resumed = StoredSearch.read(began.folder)
    assert resumed.widths == others
    assert resumed.finished == began.finished + 1


def test_a_search_of_before_has_no_widths_and_keeps_the_steps_of_its_runtime() -> None:
    assert read_widths(SearchFolder(ROOT / "tests" / "data" / "before" / "search").open()) == {}
