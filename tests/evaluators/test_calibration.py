"""Histograms count, calibrators choose: each against the formula that it stands for."""

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import numpy_helper
from scipy.stats import entropy

from evaluators.artifact_builder import ArtifactBuilder
from evaluators.inference.staged import StagedNetwork
from evaluators.quantization.calibration import CALIBRATORS
from evaluators.quantization.calibration.clipping import cuts, first_bins
from evaluators.quantization.calibration.entropy import divergences
from evaluators.quantization.calibration.histogram import BINS, Histogram
from evaluators.quantization.calibration.ranges import calibrated_ranges, histograms
from evaluators.quantization.scheme import Scheme
from evaluators.runtimes.onnxruntime_cpu import OnnxRuntime, activation_ranges, load
from evaluators.testing import CalibratorContract
from search.config.study import QuantizationSection, Study
from search.pipeline.pipeline import build_pipeline
from spaces.errors import QuantizationError
from spaces.registry import UnknownNameError
from tests.helpers import tiny

EACH = pytest.mark.parametrize("name", CALIBRATORS)
ACTIVATIONS = hnp.arrays(np.float32, st.integers(1, 300), elements=st.floats(-(2.0**100), 2.0**100, width=32))


def by_hand(counts: np.ndarray) -> Histogram:
    """Returns a histogram with bins of width 1."""
    return Histogram(np.pad(counts, (0, BINS - len(counts))), 0, 0.0, len(counts) - 0.5)


