"""Whether one search over channels and precisions beats pruning first and quantizing then, or quantizing alone.

    python -m studies.benchmarks.joint --data imagefolder:PATH --weights resnet20.pt [--shared elastic-15min.pt]

On the CIFAR-10 study, without exits, every way gets the same number of evaluations, the same sampler and the same
shared weights, and looks for the most accurate version that takes at most half of the dense network's time. Every
candidate is measured once, whoever asks for it, and kept in --out: the same command goes on where it was stopped.
With `--shared` the weights are those that the recovery benchmark trained; otherwise the study trains its own.
"""

import argparse
import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import optuna
import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution

from evaluators.accuracy import accuracy_of
from evaluators.runtimes.cpu import cpu_name
from search.config.overrides import Request
from search.config.study import ExitsSection
from search.loop.baseline import measure_baseline
from search.pipeline.pipeline import CompressionPipeline, build_pipeline
from search.results.store import Baseline
from search.samplers.distributions import distributions
from search.samplers.optuna_samplers import tpe
from spaces.candidate import Candidate
from spaces.channels import PREFIX as CHANNELS
from spaces.dimensions import Value
from spaces.precision import PREFIX as PRECISION
from studies.benchmarks.markdown import print_table

Values = Mapping[str, Value]
KEPT = (1.0, 0.75, 0.5, 0.25)
"""Shares of the channels with which every search over channels begins."""


@dataclass(frozen=True)
class Point:
    """What was measured of one candidate: validation accuracy, and latency as a share of the dense network's."""

    accuracy: float
    latency: float


class Measured:
    """Candidates of one study, each measured once.

    Args:
        pipeline: builds and measures them.
        file: where the baseline and all measurements are kept.
    """

    def __init__(self, pipeline: CompressionPipeline, file: Path) -> None:
        self.pipeline = pipeline
        self._file = file
        self._kept = json.loads(file.read_text()) if file.is_file() else {"baseline": None, "points": {}}
        if self._kept["baseline"] is None:
            self._kept["baseline"] = measure_baseline(pipeline).to_dict()
            self._write()
        self.baseline = Baseline.from_dict(self._kept["baseline"])
        self._dense = self.baseline.evaluation.measurements
        self._latency = pipeline.references.latency_evaluator(self.baseline.reference_seconds)

    def point(self, candidate: Candidate) -> Point:
        """Returns what a candidate measures, now or before."""
        points = self._kept["points"]
        if candidate.key not in points:
            found = self.pipeline.evaluate(candidate, self._latency).measurements
            latency = found["latency"].value / self._dense["latency"].value
            points[candidate.key] = [found["accuracy"].value, latency, candidate.to_dict()]
            self._write()
        return Point(*points[candidate.key][:2])

    def _write(self) -> None:
        self._file.write_text(json.dumps(self._kept))


@dataclass
class Search:
    """The most accurate of the candidates within the limit, found by TPE.

    Args:
        measured: what is known.
        limit: of the latency, as a share of the dense network's.
    """

    measured: Measured
    limit: float

    def run(
        self,
        free: Mapping[str, BaseDistribution],
        values_of: Callable[[Values], Values],
        guesses: Sequence[Values],
        evaluations: int,
        seed: int,
    ) -> list[tuple[Values, Point]]:
        """Returns all that was tried, in order.

        Args:
            free: what the sampler chooses.
            values_of: makes a value for each dimension of the joint space of that.
            guesses: tried first.
            evaluations: how many.
            seed: of the sampler.
        """
        study = optuna.create_study(directions=["maximize", "minimize"], sampler=tpe(seed))
        for guess in guesses:
            study.enqueue_trial(dict(guess), skip_if_exists=True)
        tried = []
        for _ in range(evaluations):
            trial = study.ask(dict(free))
            values = values_of(trial.params)
            point = self.measured.point(self.measured.pipeline.space.candidate(values))
            trial.set_constraint("latency", point.latency / self.limit - 1)
            study.tell(trial, [point.accuracy, point.latency])
            tried.append((values, point))
        return tried

    def best(self, tried: Sequence[tuple[Values, Point]]) -> tuple[Values, Point] | None:
        """Returns the most accurate of what was tried within the limit; None where nothing is."""
        feasible = [each for each in tried if each[1].latency <= self.limit]
        return max(feasible, key=lambda each: each[1].accuracy, default=None)


