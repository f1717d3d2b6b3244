"""What samplers are compared on: the synthetic network, and studies whose evaluations are recorded as they are made."""

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from optuna.distributions import BaseDistribution

from evaluators.measurement import Measurement
from search.config.objectives import Objectives
from search.config.registries import SAMPLERS
from search.config.study import Study
from search.loop.baseline import measure_baseline
from search.loop.resume import without_slow_precisions
from search.loop.sampler_prior import problem_prior
from search.pipeline.early_stopping import LimitsBroken
from search.pipeline.exit_thresholds import ExitThresholdSolver
from search.pipeline.pipeline import build_pipeline
from search.results.evaluation import Evaluation
from search.results.pareto import box_share, reference_point
from search.results.store import Baseline
from search.samplers.distributions import distributions, first_guesses
from search.samplers.hypervolume.encoding import Array
from search.samplers.hypervolume.knapsack import SHARES, knapsacks
from search.samplers.hypervolume.nsga2 import evolve
from search.samplers.hypervolume.prior import ProblemPrior
from search.samplers.hypervolume.sampler import HypervolumeSampler
from spaces import cache
from studies.benchmarks.synthetic import DENSE_S, Problem, Setting

MEASURED: Objectives = ("accuracy", "latency", "flops")
"""What is kept of every evaluation; accuracy is None where a limit was broken before."""
_WRITTEN_EVERY = 20
"""So many evaluations at most are lost where a comparison is stopped; begun again, it finds the others recorded."""

Values = tuple[float | None, ...]
"""Of each objective; no accuracy where a limit was broken before."""


@dataclass(frozen=True)
class Outcome:
    """What one evaluation came to.

    Args:
        key: of what was evaluated.
        values: as the sampler learns them.
        violations: of each limit that was measured.
        evaluation: what a search would keep of it for the sampler; nothing where there is nothing more to know.
    """

    key: str
    values: Values
    violations: Mapping[str, float]
    evaluation: Mapping[str, Any] = field(default_factory=dict)


class Case(Protocol):
    """One question for samplers, with one seed."""

    @property
    def objectives(self) -> Objectives:
        """What is searched for, in the order of `Outcome.values`."""
        ...

    @property
    def space(self) -> Mapping[str, BaseDistribution]:
        """What may vary, as Optuna sees it."""
        ...

    @property
    def prior(self) -> ProblemPrior:
        """What a sampler may know of it."""
        ...

    @property
    def warm(self) -> Sequence[Mapping[str, Any]]:
        """What warm arms begin with."""
        ...

    def evaluate(self, parameters: Mapping[str, Any]) -> Outcome:
        """Returns what the parameters come to."""
        ...

    def hypervolume(self, keys: Sequence[str]) -> float:
        """Returns the hypervolume of what was evaluated, as a share of the best known or of the budget's box."""
        ...


class SyntheticCase:
    """The synthetic network of one seed; hypervolume is that of true figures, as a share of a long search's on them.

    Args:
        seed: of the network and of the noise.
        setting: of the network.
    """

    objectives = MEASURED

    def __init__(self, seed: int, setting: Setting) -> None:
        self._problem = Problem(seed, setting)
        self._rng = np.random.default_rng(seed)
        self._rows: dict[str, Array] = {}
        self.space = self._problem.codec.space
        self.prior = self._problem.prior()
        times = [share * setting.limit_s / DENSE_S for share in SHARES]
        self.warm = [*self._problem.uniform(), *knapsacks(self.prior.structure, self._problem.codec, times)]
        self._best = 1.0
        self._best = self._share(self._long_search())

    def _long_search(self) -> Array:
        problem, setting = self._problem, self._problem.setting

        def judge(rows: Array) -> tuple[Array, Array]:
            accuracy, seconds, flops = problem.true(rows).T
            broken = np.maximum(0, (setting.floor - accuracy) / 0.1) + np.maximum(0, seconds / setting.limit_s - 1)
            return np.stack([-accuracy, seconds, flops], axis=1), broken

        rng = np.random.default_rng(0)
        start = np.vstack([problem.codec.encode(self.warm), problem.codec.random(200, rng)])
        return evolve(start, judge, problem.codec, rng, 200, 400)[0]

    def _share(self, rows: Array) -> float:
        accuracy, seconds, flops = self._problem.true(rows).T
        setting = self._problem.setting
        costs = [(1 - accuracy) / (1 - setting.floor), seconds / setting.limit_s, flops]
        return box_share(np.stack(costs, axis=1)) / self._best

    def evaluate(self, parameters: Mapping[str, Any]) -> Outcome:
        """Returns what the parameters come to, with noise."""
        key = json.dumps(parameters, sort_keys=True)
        self._rows[key] = self._problem.codec.encode([parameters])[0]
        values = self._problem.measure(parameters, self._rng)
        return Outcome(key, values, self._problem.violations(values[0], values[1]))

    def hypervolume(self, keys: Sequence[str]) -> float:
        """Returns the share of the long search's hypervolume."""
        return self._share(np.stack([self._rows[key] for key in keys]))


