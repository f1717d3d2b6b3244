"""Layers that are slower in a lower precision: the decision on given timings, a real run, and what a search does."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from evaluators.artifact.build import ArtifactBuilder
from evaluators.examiner import PlacementExaminer
from evaluators.latency_cache import LatencyCache
from evaluators.placement import CONFIRMATIONS, TIMINGS, Examined, Hunt, Interval, Slower
from evaluators.runtimes.ort import OnnxRuntime
from evaluators.target import Target
from search.coordinator import Coordinator, narrowed
from search.samplers.first import distributions, first_guesses
from search.store import Baseline, SearchFolder
from search.text import examined_layers
from spaces.candidate import Candidate
from spaces.network import ExitNetwork
from spaces.precision import PrecisionSpace
from tests.searches import stored

GAINS = st.lists(st.integers(-9, 9).filter(bool), min_size=1, max_size=8)


class Costs:
    """A network whose layers each take longer, or shorter, by a known time in the lower precision."""

    def __init__(self, gains: dict[str, int], base: float = 1000.0) -> None:
        self.gains, self.base = gains, base

    def total(self, flipped) -> float:
        return self.base - sum(gain for layer, gain in self.gains.items() if layer not in flipped)

    def __call__(self, group, kept) -> Interval:
        return Interval(self.total({*kept, *group}) / self.total(set(kept)), 1e-9)


def hunt(costs, timings: int = 1000) -> Hunt:
    made = Hunt(costs, timings, lambda: False)
    made.run(tuple(costs.gains))
    return made


def losers(found: Hunt) -> set[str]:
    return {layer for group, _ in found.found for layer in group}


@given(GAINS)
def test_in_a_small_network_exactly_the_losers_are_found(gains: list[int]) -> None:
    costs = Costs({f"layer{index}": gain for index, gain in enumerate(gains)})
    assert losers(hunt(costs)) == {layer for layer, gain in costs.gains.items() if gain < 0}


@given(st.lists(st.integers(-9, 9), min_size=1, max_size=60), st.integers(0, 40))
def test_what_is_left_never_loses_and_the_timings_are_bounded(gains: list[int], timings: int) -> None:
    costs = Costs({f"layer{index}": gain for index, gain in enumerate(gains)})
    found = hunt(costs, timings)
    assert found.spent <= timings
    kept: set[str] = set()
    for group, interval in found.found:
        assert interval.high < 1
        assert costs.total({*kept, *group}) < costs.total(kept)
        kept |= set(group)
    if found.spent < timings:
        everything = costs.total(set(costs.gains))
        assert costs.total(kept) <= everything, "the network in the lower precision is no slower than without it"


def test_layers_that_lose_together_only_are_found_as_a_whole() -> None:
    class Conversions(Costs):
        """Every border between the precisions costs more than any layer loses."""

        def total(self, flipped) -> float:
            names = list(self.gains)
            borders = sum((a in flipped) != (b in flipped) for a, b in pairwise(names))
            return super().total(flipped) + 5 * borders

    costs = Conversions(dict.fromkeys(("a", "b"), 20) | dict.fromkeys(("c", "d"), -7) | dict.fromkeys("efgh", 20))
    found = hunt(costs)
    assert [group for group, _ in found.found] == [("c", "d")]


def test_a_single_lucky_timing_is_not_believed() -> None:
    said = iter([Interval(0.9, 0.01)] * CONFIRMATIONS + [Interval(1.0, 0.01)])
    assert Hunt(lambda *_: next(said), 100, lambda: False).run(("a",)) == []
    said = iter([Interval(0.9, 0.01)] * CONFIRMATIONS + [Interval(0.95, 0.01)])
    assert Hunt(lambda *_: next(said), 100, lambda: False).run(("a",)) == [(("a",), Interval(0.95, 0.01))]


def test_when_the_time_is_up_nothing_more_is_timed() -> None:
    costs = Costs(dict.fromkeys("abcdefgh", -1))
    late = Hunt(costs, 100, lambda: late.spent >= 4)
    late.run(tuple("abcdefgh"))
    assert late.spent == 4


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


def test_networks_that_cannot_be_built_are_told_and_tried_again_the_next_time(tmp_path) -> None:
    torch.manual_seed(0)
    network, library = ExitNetwork(Smooth().eval(), [], []).eval(), Refusing()
    images = np.random.default_rng(0).normal(size=(4, 3, 32, 32)).astype(np.float32)
    builder = ArtifactBuilder(network, images, library)
    dense = Candidate({}, dict.fromkeys(builder.layers, "fp32"), {})
    target = Target("onnxruntime", "test CPU", 4, 1)
    examiner = PlacementExaminer(
        builder, network, dense, ("fp32", "int8"), library, target, images, LatencyCache(tmp_path)
    )
    found = examiner.examine(lambda *_: None)
    assert (found.refused, found.slower) == (("no int8 here",), ())
    assert "some could not be taken: no int8 here)" in examined_layers(found)
    assert Examined.from_dict(found.to_dict()) == found
    library.refuses = False
    assert examiner.examine(lambda *_: None).refused == ()


def test_a_real_examination_is_consistent_and_done_once(tmp_path) -> None:
    torch.manual_seed(0)
    network, library = ExitNetwork(Smooth().eval(), [], []).eval(), OnnxRuntime()
    images = np.random.default_rng(0).normal(size=(4, 3, 32, 32)).astype(np.float32)
    builder = ArtifactBuilder(network, images, library)
    dense = Candidate({}, dict.fromkeys(builder.layers, "fp32"), {})
    told: list[int] = []

    def examine(batch: int) -> Examined:
        target = Target("onnxruntime", "test CPU", batch, 1)
        examiner = PlacementExaminer(
            builder, network, dense, ("fp32", "int8"), library, target, images, LatencyCache(tmp_path)
        )
        return examiner.examine(lambda _, done, total: told.append(done))

    found = examine(4)
    assert 1 <= found.timings == len(told) <= TIMINGS
    names = [layer for each in found.slower for layer in each.layers]
    assert len(names) == len(set(names))
    assert set(names) <= set(builder.layers)
    assert all(each.ratio * (1 + each.half_width) < 1 for each in found.slower)
    assert Examined.from_dict(found.to_dict()) == found
    told.clear()
    assert examine(4) == found
    assert not told, "kept from before"
    examine(2)
    assert told, "another batch size is another question"


FOUND = Examined((Slower(("b", "c"), "int8", "fp16", 0.9, 0.01),), 7, 3.21)


def test_a_layer_keeps_what_is_left() -> None:
    allowed = FOUND.allowed(["a", "b", "c"], ("fp32", "fp16", "int8"))
    space = PrecisionSpace(["a", "b", "c"], ("fp32", "fp16", "int8")).without(allowed)
    assert space.allowed == {"a": ("fp32", "fp16", "int8"), "b": ("fp32", "fp16"), "c": ("fp32", "fp16")}
    assert [space.nearest("b", each) for each in ("fp32", "fp16", "int8")] == ["fp32", "fp16", "fp16"]
    nothing_left = PrecisionSpace(["a", "b"], ("fp32", "int8"), {"a": ("fp32",)})
    assert list(nothing_left.dimensions()) == ["precision.b"]
    assert nothing_left.read({"precision.b": "int8"}) == {"a": "fp32", "b": "int8"}


def test_it_is_told_in_a_line() -> None:
    assert examined_layers(FOUND) == (
        "Left out as slower: b + c not in int8 (with them in fp16 the network takes 0.900 ± 0.009 of its time)"
        " (7 timings, 3.2 s)."
    )
    assert examined_layers(Examined(timings=7, seconds=3.0)).startswith("No layer is measurably slower")
    many = Examined(tuple(replace(FOUND.slower[0], layers=(name,)) for name in "abcde"))
    assert "and 2 more" in examined_layers(many)
    assert "\n" not in examined_layers(many)


@pytest.fixture
def excluding(folder) -> Baseline:
    """The dense network's figures, as if one layer had been slower in int8."""
    slower = Examined((Slower(("inner.0",), "int8", "fp32", 0.9, 0.01),), 3, 1.0)
    return replace(stored(folder).baseline, examined=slower)


def test_a_search_never_proposes_what_was_left_out(bench, excluding, tmp_path) -> None:
    again = Baseline.from_dict(excluding.to_dict())
    assert again == excluding
    space = narrowed(bench.space, again.examined)
    assert "precision.inner.0" not in distributions(space)
    assert any("int8" in guess.values() for guess in first_guesses(space))
    search = SearchFolder(tmp_path / "narrow")
    with search.lock():
        coordinator = Coordinator(bench, search.create(), again, "random", 0, [])
        assert coordinator.run(6, None).code == 0
        more = Coordinator(bench, search.create(), again, "random", 0, [])
        assert more.run(9, None).code == 0
    evaluations = [trial.user_attrs.get("evaluation") for trial in search.open().trials]
    given = [found["candidate"]["precision"] for found in evaluations if found]
    assert len(given) > 6
    assert {each["inner.0"] for each in given} == {"fp32"}
    assert {each["outer.0"] for each in given} == {"fp32", "int8"}


def test_what_was_left_out_is_still_a_legal_candidate(bench, excluding) -> None:
    candidate = bench.space.candidate(bench.space.uniform(1.0, "int8", 1.0))
    assert candidate.precision["inner.0"] == "int8"
    assert bench.subject(candidate).answers.correct.any()
