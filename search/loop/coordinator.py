"""The search itself: ask, evaluate, tell, until trials or time run out."""

import json
import logging
import time
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from evaluators.measurement import Measurement
from evaluators.streams import Stream
from search.config.budget import Budget
from search.config.registries import SAMPLERS
from search.loop.front_recovery import RECOVERABLE
from search.loop.interrupts import Interrupts
from search.loop.patience import Patience
from search.loop.resume import is_counted, put_right_running, resolved_choices, without_slow_precisions
from search.loop.sampler_observations import observe_evaluations
from search.loop.sampler_prior import problem_prior
from search.pipeline.early_stopping import AccuracyScreen, EarlyStopping, LimitsBroken, max_screened, saved_seconds
from search.pipeline.exit_thresholds import ExitThresholdSolver, ResolvedCandidate
from search.pipeline.pipeline import CompressionPipeline
from search.results.evaluation import Evaluation
from search.results.pareto import OBJECTIVES, Version
from search.results.store import REPORT, Baseline, versions_of
from search.samplers.base import InformedSampler
from search.samplers.distributions import distributions, first_guesses
from search.samplers.hypervolume.encoding import Codec
from spaces.candidate import Candidate
from spaces.dimensions import Value

REPEATED_FAILURES = 10
"""So many failures in a row, all for one reason, end a search."""
REPEATED_DUPLICATES = 100
"""So many known candidates in a row mean that the sampler has nothing new to propose."""

logger = logging.getLogger(__name__)


class Observer(Protocol):
    """Is told about every trial, after it is stored."""

    def trial_done(self, trial: FrozenTrial, seconds: float) -> None:
        """Takes note of a finished trial and how long it took."""
        ...


@dataclass
class Outcome:
    """How a search ended.

    Args:
        reason: for people.
        code: the exit code that goes with it.
        overhead_s: seconds that asking and telling took, by step.
        remarks: what the sampler says of itself.
    """

    reason: str
    code: int
    overhead_s: dict[str, float] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