class Record:
    """Every evaluation of a study, by the key of its choices, in one compressed file.

    Args:
        file: JSON, gzipped; new where there is none.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        content = json.loads(gzip.decompress(file.read_bytes())) if file.is_file() else {}
        self.baseline: dict[str, Any] | None = content.get("baseline")
        self.evaluations: dict[str, list[Any]] = content.get("evaluations", {})
        self.runs: dict[str, dict[str, Any]] = {}
        for arm, runs in content.get("runs", {}).items():  # an arm may have had its sampler's earlier name
            name = SAMPLERS.renamed(arm)
            self.runs[name] = runs | self.runs.get(name, {})

    def write(self) -> None:
        """Writes the file anew; the same content gives the same bytes."""
        content = {"baseline": self.baseline, "evaluations": self.evaluations, "runs": self.runs}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        cache.write_atomically(self._file, gzip.compress(text.encode(), mtime=0))


class StudyCase:
    """A study with real evaluations, none of which is made twice.

    Args:
        study: the question.
        record: of its evaluations.
    """

    def __init__(self, study: Study, record: Record) -> None:
        self.objectives = study.objectives
        self._pipeline = build_pipeline(study, lambda step, done, total: print(f"{step}: {done}/{total}", flush=True))
        self._record = record
        if record.baseline is None:
            record.baseline = measure_baseline(self._pipeline).to_dict()
            record.write()
        self._baseline = Baseline.from_dict(record.baseline)
        self._budget, self._dense = self._pipeline.study.budget, self._baseline.evaluation.measurements
        self._latency = self._pipeline.references.latency_evaluator(self._baseline.reference_seconds)
        self._solver = ExitThresholdSolver(self._pipeline, self._latency, self._dense)
        self._joint = without_slow_precisions(self._pipeline.space, self._baseline.slow_layers)
        self.space = distributions(self._joint)
        self.prior = problem_prior(self._pipeline, self._joint, self._baseline)
        self.warm = [*first_guesses(self._joint), *HypervolumeSampler(0, self.prior).initial_proposals(self.space)]
        self._worst = reference_point(self._budget, self._dense, self.objectives)

    def evaluate(self, parameters: Mapping[str, Any]) -> Outcome:
        """Returns what the parameters come to, from the record where they were evaluated before."""
        choices = self._joint.candidate(parameters)
        if choices.key not in self._record.evaluations:
            stopping = [LimitsBroken(self._budget, self._dense)]
            evaluation = self._solver.evaluate(self._solver.resolve(choices), stopping)
            self._record.evaluations[choices.key] = _recorded(evaluation)
            if len(self._record.evaluations) % _WRITTEN_EVERY == 0:
                self._record.write()
        *values, gates = self._record.evaluations[choices.key]
        measured = dict(zip(MEASURED, values, strict=True))
        violations = self._budget.violations(self._measurements(measured), self._dense)
        wanted = tuple(measured[name] for name in self.objectives)
        return Outcome(choices.key, wanted, violations, _kept(measured, gates))

    def _measurements(self, measured: Mapping[str, float | None]) -> dict[str, Measurement]:
        known = {name: value for name, value in measured.items() if value is not None}
        return {name: replace(self._dense[name], value=value) for name, value in known.items()}

    def hypervolume(self, keys: Sequence[str]) -> float:
        """Returns the share of the budget's box that is dominated, as a search shows it."""
        evaluations = [dict(zip(MEASURED, self._record.evaluations[key], strict=False)) for key in dict.fromkeys(keys)]
        complete = [values for values in evaluations if values["accuracy"] is not None]
        costs = [[self._cost(name, values[name]) for name in self.objectives] for values in complete]
        return box_share(np.array(costs, dtype=np.float64).reshape(-1, len(self.objectives)))

    def _cost(self, name: str, value: float) -> float:
        """Returns a value as a share of the worst that counts, of accuracy what is missing to 1."""
        worst = self._worst[name]
        return (1 - value) / (1 - worst) if name == "accuracy" else value / worst


def _kept(measured: Mapping[str, float | None], gates: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns what the sampler reads in a trial's evaluation: costs, and how thresholds that were solved came about."""
    costs = {name: {"value": value} for name, value in measured.items() if name != "accuracy"}
    return {"measurements": costs, "gates": gates}


def _recorded(evaluation: Evaluation) -> list[Any]:
    """Returns accuracy, None if not measured, seconds and FLOPs, and where and at what cost inputs leave."""
    measured = evaluation.measurements
    values = [_short(measured[name].value) if name in measured else None for name in MEASURED]
    if not (gates := evaluation.exit_thresholds):
        return [*values, None]
    ways = {metric: [_short(cost) for cost in costs] for metric, costs in gates["ways"].items()}
    return [*values, {"shares": [_short(share) for share in gates["shares"]], "ways": ways}]


def _short(value: float) -> float:
    return float(f"{value:.6g}")
