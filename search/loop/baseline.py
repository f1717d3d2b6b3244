"""Measures the baseline before the first trial: the dense network and the other simple versions."""

import math
from dataclasses import replace

from evaluators.graph.digest import nameless_digest
from evaluators.latency.cache import LatencyCache
from evaluators.latency.evaluator import LatencyEvaluator
from evaluators.latency.slow_layer_timing import SlowLayerFinder
from evaluators.latency.slow_layers import SlowLayers, seconds_for
from search.config.cache import cache_folder
from search.config.environment import environment
from search.config.progress import Progress
from search.pipeline.evaluators import static_evaluators
from search.pipeline.pipeline import CompressionPipeline
from search.results.evaluation import Evaluation
from search.results.simple_versions import GivenMeasurements, SimpleVersion
from search.results.store import Baseline
from spaces.candidate import Candidate


def measure_baseline(
    pipeline: CompressionPipeline,
    given: GivenMeasurements | None = None,
    trials: int | None = None,
    timeout_s: float | None = None,
    progress: Progress = lambda *_: None,
) -> Baseline:
    """Returns the baseline, measured on the same target and by the same protocol as every candidate.

    Args:
        pipeline: of the study.
        given: measurements of the network before exits, gates and masks, reused where the files are the same.
        trials: number of trials that the search will have; by default the study's.
        timeout_s: maximum seconds of the search.
        progress: called with the progress of long steps.
    """
    has_same_references = given is not None and pipeline.references.have_forms(given.forms)
    spent = given.spent if given and has_same_references else pipeline.references.time()
    seconds = {name: times.work for name, times in spent.items()}
    latency = pipeline.references.latency_evaluator(seconds)
    simple = simple_versions(pipeline, latency, given, has_same_references)
    dense = simple[0].evaluation
    precision = pipeline.space.precision.precisions[0]
    self_ratio = latency.reference_self_ratio(precision, pipeline.data.validation.images[: pipeline.target.batch])
    walls = {name: times.wall for name, times in spent.items()}
    expected_s = (trials or pipeline.study.search.trials) * sum(dense.seconds.values())
    slow = find_slow_layers(pipeline, progress, min(expected_s, timeout_s or math.inf))
    machine = environment(pipeline.runtime.device(), pipeline.runtime.state())
    return Baseline(dense, seconds, self_ratio, machine, walls, slow, tuple(simple))


def find_slow_layers(pipeline: CompressionPipeline, progress: Progress, search_s: float) -> SlowLayers | None:
    """Returns which layers are slower in a lower precision, measured now or read from the cache.

    Args:
        pipeline: of the study.
        progress: called with the progress.
        search_s: expected seconds of the search; the examination takes a share of it.

    Returns:
        None if the study does not ask for it, or no layer has a choice of precision.
    """
    precision = pipeline.space.precision
    if not (pipeline.study.space.drop_slower and len(precision.computed) > 1 and precision.dimensions()):
        return None
    finder = SlowLayerFinder(
        pipeline.builder,
        pipeline.network,
        pipeline.space.dense(),
        precision.computed,  # storage precisions save bytes and need not be faster
        pipeline.runtime,
        pipeline.target,
        pipeline.data.validation.images,
        LatencyCache(cache_folder() / "placements"),
    )
    return finder.examine(progress, seconds_for(search_s))


def simple_versions(
    pipeline: CompressionPipeline, latency: LatencyEvaluator, given: GivenMeasurements | None, has_same_references: bool
) -> list[SimpleVersion]:
    """Returns the simple versions: the search's own network in each precision, then the loaded one where it differs.

    Args:
        pipeline: measures them, in full.
        latency: evaluator of this search.
        given: earlier measurements of the network as loaded; reused where the exported file is the same.
        has_same_references: whether these latencies were timed against the references of this search.
    """
    own: list[SimpleVersion] = []
    others: list[SimpleVersion] = []
    for precision in pipeline.space.precision.computed:
        candidate = pipeline.space.whole(precision)
        earlier = given.of(precision) if given else None
        form = given.forms[precision] if given and has_same_references else None
        reused = _reused(pipeline, candidate, earlier, form) if earlier and form else None
        own.append(SimpleVersion(precision, reused or pipeline.evaluate(candidate, latency)))
        if earlier and not reused:
            as_given = earlier if has_same_references else pipeline.given.evaluate(precision, latency).evaluation
            others.append(SimpleVersion(precision, replace(as_given, candidate=candidate), is_own=False))
    return [*own, *others]


def _reused(pipeline: CompressionPipeline, candidate: Candidate, earlier: Evaluation, form: str) -> Evaluation | None:
    """Returns an earlier evaluation as that of a candidate whose file has the same form; None if it differs."""
    deployed = pipeline.deployed(candidate)
    files = deployed.artifact.deployed
    if (
        len(files) != 1
        or nameless_digest(files[0]) != form
        or earlier.measurements["accuracy"].n != len(pipeline.scored)
    ):
        return None
    counted = {evaluator.metric: evaluator.measure(deployed) for evaluator in static_evaluators(pipeline.flops)}
    measured = {**earlier.measurements, **counted}
    return replace(earlier, candidate=candidate, measurements=measured, digest=deployed.artifact.digest)
