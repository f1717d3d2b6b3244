"""The dense network and the other simple versions, measured before the first trial: what a search has to beat."""

import math
from dataclasses import replace

from evaluators.graph.digest import form_of
from evaluators.latency.cache import LatencyCache
from evaluators.latency.evaluator import LatencyEvaluator
from evaluators.latency.slow_layer_timing import SlowLayerFinder
from evaluators.latency.slow_layers import SlowLayers, seconds_for
from search.config.cache import cache_folder
from search.config.environment import environment
from search.config.progress import Progress
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
    """Returns the dense network's figures, on the same target and by the same protocol as every candidate.

    Args:
        pipeline: measures it.
        given: what was measured of the network before exits, gates and masks; none where not given.
        trials: how many the search will have; as many as the study says where not given.
        timeout_s: how long it will take at most.
        progress: told about the steps that take long.
    """
    same = given is not None and pipeline.references.have_forms(given.forms)
    spent = given.spent if given and same else pipeline.references.time()
    seconds = {name: taken.work for name, taken in spent.items()}
    latency = pipeline.references.latency_evaluator(seconds)
    simple = simple_versions(pipeline, latency, given, same)
    dense = simple[0].evaluation
    precision = pipeline.space.precision.precisions[0]
    twice = latency.same_twice(precision, pipeline.data.validation.images[: pipeline.target.batch])
    walls = {name: taken.wall for name, taken in spent.items()}
    expected_s = (trials or pipeline.study.search.trials) * sum(dense.seconds.values())
    slow = find_slow_layers(pipeline, progress, min(expected_s, timeout_s or math.inf))
    machine = environment(pipeline.runtime.device(), pipeline.runtime.state())
    return Baseline(dense, seconds, twice, machine, walls, slow, tuple(simple))


def find_slow_layers(pipeline: CompressionPipeline, progress: Progress, search_s: float) -> SlowLayers | None:
    """Returns which layers are slower in a lower precision, measured now or kept from the same network.

    Args:
        pipeline: of the study.
        progress: told how far it is.
        search_s: the seconds that the search will take, of which this is a share.

    Returns:
        None where the study does not ask for it, or where no layer has a choice.
    """
    precision = pipeline.space.precision
    if not (pipeline.study.space.drop_slower and len(precision.computed) > 1 and precision.dimensions()):
        return None
    finder = SlowLayerFinder(
        pipeline.builder,
        pipeline.network,
        pipeline.space.dense(),
        precision.computed,  # what is stored smaller is not asked to be faster
        pipeline.runtime,
        pipeline.target,
        pipeline.data.validation.images,
        LatencyCache(cache_folder() / "placements"),
    )
    return finder.examine(progress, seconds_for(search_s))


def simple_versions(
    pipeline: CompressionPipeline, latency: LatencyEvaluator, given: GivenMeasurements | None, same: bool
) -> list[SimpleVersion]:
    """Returns the network as it is in each precision: the search's own, then as it was given where that is another.

    Args:
        pipeline: measures them, in full.
        latency: of this search.
        given: what was measured before; of a file that is the same, accuracy and latency hold.
        same: whether its latencies were told beside the references of this search.
    """
    own: list[SimpleVersion] = []
    others: list[SimpleVersion] = []
    for precision in pipeline.space.precision.computed:
        candidate = pipeline.space.whole(precision)
        earlier = given.of(precision) if given else None
        form = given.forms[precision] if given and same else None
        known = _known(pipeline, candidate, earlier, form) if earlier and form else None
        own.append(SimpleVersion(precision, known or pipeline.evaluate(candidate, latency)))
        if earlier and not known:
            before = earlier if same else pipeline.given.evaluate(precision, latency).evaluation
            others.append(SimpleVersion(precision, replace(before, candidate=candidate), is_own=False))
    return [*own, *others]


def _known(pipeline: CompressionPipeline, candidate: Candidate, earlier: Evaluation, form: str) -> Evaluation | None:
    """Returns an earlier evaluation as a candidate's own, where its file is of the same form; else None."""
    deployed = pipeline.deployed(candidate)
    files = deployed.artifact.deployed
    if len(files) != 1 or form_of(files[0]) != form or earlier.measurements["accuracy"].n != len(pipeline.scored):
        return None
    counted = {evaluator.metric: evaluator.measure(deployed) for evaluator in pipeline.cheap_evaluators}
    measured = {**earlier.measurements, **counted}
    return replace(earlier, candidate=candidate, measurements=measured, digest=deployed.artifact.digest)
