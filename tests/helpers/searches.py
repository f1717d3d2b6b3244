"""What the tests of whole searches share."""

from pathlib import Path

from evaluators.measurement import METRICS, Measurement
from search.results.evaluation import Evaluation
from search.results.pareto import Version
from search.results.store import SearchFolder, StoredSearch
from spaces.candidate import Candidate

ROOT = Path(__file__).parent.parent.parent


def stored(folder: Path, name: str = "one") -> StoredSearch:
    return StoredSearch.read(SearchFolder(folder / name))


def finished(trials) -> list:
    return [trial for trial in trials if trial.state.is_finished()]


def measurement(metric: str, value: float, n: int = 100) -> Measurement:
    """Returns a measurement without a spread, in SI units."""
    return Measurement(metric, value, METRICS[metric].statistics[0], n, 0.0, "a target", "a protocol")


def version(number: int, accuracy: float, latency: float, flops: float) -> Version:
    """Returns a version of a network with one group of channels, in SI units."""
    values = {"accuracy": accuracy, "latency": latency, "flops": flops, "size": 1e3, "params": 250.0}
    measured = {metric: measurement(metric, value) for metric, value in values.items()}
    candidate = Candidate({"a": number + 2}, {"a": "fp32"})
    return Version(number, Evaluation(candidate, measured, "none", ""))
