"""Layers that are slower in a lower precision: the decision on given timings, a real run, and what a search does."""

import json
import math
import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from evaluators.artifact_builder import ArtifactBuilder
from evaluators.latency.cache import LatencyCache
from evaluators.latency.slow_layer_timing import SlowLayerFinder
from evaluators.latency.slow_layers import (
    CONFIRMATIONS,
    LEAST_S,
    MOST_S,
    SHARE,
    TIMINGS,
    Interval,
    SlowerLayers,
    SlowGroup,
    SlowGroupSearch,
    SlowLayers,
    WholeNetwork,
    seconds_for,
)
from evaluators.runtimes.base import Target
from evaluators.runtimes.local import LocalSession
from evaluators.runtimes.onnxruntime_cpu import OnnxRuntime, load
from search.loop.coordinator import build_coordinator
from search.loop.resume import without_slow_precisions
from search.report.describe import slow_layers_line
from search.results.store import Baseline, SearchFolder
from search.samplers.distributions import distributions, first_guesses
from spaces.candidate import Candidate
from spaces.dynamic.exit_network import ExitNetwork
from spaces.precision import PrecisionSpace
from tests.helpers.searches import stored

GAINS = st.lists(st.integers(-9, 9).filter(bool), min_size=1, max_size=8)
MANY = st.lists(st.integers(-9, 9), min_size=1, max_size=60)


class Costs:
    """A network whose layers each take longer, or shorter, by a known time in the lower precision."""

    def __init__(self, gains: dict[str, int], base: float = 1000.0) -> None:
        self.gains, self.base = gains, base
        self.seen: list[tuple[tuple[str, ...], Interval]] = []

    def total(self, flipped) -> float:
        return self.base - sum(gain for layer, gain in self.gains.items() if layer not in flipped)

    def __call__(self, group, kept) -> Interval:
        assert not set(group) & set(kept)
        self.seen.append((group, Interval(self.total({*kept, *group}) / self.total(set(kept)), 1e-9)))
        return self.seen[-1][1]


def named(gains: list[int]) -> Costs:
    return Costs({f"layer{index}": gain for index, gain in enumerate(gains)})


def hunt(costs, timings: int = 1000) -> SlowGroupSearch:
    made = SlowGroupSearch(costs, timings, lambda: False)
    made.run(tuple(costs.gains))
    return made


def losers(found: SlowGroupSearch) -> set[str]:
    return {layer for lost in found.excluded for layer in lost.group}


@given(GAINS)
def test_in_a_small_network_exactly_the_losers_are_found(gains: list[int]) -> None:
    costs = named(gains)
    assert losers(hunt(costs)) == {layer for layer, gain in costs.gains.items() if gain < 0}


@given(MANY, st.integers(0, 60))
def test_what_is_left_never_loses_whenever_the_time_is_up(gains: list[int], timings: int) -> None:
    costs = named(gains)
    found = hunt(costs, timings)
    assert found.timing_count == len(costs.seen) <= max(timings, 1 + CONFIRMATIONS)
    kept: set[str] = set()
    for lost in found.excluded:
        assert lost.interval.high < 1
        assert costs.total({*kept, *lost.group}) < costs.total(kept)
        assert not kept & set(lost.group)
        kept |= set(lost.group)
    either = costs.total(set()), costs.total(set(costs.gains))
    assert costs.total(kept) <= min(either), "the network is no slower than in either precision alone"


@given(MANY, st.integers(0, 60))
def test_nothing_that_was_seen_to_lose_is_offered_unless_it_is_proved_faster(gains: list[int], timings: int) -> None:
    costs = named(gains)
    out = losers(hunt(costs, timings))
    for group, interval in costs.seen:
        if interval.high < 1:
            assert out & set(group), f"{group} was seen to lose and was offered as it is"
    offered = set(costs.gains) - out
    if sum(gains) < 0:  # as a whole it loses: what is offered was proved
        proved = {layer for group, interval in costs.seen if interval.low > 1 for layer in group}
        assert offered <= proved


