"""What is measured of every version: candidates, references and the network as it was given alike."""

from evaluators.accuracy import AccuracyEvaluator
from evaluators.deployed import Evaluator
from evaluators.flops.evaluator import FlopsEvaluator
from evaluators.latency.evaluator import LatencyEvaluator
from evaluators.size import ParamsEvaluator, SizeEvaluator


def static_evaluators(flops: FlopsEvaluator) -> tuple[Evaluator, ...]:
    """Returns the evaluators that do not run a version, in the order in which they are called.

    Args:
        flops: of the study's network.
    """
    return (ParamsEvaluator(), SizeEvaluator(), flops)


def all_evaluators(flops: FlopsEvaluator, latency: LatencyEvaluator) -> tuple[Evaluator, ...]:
    """Returns all evaluators, cheapest first.

    Args:
        flops: of the study's network.
        latency: times a version against the search's references.
    """
    return (*static_evaluators(flops), latency, AccuracyEvaluator())
