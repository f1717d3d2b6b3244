"""Evaluates the candidates that a sampler proposes, each distinct one once."""

from collections import ChainMap
from collections.abc import Mapping, Sequence

from optuna.trial import FrozenTrial

from evaluators.measurement import Measurement
from evaluators.streams import Stream
from search.loop.front_recovery import RECOVERABLE
from search.loop.resume import resolved_choices
from search.pipeline.early_stopping import AccuracyScreen, EarlyStopping, LimitsBroken, max_screened
from search.pipeline.exit_thresholds import ExitThresholdSolver, ResolvedCandidate
from search.pipeline.pipeline import CompressionPipeline
from search.results.evaluation import Evaluation
from search.results.pareto import Version
from search.results.store import Baseline, versions_of
from spaces.candidate import Candidate


class CandidateEvaluator:
    """Solves thresholds and measures candidates, with early stopping, and remembers the results.

    Args:
        pipeline: builds and measures candidates.
        baseline: the dense network and the other simple versions.
        trials: of earlier runs of the search.
    """

    def __init__(self, pipeline: CompressionPipeline, baseline: Baseline, trials: Sequence[FrozenTrial]) -> None:
        dense = baseline.evaluation.measurements
        latency = pipeline.references.latency_evaluator(baseline.reference_seconds)
        self._solver = ExitThresholdSolver(pipeline, latency, dense)
        self.versions: dict[str, Version] = {
            version.evaluation.candidate.key: version for version in versions_of(trials)
        }
        """All versions measured so far, by the key of their candidate."""
        self._resolved = resolved_choices(trials, self.versions.values())
        self._simple = {
            simple.evaluation.candidate.key: simple.evaluation for simple in baseline.simple if simple.is_own
        }
        baselines = {version.title: version for version in baseline.versions_to_beat}
        screen = accuracy_screen(pipeline, dense, ChainMap(self.versions, baselines))
        limits = LimitsBroken(pipeline.study.budget, dense)
        self._stopping: list[EarlyStopping] = [limits, screen] if screen else [limits]

    def evaluate(self, choices: Candidate) -> Evaluation:
        """Returns the evaluation of a candidate with its thresholds resolved, from memory if it was measured before."""
        resolved_before = self._resolved.get(choices.key)
        resolved = ResolvedCandidate(resolved_before) if resolved_before else self._solver.resolve(choices)
        version = self.versions.get(resolved.candidate.key)
        return version.evaluation if version else self._measure(resolved)

    def _measure(self, resolved: ResolvedCandidate) -> Evaluation:
        simple = self._simple.get(resolved.candidate.key)  # measured in full before the first trial
        if simple:
            return simple
        evaluation = self._solver.evaluate(resolved, self._stopping)
        # Solving the thresholds again may have led to a version that was measured before.
        version = self.versions.get(evaluation.candidate.key)
        return version.evaluation if version else evaluation

    def record(self, choices: Candidate, version: Version) -> Version | None:
        """Remembers a new version; returns the earlier one of the same candidate, or None.

        Args:
            choices: what the sampler proposed.
            version: its evaluation, under the number of the trial.
        """
        if choices.is_unsolved:
            self._resolved[choices.key] = version.evaluation.candidate
        key = version.evaluation.candidate.key
        earlier = self.versions.get(key)
        self.versions.setdefault(key, version)
        return earlier


def accuracy_screen(
    pipeline: CompressionPipeline, dense: Mapping[str, Measurement], versions: Mapping[str, Version]
) -> AccuracyScreen | None:
    """Returns the rule that stops evaluations by accuracy; None if the study forbids it or there are too few images.

    It does not apply to streams: their first frames resemble each other and do not represent the others.
    """
    count = max_screened(len(pipeline.scored), pipeline.target.batch)
    if not count or not pipeline.study.search.early_stopping or isinstance(pipeline.scored, Stream):
        return None
    recoverable = RECOVERABLE if pipeline.study.recovery.final.versions else 0.0
    dense_correct = pipeline.deployed(pipeline.space.dense()).first_answers(count).correct
    return AccuracyScreen(
        pipeline.study.budget,
        dense,
        dense_correct,
        versions,
        len(pipeline.scored),
        pipeline.target.batch,
        pipeline.study.objectives,
        recoverable,
    )