@given(MANY)
def test_a_network_that_loses_as_a_whole_is_judged_before_anything_else(gains: list[int]) -> None:
    costs = named(gains)
    found = hunt(costs, timings=0)
    whole = tuple(costs.gains)
    if sum(gains) < 0:
        assert [group for group, _ in costs.seen] == [whole] * (1 + CONFIRMATIONS)
        assert losers(found) == set(whole)
        assert (found.is_whole_slower, found.whole.ratio < 1) == (True, True)
    else:
        assert [group for group, _ in costs.seen] == [whole]
        assert (losers(found), found.is_whole_slower) == (set(), False)


def test_big_parts_are_tried_before_small_ones() -> None:
    costs = Costs(dict.fromkeys("abcdefgh", -9) | {"h": 50})
    assert losers(hunt(costs)) == set("abcdefg")
    tried = list(dict.fromkeys("".join(group) for group, _ in costs.seen))
    assert tried[:3] == ["abcdefgh", "abcd", "efgh"]
    assert tried.index("ab") < tried.index("a")


def test_what_is_left_of_a_group_has_the_ratio_that_is_left() -> None:
    costs = Costs(dict.fromkeys("abc", -9) | {"d": 5})
    (lost,) = hunt(costs).excluded
    assert lost.group == tuple("abc")
    assert lost.interval.ratio == pytest.approx(costs.total({*"abc"}) / costs.total(set()))


def test_layers_that_lose_together_only_are_found_as_a_whole() -> None:
    class Conversions(Costs):
        """Every border between the precisions costs more than any layer loses."""

        def total(self, flipped) -> float:
            names = list(self.gains)
            borders = sum((a in flipped) != (b in flipped) for a, b in pairwise(names))
            return super().total(flipped) + 5 * borders

    costs = Conversions(dict.fromkeys(("a", "b"), 20) | dict.fromkeys(("c", "d"), -7) | dict.fromkeys("efgh", 20))
    assert [lost.group for lost in hunt(costs).excluded] == [("c", "d")]


def test_a_single_lucky_timing_is_not_believed() -> None:
    said = iter([Interval(0.9, 0.01)] * CONFIRMATIONS + [Interval(1.0, 0.01)])
    assert SlowGroupSearch(lambda *_: next(said), 100, lambda: False).run(("a",)) == []
    said = iter([Interval(0.9, 0.01)] * CONFIRMATIONS + [Interval(0.95, 0.01)])
    assert SlowGroupSearch(lambda *_: next(said), 100, lambda: False).run(("a",)) == [
        SlowGroup(("a",), Interval(0.95, 0.01))
    ]


def test_a_part_does_not_come_back_for_a_single_lucky_timing() -> None:
    faster, slower = Interval(1.1, 0.01), Interval(0.9, 0.01)
    said = iter([slower] * (1 + CONFIRMATIONS) + [faster] * CONFIRMATIONS + [Interval(1.0, 0.01)] + [slower])
    assert SlowGroupSearch(lambda *_: next(said), 100, lambda: False).run(("a", "b")) == [SlowGroup(("a", "b"), slower)]


def test_what_was_seen_to_lose_when_the_time_was_up_is_left_out_and_said_to_be_unconfirmed() -> None:
    costs = Costs(dict.fromkeys("abcd", 9) | dict.fromkeys("efgh", -5))
    late = SlowGroupSearch(costs, 100, lambda: late.timing_count >= 3)
    late.run(tuple("abcdefgh"))
    assert (late.timing_count, late.is_unfinished) == (3, True)
    assert [(lost.group, lost.is_confirmed) for lost in late.excluded] == [(tuple("efgh"), False)]


def test_an_examination_takes_a_share_of_the_search_and_no_more_than_is_sane() -> None:
    assert seconds_for(0.0) == LEAST_S
    assert seconds_for(1000.0) == pytest.approx(1000.0 * SHARE)
    assert seconds_for(math.inf) == MOST_S