def tail(bins: int = 2500, decay: float = 150) -> np.ndarray:
    """Returns counts that fall off, with holes, and a few values far out."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(2000 * np.exp(-np.arange(bins) / decay))
    counts[-1] = 3
    return counts


def calibrated(name: str, histogram: Histogram, scheme: Scheme | None = None) -> tuple[float, float]:
    return histogram.clipped(CALIBRATORS[name](histogram, scheme or Scheme()))


def sqnr(values: np.ndarray, limits: tuple[float, float]) -> float:
    """Returns the decibels of values over the noise that symmetric s8 adds to them."""
    scale = max(-limits[0], limits[1]) / 127
    noise = np.clip(np.rint(values / scale), -127, 127) * scale - values
    return float(10 * np.log10(np.mean(values**2) / np.mean(noise**2)))


@settings(deadline=None)
@given(ACTIVATIONS, st.data())
def test_histograms_grow_into_that_of_all_values(values: np.ndarray, data: st.DataObject) -> None:
    places = data.draw(st.lists(st.integers(1, len(values)), max_size=4, unique=True))
    first, *others = [Histogram.of(part) for part in np.split(values, sorted(places)) if part.size]
    for other in data.draw(st.permutations(others)):
        first = first + other
    whole = Histogram.of(values)
    np.testing.assert_array_equal(first.counts, whole.counts)
    assert (first.exponent, first.low, first.high) == (whole.exponent, whole.low, whole.high)
    assert whole.counts.sum() == len(values)


@settings(deadline=None)
@given(ACTIVATIONS)
def test_a_histogram_counts_as_numpy_does(values: np.ndarray) -> None:
    found = Histogram.of(values)
    edges = np.arange(BINS + 1) * found.width
    np.testing.assert_array_equal(found.counts, np.histogram(np.abs(values.astype(np.float64)), edges)[0])
    assert found.used.sum() == len(values)
    assert found.largest == np.abs(values).max()


def test_more_than_half_of_the_bins_are_in_use() -> None:
    for largest in (1.0, 1.999, 2.0, 3e-20, 5e15):
        assert BINS / 2 < len(Histogram.of(np.array([0.1 * largest, -largest], dtype=np.float32)).used) <= BINS


@settings(deadline=None)
@given(st.integers(1, BINS))
def test_bins_are_rounded_to_the_nearest_level(kept: int) -> None:
    (first,) = first_bins(np.array([kept]))
    bins = np.arange(kept)
    levels = ((2 * bins + 1) * 127 + kept) // (2 * kept)  # floor of middle * 127 / kept + 1/2
    np.testing.assert_array_equal(np.searchsorted(first, bins, side="right") - 1, levels)


def test_a_percentile_is_the_first_edge_with_enough_below() -> None:
    histogram = by_hand(np.array([90, 5, 0, 4, 0, 1]))
    for percentile, edge in ((60, 1), (90, 1), (90.1, 2), (95, 2), (95.1, 4), (99, 4), (99.1, 6), (100, 6)):
        assert CALIBRATORS["percentile"](histogram, Scheme(percentile=percentile)) == edge


@settings(deadline=None)
@given(ACTIVATIONS, st.floats(51, 100))
def test_a_percentile_keeps_its_share_inside_and_no_bin_more(values: np.ndarray, percentile: float) -> None:
    histogram = Histogram.of(values)
    edge = CALIBRATORS["percentile"](histogram, Scheme(percentile=percentile))
    magnitudes, share = np.abs(values.astype(np.float64)), percentile / 100
    assert np.mean(magnitudes < edge) >= share
    assert edge <= histogram.width or np.mean(magnitudes < edge - histogram.width) < share


def test_mse_is_the_best_of_all_thresholds() -> None:
    histogram = by_hand(tail())
    middles = np.arange(2500) + 0.5

    def error(threshold: int) -> float:
        scale = threshold / 127
        return float(tail() @ (np.minimum(np.rint(middles / scale), 127) * scale - middles) ** 2)

    assert CALIBRATORS["mse"](histogram, Scheme()) == min(range(128, 2501), key=error)


def test_mse_clips_a_gaussian_where_the_literature_does() -> None:
    """Source: Banner et al., Post Training 4-Bit Quantization, 2019: 3.92 standard deviations at 8 bits."""
    values = np.random.default_rng(0).normal(size=2**21).astype(np.float32)
    assert CALIBRATORS["mse"](Histogram.of(values), Scheme()) == pytest.approx(3.92, rel=0.03)


def divergence(counts: np.ndarray, kept: int) -> float:
    """Returns KL(P || Q) bin by bin."""
    p, q = counts[:kept].astype(float), np.zeros(kept)
    levels = ((2 * np.arange(kept) + 1) * 127 + kept) // (2 * kept)
    for level in range(128):
        shared = (levels == level) & (p > 0)
        if shared.any():
            q[shared] = p[shared].mean()
    p[-1] += counts[kept:].sum()
    return float(entropy(p, q))


def test_entropy_is_the_divergence_that_scipy_computes() -> None:
    counts, kept = tail(300, decay=30), cuts(300)
    found = divergences(counts.astype(np.float64), kept)
    np.testing.assert_allclose(found, [divergence(counts, bins) for bins in kept], atol=1e-12)
    assert np.isinf(found).any()  # where the last bin inside is empty
    even = np.r_[counts[1], counts[1:]]  # zeros, which every grid holds, do not count
    best = min(reversed(kept), key=lambda bins: divergence(even, bins))
    spike = np.r_[10**6, counts[1:]]
    assert CALIBRATORS["entropy"](by_hand(spike), Scheme()) == best


def test_entropy_keeps_all_where_nothing_is_lost() -> None:
    sparse = np.zeros(3000, dtype=np.int64)
    sparse[[100, 1000, 2999]] = 7
    assert CALIBRATORS["entropy"](by_hand(sparse), Scheme()) == 3000


@EACH
@settings(deadline=None, max_examples=40)
@given(values=ACTIVATIONS)
def test_a_range_lies_within_the_extremes_and_holds_zero(name: str, values: np.ndarray) -> None:
    low, high = calibrated(name, Histogram.of(values))
    lowest, highest = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    assert lowest <= low <= 0 <= high <= highest
    assert low < high or not values.any()
    if name == "minmax":
        assert (low, high) == (lowest, highest)


@EACH
def test_an_outlier_does_not_take_the_levels_of_all_others(name: str) -> None:
    noise = np.random.default_rng(0).normal(0, 10, 2**22).astype(np.float32)
    limits = calibrated(name, Histogram.of(noise) + Histogram.of(np.array([1000], dtype=np.float32)))
    assert (sqnr(noise, limits) < 15) if name == "minmax" else (sqnr(noise, limits) > 30)


class TestMinMax(CalibratorContract):
    name = "minmax"


class TestEntropy(CalibratorContract):
    name = "entropy"


class TestPercentile(CalibratorContract):
    name = "percentile"


class TestMse(CalibratorContract):
    name = "mse"


def test_every_calibrator_keeps_the_contract() -> None:
    assert set(CALIBRATORS) <= {subclass.name for subclass in CalibratorContract.__subclasses__()}


class TestEveryCalibrator:
    """Its ranges lie within the extremes, are those that files are written with, and such files answer closely."""

    @pytest.fixture(params=CALIBRATORS)
    def calibrated(self, request, network, images) -> ArtifactBuilder:
        return ArtifactBuilder(network, images.numpy(), OnnxRuntime(), scheme=Scheme(calibrator=request.param))

    def test_covers_what_the_extremes_cover(self, calibrated, builder) -> None:
        assert calibrated.ranges.keys() == builder.ranges.keys()
        for tensor, (low, high) in calibrated.ranges.items():
            lowest, highest = builder.ranges[tensor]
            assert lowest <= low <= 0 <= high <= highest
            assert max(-low, high) > 0.05 * max(-lowest, highest)

    def test_reads_the_same_again(self, calibrated, network, images) -> None:
        assert calibrated.read_ranges(network, images.numpy()) == calibrated.ranges

    def test_is_what_is_written_and_answers_closely(self, calibrated, network, space, images) -> None:
        artifact = calibrated.build(network, space.candidate(space.uniform(1.0, "int8")))
        graph = onnx.load_from_string(artifact.stages[0]).graph
        values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        assert values["images/scale"] == pytest.approx(max(np.abs(calibrated.ranges["images"])) / 127)
        logits, _ = StagedNetwork([load(stage, 1) for stage in artifact.deployed], [])(images.numpy())
        exact = network(images)[-1].detach().numpy()
        assert 0 < np.sqrt(np.mean((logits - exact) ** 2) / np.mean(exact**2)) < 0.15


@pytest.fixture(scope="module")
def model(builder, network, space) -> bytes:
    """The tiny network's file, in fp32."""
    (stage,) = builder.build(network, space.dense()).stages
    return stage