class Ways:
    """Three ways to spend the same number of evaluations on the same space."""

    def __init__(self, search: Search, evaluations: int) -> None:
        space = search.measured.pipeline.space
        self._search, self._evaluations = search, evaluations
        every = distributions(space)
        self._channels = {name: each for name, each in every.items() if name.startswith(CHANNELS)}
        self._precisions = {name: each for name, each in every.items() if name.startswith(PRECISION)}
        self._lowest = space.precision.precisions[-1]

    def _uniform(self, keep: float, precision: str) -> dict[str, Value]:
        return self._search.measured.pipeline.space.uniform(keep, precision)

    def _start(self, keep: float, precision: str, names: Mapping[str, BaseDistribution]) -> dict[str, Value]:
        return {name: value for name, value in self._uniform(keep, precision).items() if name in names}

    def jointly(self, seed: int) -> list[tuple[Values, Point]]:
        """Returns what one search over channels and precisions tries."""
        free = self._channels | self._precisions
        guesses = [self._start(keep, self._lowest, free) for keep in KEPT]
        rest = self._uniform(1.0, "fp32")
        return self._search.run(free, lambda chosen: rest | dict(chosen), guesses, self._evaluations, seed)

    def quantizing(self, seed: int) -> list[tuple[Values, Point]]:
        """Returns what a search over precisions alone tries."""
        rest = self._uniform(1.0, "fp32")
        guesses = [self._start(1.0, self._lowest, self._precisions)]
        return self._search.run(self._precisions, lambda chosen: rest | dict(chosen), guesses, self._evaluations, seed)

    def pruning_first(self, seed: int) -> list[tuple[Values, Point]]:
        """Returns what a search over channels in fp32, and then one over precisions of the best of those, tries.

        With the second half of the evaluations any network of the first half's front may be quantized: that is more
        than who prunes to one target and goes on from there can do.
        """
        rest = self._uniform(1.0, "fp32")
        half = self._evaluations // 2
        guesses = [self._start(keep, "fp32", self._channels) for keep in KEPT]
        pruned = self._search.run(self._channels, lambda chosen: rest | dict(chosen), guesses, half, seed)
        front = [each for each in pruned if not any(_beats(other[1], each[1]) for other in pruned)]
        free: dict[str, BaseDistribution] = {"pruned": CategoricalDistribution(tuple(range(len(front))))}
        lowest = self._start(1.0, self._lowest, self._precisions)
        starts = [{"pruned": index, **lowest} for index in range(len(front))]

        def values_of(chosen: Values) -> Values:
            precisions = {name: value for name, value in chosen.items() if name != "pruned"}
            return {**front[int(chosen["pruned"])][0], **precisions}

        rest_of_them = self._evaluations - half
        return pruned + self._search.run(free | self._precisions, values_of, starts, rest_of_them, seed)


def _beats(first: Point, second: Point) -> bool:
    at_least = first.accuracy >= second.accuracy and first.latency <= second.latency
    return at_least and first != second


def _row(ways: Ways, search: Search, way: str, seed: int) -> list[str]:
    run = {"joint": ways.jointly, "prune, then quantize": ways.pruning_first, "quantize": ways.quantizing}[way]
    found = search.best(run(seed))
    if found is None:
        return [way, str(seed), "none within the limit", "", "", ""]
    values, point = found
    pipeline = search.measured.pipeline
    candidate = pipeline.space.candidate(values)
    test = accuracy_of(pipeline.deployed(candidate).answers_to(pipeline.data.test), pipeline.target, "test").value
    kept = sum(candidate.channels.values()) / sum(pipeline.space.dense().channels.values())
    given = list(candidate.precision.values())
    cells = [f"{100 * point.accuracy:.2f}", f"{100 * test:.2f}", f"{point.latency:.3f}"]
    return [way, str(seed), *cells, f"{kept:.0%} of the channels, {given.count('int8')}/{len(given)} layers int8"]


def _pipeline(data: str, weights: str, shared: Path | None) -> CompressionPipeline:
    study = Request(study="cifar10", weights=weights, data=data).to_study()
    recovery = study.recovery.model_copy(update={"level": "bn"} if shared else {})
    study = study.model_copy(update={"exits": ExitsSection(after=()), "recovery": recovery})
    pipeline = build_pipeline(study, lambda *_: None, say=lambda text: print(text))
    if shared is not None:
        network = copy.deepcopy(pipeline.network)
        network.load_state_dict(torch.load(shared, weights_only=True))
        pipeline.compressor.recovery.source = network.eval()
    return pipeline


def main() -> None:
    """Measures the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CIFAR-10, as for the search's --data")
    parser.add_argument("--weights", required=True, help="a state dict of the study's ResNet-20")
    parser.add_argument("--shared", type=Path, help="a state dict of shared weights")
    parser.add_argument("--out", type=Path, default=Path("runs/joint.json"), help="where measurements are kept")
    parser.add_argument("--evaluations", type=int, default=60)
    parser.add_argument("--limit", type=float, default=0.5, help="of the latency, as a share of the dense network's")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    pipeline = _pipeline(given.data, given.weights, given.shared)
    search = Search(Measured(pipeline, given.out), given.limit)
    ways = Ways(search, given.evaluations)
    heads = ["way", "seed", "validation %", "test %", "latency of dense", "what it is"]
    rows = [
        _row(ways, search, way, s) for s in range(given.seeds) for way in ("joint", "prune, then quantize", "quantize")
    ]
    dense = search.measured.baseline.evaluation.measurements
    print(f"\nDense: {dense['accuracy'].value:.2%} of the validation images, {dense['latency'].value * 1e3:.3f} ms.\n")
    print_table(heads, rows)
    print(f"\n{given.evaluations} evaluations each, {pipeline.target}; torch {torch.__version__}, {cpu_name()}.")


if __name__ == "__main__":
    main()