class Smooth(nn.Module):
    """Activations that ONNX Runtime has in float only, so that int8 layers pay for conversions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, 1, 1, groups=16)
        self.wide = nn.Conv2d(16, 32, 3, 1, 1)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        silu = nn.functional.silu
        return self.head(self.wide(silu(self.depthwise(silu(self.stem(x))))).mean((2, 3)))


class Refusing(OnnxRuntime):
    """Loads no file with int8 in it, until it is told otherwise."""

    refuses = True

    def open(self, stages, thresholds, threads, confidence="softmax"):
        if self.refuses and any(b"QuantizeLinear" in stage for stage in stages):
            raise RuntimeError("no int8 here")
        return super().open(stages, thresholds, threads, confidence)


class Burdened(OnnxRuntime):
    """ONNX Runtime on a device where some layers take extra time in one precision.

    Args:
        burdens: for each layer the milliseconds of CPU time that it takes more in fp32, and in int8.
    """

    def __init__(self, burdens: dict[str, tuple[float, float]]) -> None:
        super().__init__()
        self.burdens = burdens

    def open(self, stages, thresholds, threads, confidence="softmax"):
        return LocalSession([self._slowed(stage, threads) for stage in stages], thresholds, threads, confidence)

    def _slowed(self, stage: bytes, threads: int):
        loaded = load(stage, threads)
        burdens = [both[f"trunk.{layer}.weight/q".encode() in stage] for layer, both in self.burdens.items()]

        def run(images):
            end = time.thread_time() + sum(burdens) * 1e-3
            while time.thread_time() < end:
                pass
            return loaded(images)

        return run


def examiner_of(library: OnnxRuntime, folder, batch: int = 4) -> SlowLayerFinder:
    """Returns what examines a small network on a runtime."""
    torch.manual_seed(0)
    network = ExitNetwork(Smooth().eval(), [], []).eval()
    images = np.random.default_rng(0).normal(size=(4, 3, 32, 32)).astype(np.float32)
    builder = ArtifactBuilder(network, images, library)
    dense = Candidate({}, dict.fromkeys(builder.layers, "fp32"))
    target = Target("onnxruntime", "test CPU", batch, 1)
    return SlowLayerFinder(builder, network, dense, ("fp32", "int8"), library, target, images, LatencyCache(folder))


LAYERS = ("stem", "depthwise", "wide", "head")


def test_a_runtime_on_which_int8_is_slow_is_not_offered_int8(tmp_path) -> None:
    library = Burdened(dict.fromkeys(LAYERS, (0.0, 1.0)))
    found = examiner_of(library, tmp_path).examine(lambda *_: None, 5.0)
    assert found.allowed(LAYERS, ("fp32", "int8")) == dict.fromkeys(LAYERS, ("fp32",))
    (whole,) = found.wholes
    assert whole.is_slower
    assert 1 / whole.ratio > 2
    assert [each.layers for each in found.record[: 1 + CONFIRMATIONS]] == [LAYERS] * (1 + CONFIRMATIONS)
    assert len(found.record) == found.timings
    said = slow_layers_line(found)
    assert f"int8 as a whole takes {1 / whole.ratio:.2f}" in said
    assert "times as long as fp32 here; it is offered to no layer: none was proved faster" in said
    assert SlowLayers.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_with_no_time_at_all_the_whole_network_is_judged_all_the_same(tmp_path) -> None:
    library = Burdened({"stem": (4.0, 0.0), "wide": (0.0, 9.0)})
    found = examiner_of(library, tmp_path).examine(lambda *_: None, 0.0)
    assert found.timings == 1 + CONFIRMATIONS
    assert found.left_out("int8") == len(LAYERS)
    assert found.unfinished == ("int8",)
    assert "the time was up before every part was looked at in int8" in slow_layers_line(found)


def test_what_is_proved_faster_comes_back_and_an_examination_cut_short_is_done_again(tmp_path) -> None:
    library = Burdened({"stem": (4.0, 0.0), "wide": (0.0, 9.0)})
    assert examiner_of(library, tmp_path).examine(lambda *_: None, 0.0).unfinished
    found = examiner_of(library, tmp_path).examine(lambda *_: None, 30.0)
    assert "int8" in found.allowed(LAYERS, ("fp32", "int8"))["stem"]
    assert found.allowed(LAYERS, ("fp32", "int8"))["wide"] == ("fp32",)
    assert "layers, where it was proved faster" in slow_layers_line(found)
    assert examiner_of(library, tmp_path).examine(lambda *_: None, 10.0) == found, "kept: it came to its end"


def test_layers_that_lose_in_a_network_that_wins_are_left_out(tmp_path) -> None:
    library = Burdened({"stem": (9.0, 0.0), "wide": (0.0, 3.0)})
    found = examiner_of(library, tmp_path).examine(lambda *_: None, 30.0)
    assert not found.wholes[0].is_slower
    allowed = found.allowed(LAYERS, ("fp32", "int8"))
    assert (allowed["stem"], allowed["wide"]) == (("fp32", "int8"), ("fp32",))
    assert "of fp32's time here. Left out as slower: " in slow_layers_line(found)


def test_networks_that_cannot_be_built_are_told_and_tried_again_the_next_time(tmp_path) -> None:
    library = Refusing()
    examiner = examiner_of(library, tmp_path)
    found = examiner.examine(lambda *_: None, 5.0)
    assert (found.refused, found.slower) == (("no int8 here",), ())
    assert "some could not be taken: no int8 here)" in slow_layers_line(found)
    assert SlowLayers.from_dict(found.to_dict()) == found
    library.refuses = False
    assert examiner.examine(lambda *_: None, 5.0).refused == ()


def test_a_real_examination_is_consistent_and_done_once(tmp_path) -> None:
    told: list[int] = []

    def examine(batch: int) -> SlowLayers:
        examiner = examiner_of(OnnxRuntime(), tmp_path, batch)
        return examiner.examine(lambda _, done, total: told.append(done), 5.0)

    found = examine(4)
    assert 1 <= found.timings == len(told) <= TIMINGS
    names = [layer for each in found.slower for layer in each.layers]
    assert len(names) == len(set(names))
    assert set(names) <= set(LAYERS)
    assert all(each.ratio * (1 + each.half_width) < 1 for each in found.slower)
    assert SlowLayers.from_dict(found.to_dict()) == found
    told.clear()
    assert examine(4) == found
    assert not told, "kept from before"
    examine(2)
    assert told, "another batch size is another question"


FOUND = SlowLayers((SlowerLayers(("b", "c"), "int8", "fp16", 0.9, 0.01),), 7, 3.21)


def test_a_layer_keeps_what_is_left() -> None:
    allowed = FOUND.allowed(["a", "b", "c"], ("fp32", "fp16", "int8"))
    space = PrecisionSpace(["a", "b", "c"], ("fp32", "fp16", "int8")).without(allowed)
    assert space.allowed == {"a": ("fp32", "fp16", "int8"), "b": ("fp32", "fp16"), "c": ("fp32", "fp16")}
    assert [space.nearest("b", each) for each in ("fp32", "fp16", "int8")] == ["fp32", "fp16", "fp16"]
    nothing_left = PrecisionSpace(["a", "b"], ("fp32", "int8"), {"a": ("fp32",)})
    assert list(nothing_left.dimensions()) == ["precision.b"]
    assert nothing_left.read({"precision.b": "int8"}) == {"a": "fp32", "b": "int8"}


def test_it_is_told_in_a_line() -> None:
    assert slow_layers_line(FOUND) == (
        "Left out as slower: b + c not in int8 (with them in fp16 the network takes 0.900 ± 0.009 of its time)"
        " (7 timings, 3.2 s)."
    )
    assert slow_layers_line(SlowLayers(timings=7, seconds=3.0)).startswith("No layer is measurably slower")
    many = SlowLayers(tuple(replace(FOUND.slower[0], layers=(name,)) for name in "abcde"))
    assert "and 2 more" in slow_layers_line(many)
    assert "\n" not in slow_layers_line(many)


WHOLE = WholeNetwork("int8", "fp32", 3, 0.3125, 0.01, True)


def test_a_network_that_is_slower_as_a_whole_is_told_with_what_is_offered() -> None:
    lost = SlowerLayers(("a", "b", "c"), "int8", "fp32", 0.3125, 0.01)
    none = SlowLayers((lost,), 9, 2.0, wholes=(WHOLE,))
    assert slow_layers_line(none) == (
        "int8 as a whole takes 3.20 ± 0.03 times as long as fp32 here; it is offered to no layer: none was proved"
        " faster (9 timings, 2.0 s)."
    )
    some = replace(none, slower=(replace(lost, layers=("a", "b")),), unfinished=("int8",))
    assert "it is offered to 1 of 3 layers, where it was proved faster" in slow_layers_line(some)
    assert "the time was up before every part was looked at in int8" in slow_layers_line(some)
    wins = SlowLayers((), 1, 2.0, wholes=(replace(WHOLE, ratio=2.0, is_slower=False),))
    assert slow_layers_line(wins).startswith("int8 as a whole takes 0.50 ± 0.01 of fp32's time here. No layer is")
    unsure = SlowLayers((replace(lost, is_confirmed=False),), 1, 2.0)
    assert "of its time, seen once)" in slow_layers_line(unsure)


def test_what_earlier_versions_kept_is_read() -> None:
    old = {
        "slower": [{"layers": ["b"], "precision": "int8", "instead": "fp32", "ratio": 0.9, "half_width": 0.01}],
        "timings": 7,
        "seconds": 3.0,
    }
    found = SlowLayers.from_dict(old)
    assert found.allowed(["a", "b"], ("fp32", "int8")) == {"a": ("fp32", "int8"), "b": ("fp32",)}
    assert (found.wholes, found.record, found.unfinished) == ((), (), ())
    assert SlowLayers.from_dict(found.to_dict()) == found


@pytest.fixture
def excluding(folder) -> Baseline:
    """The dense network's figures, as if one layer had been slower in int8."""
    slower = SlowLayers((SlowerLayers(("inner.0",), "int8", "fp32", 0.9, 0.01),), 3, 1.0)
    return replace(stored(folder).baseline, slow_layers=slower)