def test_histograms_and_the_graph_tell_the_same_extremes(model, images) -> None:
    tensors = [name for node in onnx.load_from_string(model).graph.node for name in node.output]
    extremes = activation_ranges(model, tensors, images.numpy())
    counted = histograms(model, tensors, images.numpy())
    assert {name: (found.low, found.high) for name, found in counted.items()} == extremes
    assert counted["images"].counts.sum() == images.numel()


def test_a_calibrator_that_does_not_exist_is_one_line(network, images) -> None:
    with pytest.raises(UnknownNameError, match=r"a calibrator is one of minmax, .* got 'median'"):
        ArtifactBuilder(network, images.numpy(), OnnxRuntime(), scheme=Scheme(calibrator="median"))


def test_a_study_may_name_every_calibrator() -> None:
    assert [QuantizationSection(calibrator=name).calibrator for name in CALIBRATORS] == list(CALIBRATORS)
    section = QuantizationSection(calibrator="percentile", percentile=99.0)
    assert (
        CALIBRATORS[Scheme(**section.model_dump()).calibrator](by_hand(np.ones(100, int)), Scheme(percentile=99)) == 99
    )


def test_a_studys_calibrator_reaches_the_files(pipeline) -> None:
    text = tiny.STUDY + 'quantization = {calibrator = "percentile", percentile = 90.0}'
    clipped = build_pipeline(Study.parse(text, "the tests' study"), lambda *_: None).builder.ranges
    pixels = np.abs(pipeline.data.calibration.images[:])
    share = np.mean(pixels <= max(np.abs(clipped["images"])))
    assert 0.9 <= share < 0.91
    assert max(np.abs(pipeline.builder.ranges["images"])) == pixels.max()


def test_activations_that_are_not_finite_are_named(model, images) -> None:
    broken = images.numpy().copy()
    broken[7, 0, 3, 3] = np.inf
    with pytest.raises(QuantizationError, match=r"are finite, got nan to nan in activation 'logits' .*; check"):
        calibrated_ranges(model, ["logits"], broken, Scheme(calibrator="entropy"))