class Coordinator:
    """Runs the trials of one search and writes each to its journal.

    Args:
        pipeline: builds and measures candidates.
        stored: Optuna's study; the truth.
        baseline: the dense network.
        sampler_name: proposes candidates.
        seed: of the sampler; a search that goes on draws anew, by the seed and the number of its trials.
        observers: told about every finished trial.
        seeds: versions to try after those that treat every layer alike, and before a sampler's own.
    """

    def __init__(
        self,
        pipeline: CompressionPipeline,
        journal: optuna.Study,
        baseline: Baseline,
        sampler_name: str,
        seed: int,
        observers: list[Observer],
        seeds: Sequence[Mapping[str, Value]] = (),
    ) -> None:
        self._pipeline = pipeline
        self._seeds: Sequence[Mapping[str, Value]] = seeds
        self._stored = journal
        self._dense = baseline.evaluation.measurements
        self._budget: Budget = pipeline.study.budget
        self._observers = observers
        self._latency = pipeline.references.latency_evaluator(baseline.reference_seconds)
        self._thresholds = ExitThresholdSolver(pipeline, self._latency, self._dense)
        # From the journal, so that a search that goes on has the space that it began with.
        self._space = without_slow_precisions(pipeline.space, baseline.examined)
        self._distributions = distributions(self._space)
        self._known: dict[str, Version] = {
            version.evaluation.candidate.key: version for version in versions_of(journal.get_trials(deepcopy=False))
        }
        self._simple = {each.evaluation.candidate.key: each.evaluation for each in baseline.simple if each.is_own}
        lines = baseline.versions_to_beat
        screen = accuracy_screen(pipeline, self._dense, ChainMap(self._known, {line.title: line for line in lines}))
        self._stopping: list[EarlyStopping] = [LimitsBroken(self._budget, self._dense), *([screen] if screen else [])]
        self._resolved = resolved_choices(journal.get_trials(deepcopy=False), self._known.values())
        self._codec = Codec(self._distributions)
        drawn = seed + len(journal.get_trials(deepcopy=False))
        prior = partial(problem_prior, pipeline, self._space, baseline)
        journal.sampler = SAMPLERS[sampler_name](drawn, prior, observe_evaluations)
        if isinstance(journal.sampler, InformedSampler):
            self._seeds = [*seeds, *journal.sampler.initial_proposals(self._distributions)]
        self._stall = Patience(self._budget, self._dense, lines)
        self._tried: set[str] = set()
        self._overhead = {"ask": 0.0, "tell": 0.0}
        self._interrupts = Interrupts()

    def run(self, trials: int, timeout_s: float | None, patience: int | None = None) -> Outcome:
        """Searches until `trials` are finished, earlier runs of this search included, or the time is up.

        Args:
            trials: at most, in all.
            timeout_s: at most, of this run.
            patience: so many trials in a row that win nothing end it too.

        Returns:
            Why it ended. An interrupt ends it too: the trial in flight is done again when the search goes on.
        """
        outcome = self._run(trials, timeout_s, patience)
        outcome.remarks = [*self._told_sampler(), *self._told_ended()]
        return outcome

    def _run(self, trials: int, timeout_s: float | None, patience: int | None) -> Outcome:
        put_right_running(self._stored)
        for trial in self._stored.get_trials(deepcopy=False):
            if is_counted(trial):
                self._count(trial)
        for guess in [*first_guesses(self._space), *self._seeds]:
            self._stored.enqueue_trial(dict(guess), skip_if_exists=True)
        begin = time.monotonic()
        with Interrupts() as self._interrupts:
            try:
                while self._finished() < trials:
                    if timeout_s is not None and time.monotonic() - begin >= timeout_s:
                        return Outcome(f"the {timeout_s:g} s are up", 0, self._overhead)
                    if patience is not None and self._stall.trials >= patience:
                        reason = f"the last {self._stall.trials} trials won nothing"
                        return Outcome(reason, 0, self._overhead)
                    self._one_trial()
                    stop = self._hopeless() or self._exhausted()
                    if stop:
                        return stop
            except KeyboardInterrupt:
                put_right_running(self._stored)
                return Outcome("interrupted", 130, self._overhead)
        return Outcome(f"all {trials} trials are done", 0, self._overhead)

    def _told_sampler(self) -> list[str]:
        """Returns what our sampler says of itself, and keeps it; where it proposed nothing, what is kept stays."""
        made = self._stored.sampler
        if not isinstance(made, InformedSampler) or not made.has_proposed:
            return []
        trials = self._stored.get_trials(deepcopy=False)
        self._stored.set_user_attr(REPORT, made.report(trials))
        return made.remarks(trials, OBJECTIVES)

    def _told_ended(self) -> list[str]:
        ended = [version for version in self._known.values() if version.evaluation.ended]
        if not ended:
            return []
        told = "1 version was" if len(ended) == 1 else f"{len(ended)} versions were"
        saved = saved_seconds(ended, self._dense["accuracy"].n)
        return [f"{told} ended early, after some of the images; the others would have taken {saved:.1f} s"]

    def _finished(self) -> int:
        return sum(is_counted(trial) for trial in self._stored.get_trials(deepcopy=False))

    def _one_trial(self) -> None:
        begin = time.monotonic()
        trial = self._stored.ask(self._distributions)
        self._overhead["ask"] += time.monotonic() - begin
        try:
            choices = self._space.candidate(trial.params)
            with self._interrupts.allowed():
                resolved = self._resolve(choices)
                known = self._known.get(resolved.candidate.key)
                evaluation = known.evaluation if known else self._evaluate(resolved)
        except Exception as error:
            logger.debug("trial %d failed", trial.number, exc_info=True)
            trial.set_user_attr("reason", f"{type(error).__name__}: {error}".strip()[:2000])
            self._stored.tell(trial, state=TrialState.FAIL)
        else:
            telling = time.monotonic()
            if choices.is_unresolved:
                trial.set_user_attr("choices", choices.key)
                self._resolved[choices.key] = evaluation.candidate
            self._tell(trial, evaluation, self._known.get(evaluation.candidate.key))
            self._overhead["tell"] += time.monotonic() - telling
        finished = self._stored.get_trials(deepcopy=False)[trial.number]
        self._count(finished)
        for observer in self._observers:
            observer.trial_done(finished, time.monotonic() - begin)

    def _resolve(self, choices: Candidate) -> ResolvedCandidate:
        known = self._resolved.get(choices.key)
        return ResolvedCandidate(known) if known else self._thresholds.resolve(choices)

    def _evaluate(self, resolved: ResolvedCandidate) -> Evaluation:
        """Returns what is measured of a version; what is known of it where solving it again came to an earlier one."""
        simple = self._simple.get(resolved.candidate.key)  # measured before the first trial, and in full
        if simple:
            return simple
        evaluation = self._thresholds.evaluate(resolved, self._stopping)
        known = self._known.get(evaluation.candidate.key)
        return known.evaluation if known else evaluation

    def _tell(self, trial: Trial, evaluation: Evaluation, known: Version | None) -> None:
        for name, violation in self._told_violations(evaluation).items():
            trial.set_constraint(name, violation)
        if known is None:
            trial.set_user_attr("evaluation", evaluation.to_dict())
            self._known[evaluation.candidate.key] = Version(trial.number, evaluation)
        else:
            trial.set_user_attr("duplicate_of", known.number)
        if Version(trial.number, evaluation).is_complete:
            self._stored.tell(trial, [evaluation.measurements[metric].value for metric in OBJECTIVES])
        else:
            # A limit that is broken by far left the rest unmeasured; the constraints tell the sampler how badly.
            self._stored.tell(trial, state=TrialState.PRUNED)

    def _told_violations(self, evaluation: Evaluation) -> dict[str, float]:
        """Returns what a sampler is told of the limits: of an accuracy that is an estimate, only that it breaks one."""
        violations = self._budget.violations(evaluation.measurements, self._dense)
        if evaluation.ended:
            limits = {str(limit) for limit in self._budget.constraints if limit.measured_as == "accuracy"}
            violations = {name: value for name, value in violations.items() if value > 0 or name not in limits}
        return violations

    def _count(self, trial: FrozenTrial) -> None:
        """Takes note of a finished trial for those who ask whether anything is still won."""
        told = trial.user_attrs.get("evaluation")
        self._stall.count(Version(trial.number, Evaluation.from_dict(told)) if told else None)
        self._tried.add(json.dumps(trial.params, sort_keys=True))

    def _exhausted(self) -> Outcome | None:
        if len(self._tried) < self._codec.size:
            return None
        count = len(self._tried)
        told = f"all {count} versions that the space offers were" if count > 1 else "the one version of the space was"
        return Outcome(f"{told} tried", 0, self._overhead)

    def _hopeless(self) -> Outcome | None:
        trials = [trial for trial in self._stored.get_trials(deepcopy=False) if is_counted(trial)]
        # A candidate that is known was not tried again, so it says nothing about what fails.
        last = [trial for trial in trials if "duplicate_of" not in trial.user_attrs][-REPEATED_FAILURES:]
        reasons = {trial.user_attrs.get("reason") for trial in last}
        if len(last) == REPEATED_FAILURES and len(reasons) == 1 and last[0].state == TrialState.FAIL:
            return Outcome(f"{REPEATED_FAILURES} trials in a row failed alike: {reasons.pop()}", 1, self._overhead)
        latest = trials[-REPEATED_DUPLICATES:]
        if len(latest) == REPEATED_DUPLICATES and all("duplicate_of" in trial.user_attrs for trial in latest):
            reason = f"the last {REPEATED_DUPLICATES} proposals were known already"
            return Outcome(reason, 0, self._overhead)
        return None


def accuracy_screen(
    pipeline: CompressionPipeline, dense: Mapping[str, Measurement], known: Mapping[str, Version]
) -> AccuracyScreen | None:
    """Returns what ends hopeless versions early; None where the study wants none, or there are too few images.

    Frames of a stream are alike, so the first ones do not stand for the others: a stream is asked in one go.
    """
    count = max_screened(len(pipeline.scored), pipeline.target.batch)
    if not count or not pipeline.study.search.early_stopping or isinstance(pipeline.scored, Stream):
        return None
    recoverable = RECOVERABLE if pipeline.study.recovery.final else 0.0
    dense_correct = pipeline.deployed(pipeline.space.dense()).first_answers(count).correct
    budget, batch = pipeline.study.budget, pipeline.target.batch
    return AccuracyScreen(budget, dense, dense_correct, known, len(pipeline.scored), batch, recoverable)