def test_a_search_never_proposes_what_was_left_out(pipeline, excluding, tmp_path) -> None:
    again = Baseline.from_dict(excluding.to_dict())
    assert again == excluding
    space = without_slow_precisions(pipeline.space, again.slow_layers)
    assert "precision.inner.0" not in distributions(space)
    assert any("int8" in guess.values() for guess in first_guesses(space))
    search = SearchFolder(tmp_path / "narrow")
    with search.lock():
        coordinator = build_coordinator(pipeline, search.create(), again, "random", 0, [])
        assert coordinator.run(6, None).code == 0
        more = build_coordinator(pipeline, search.create(), again, "random", 0, [])
        assert more.run(9, None).code == 0
    evaluations = [trial.user_attrs.get("evaluation") for trial in search.open().trials]
    given = [found["candidate"]["precision"] for found in evaluations if found]
    assert len(given) > 6
    assert {each["inner.0"] for each in given} == {"fp32"}
    assert {each["outer.0"] for each in given} == {"fp32", "int8"}


def test_what_was_left_out_is_still_a_legal_candidate(pipeline, excluding) -> None:
    candidate = pipeline.space.candidate(pipeline.space.uniform(1.0, "int8"))
    assert candidate.precision["inner.0"] == "int8"
    assert pipeline.deployed(candidate).answers.correct.any()
