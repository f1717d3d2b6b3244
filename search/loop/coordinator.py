"""The search loop: ask the sampler, evaluate, tell the journal, until trials or time run out."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from search.config.budget import Budget
from search.config.registries import SAMPLERS
from search.loading.user_code import UserCodeError
from search.loop.candidate_evaluator import CandidateEvaluator
from search.loop.interrupts import Interrupts
from search.loop.patience import Patience
from search.loop.resume import TAKEN, is_counted, requeue_running, without_slow_precisions
from search.loop.sampler_observations import observe_evaluations
from search.loop.sampler_prior import problem_prior
from search.pipeline.early_stopping import saved_seconds
from search.pipeline.pipeline import CompressionPipeline
from search.results.evaluation import Evaluation
from search.results.kept_answers import ANSWERS
from search.results.pareto import Version
from search.results.store import PROCESSOR_SECONDS, REMARKS, REPORT, Baseline, objectives_of, versions_of
from search.samplers.base import InformedSampler, SearchKnowledge
from search.samplers.distributions import distributions, first_guesses
from search.samplers.hypervolume.encoding import Codec
from spaces.dimensions import Value
from spaces.joint import JointSpace

REPEATED_FAILURES = 10
"""Number of failures in a row, all for the same reason, that end a search."""
REPEATED_DUPLICATES = 100
"""Number of known candidates in a row after which a sampler has nothing new to propose."""

logger = logging.getLogger(__name__)


class Observer(Protocol):
    """Is notified of every trial, after it is stored."""

    def trial_done(self, trial: FrozenTrial, seconds: float) -> None:
        """Handles a finished trial, and the seconds that it took."""
        ...


@dataclass
class Outcome:
    """How a search ended.

    Args:
        reason: for people.
        code: exit code of the program.
        overhead_s: seconds spent on asking and telling, by step.
        remarks: on early stopping.
    """

    reason: str
    code: int
    overhead_s: dict[str, float] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


class Coordinator:
    """Runs the trials of one search and writes each to its journal. `build_coordinator` makes one.

    Args:
        journal: Optuna's study, with its sampler; the single source of truth.
        space: that candidates are proposed from.
        evaluator: measures candidates.
        baseline: the dense network and the other simple versions.
        budget: the limits.
        initial_proposals: tried after the uniform versions, and before the sampler's own proposals.
        observers: notified of every finished trial.
    """

    def __init__(
        self,
        journal: optuna.Study,
        space: JointSpace,
        evaluator: CandidateEvaluator,
        baseline: Baseline,
        budget: Budget,
        initial_proposals: Sequence[Mapping[str, Value]],
        observers: Sequence[Observer],
    ) -> None:
        self.initial_proposals = [*first_guesses(space), *initial_proposals]
        """Tried before the sampler proposes anything: the uniform versions first."""
        self._journal = journal
        self._objectives = objectives_of(journal)
        self._space = space
        self._distributions = distributions(space)
        self._space_size = Codec(self._distributions).size
        self._evaluator = evaluator
        self._dense = baseline.evaluation.measurements
        self._budget = budget
        self._observers = observers
        taken = versions_of([trial for trial in journal.get_trials(deepcopy=False) if TAKEN in trial.user_attrs])
        known = [*baseline.versions_to_beat, *taken]
        self._patience = Patience(budget, self._dense, self._objectives, known)
        self._tried: set[str] = set()
        self._overhead = {"ask": 0.0, "tell": 0.0}
        self._interrupts = Interrupts()

    def run(self, trials: int, timeout_s: float | None, patience: int | None = None) -> Outcome:
        """Runs trials until `trials` are finished, those of earlier runs included, or the time is up.

        Args:
            trials: maximum in all.
            timeout_s: maximum seconds of this run.
            patience: number of trials in a row without improvement that ends the search.

        Returns:
            Why it ended. After an interrupt the running trial is repeated when the search is resumed.
        """
        outcome = self._run(trials, timeout_s, patience)
        self._store_sampler_report()
        outcome.remarks = self._early_stopping_remarks()
        return outcome

    def _run(self, trials: int, timeout_s: float | None, patience: int | None) -> Outcome:
        requeue_running(self._journal)
        for trial in self._journal.get_trials(deepcopy=False):
            if is_counted(trial):
                self._count(trial)
        for proposal in self.initial_proposals:
            self._journal.enqueue_trial(dict(proposal), skip_if_exists=True)
        begin = time.monotonic()
        with Interrupts() as self._interrupts:
            try:
                while self._finished() < trials:
                    if timeout_s is not None and time.monotonic() - begin >= timeout_s:
                        return Outcome(f"the {timeout_s:g} s are up", 0, self._overhead)
                    if patience is not None and self._patience.trials >= patience:
                        reason = f"the last {self._patience.trials} trials won nothing"
                        return Outcome(reason, 0, self._overhead)
                    self._one_trial()
                    outcome = self._keeps_failing() or self._exhausted()
                    if outcome:
                        return outcome
            except KeyboardInterrupt:
                requeue_running(self._journal)
                return Outcome("interrupted", 130, self._overhead)
        return Outcome(f"all {trials} trials are done", 0, self._overhead)

    def _store_sampler_report(self) -> None:
        """Stores the sampler's report, in numbers and in words, unless it proposed nothing in this run."""
        sampler = self._journal.sampler
        if isinstance(sampler, InformedSampler) and sampler.has_proposed:
            trials = self._journal.get_trials(deepcopy=False)
            remarks = sampler.remarks(trials, self._objectives)
            self._journal.set_user_attr(REPORT, {**sampler.report(trials), REMARKS: remarks})

    def _early_stopping_remarks(self) -> list[str]:
        ended = [version for version in self._evaluator.versions.values() if version.evaluation.ended]
        if not ended:
            return []
        subject = "1 version was" if len(ended) == 1 else f"{len(ended)} versions were"
        saved = saved_seconds(ended, self._dense["accuracy"].n)
        return [f"{subject} ended early, after some of the images; the others would have taken {saved:.1f} s"]

    def _finished(self) -> int:
        return sum(is_counted(trial) for trial in self._journal.get_trials(deepcopy=False))

    def _ask(self) -> Trial:
        """Returns the next trial.

        Raises:
            UserCodeError: the sampler cannot propose for this search, for example one for a single objective.
        """
        try:
            return self._journal.ask(self._distributions)
        except ValueError as error:
            name = type(self._journal.sampler).__name__
            raise UserCodeError(
                f"a sampler proposes for {len(self._objectives)} objectives at once, got {name}, which says: {error};"
                " give another --sampler to go on"
            ) from error

    def _one_trial(self) -> None:
        begin, begin_work = time.monotonic(), time.process_time()
        trial = self._ask()
        self._overhead["ask"] += time.monotonic() - begin
        try:
            choices = self._space.candidate(trial.params)
            with self._interrupts.allowed():
                evaluation = self._evaluator.evaluate(choices)
        except Exception as error:
            logger.debug("trial %d failed", trial.number, exc_info=True)
            trial.set_user_attr("reason", f"{type(error).__name__}: {error}".strip()[:2000])
            self._journal.tell(trial, state=TrialState.FAIL)
        else:
            begin_tell = time.monotonic()
            if choices.is_unsolved:
                trial.set_user_attr("choices", choices.key)
            trial.set_user_attr(PROCESSOR_SECONDS, time.process_time() - begin_work)
            version = Version(trial.number, evaluation)
            self._tell(trial, version, self._evaluator.record(choices, version))
            self._overhead["tell"] += time.monotonic() - begin_tell
        finished = self._journal.get_trials(deepcopy=False)[trial.number]
        self._count(finished)
        for observer in self._observers:
            observer.trial_done(finished, time.monotonic() - begin)

    def _tell(self, trial: Trial, version: Version, earlier: Version | None) -> None:
        """Writes a trial to the journal; `earlier` is the version of the same candidate that was measured before."""
        for name, violation in self._violations(version.evaluation).items():
            trial.set_constraint(name, violation)
        if earlier is None:
            trial.set_user_attr("evaluation", version.evaluation.to_dict())
            if version.evaluation.answers:
                trial.set_user_attr(ANSWERS, version.evaluation.answers)
        else:
            trial.set_user_attr("duplicate_of", earlier.number)
        if version.is_complete:
            self._journal.tell(trial, version.values(self._objectives))
        else:
            # Not everything was measured; the constraints tell the sampler how far limits were exceeded.
            self._journal.tell(trial, state=TrialState.PRUNED)

    def _violations(self, evaluation: Evaluation) -> dict[str, float]:
        """Returns the violations for the sampler; an estimated accuracy is left out where it keeps its limit."""
        violations = self._budget.violations(evaluation.measurements, self._dense)
        if evaluation.ended:
            limits = {str(limit) for limit in self._budget.on("accuracy")}
            violations = {name: value for name, value in violations.items() if value > 0 or name not in limits}
        return violations

    def _count(self, trial: FrozenTrial) -> None:
        """Counts a finished trial for the patience and for the size of the space."""
        content = trial.user_attrs.get("evaluation")
        self._patience.count(Version(trial.number, Evaluation.from_dict(content)) if content else None)
        self._tried.add(json.dumps(trial.params, sort_keys=True))

    def _exhausted(self) -> Outcome | None:
        if len(self._tried) < self._space_size:
            return None
        count = len(self._tried)
        subject = (
            f"all {count} versions that the space offers were" if count > 1 else "the one version of the space was"
        )
        return Outcome(f"{subject} tried", 0, self._overhead)

    def _keeps_failing(self) -> Outcome | None:
        trials = [trial for trial in self._journal.get_trials(deepcopy=False) if is_counted(trial)]
        # Known candidates were not evaluated again, so they do not count between failures.
        last = [trial for trial in trials if "duplicate_of" not in trial.user_attrs][-REPEATED_FAILURES:]
        reasons = {trial.user_attrs.get("reason") for trial in last}
        if len(last) == REPEATED_FAILURES and len(reasons) == 1 and last[0].state == TrialState.FAIL:
            return Outcome(f"{REPEATED_FAILURES} trials in a row failed alike: {reasons.pop()}", 1, self._overhead)
        latest = trials[-REPEATED_DUPLICATES:]
        if len(latest) == REPEATED_DUPLICATES and all("duplicate_of" in trial.user_attrs for trial in latest):
            reason = f"the last {REPEATED_DUPLICATES} proposals were known already"
            return Outcome(reason, 0, self._overhead)
        return None


def build_coordinator(
    pipeline: CompressionPipeline,
    journal: optuna.Study,
    baseline: Baseline,
    sampler_name: str,
    seed: int,
    observers: Sequence[Observer],
    seeds: Sequence[Mapping[str, Value]] = (),
) -> Coordinator:
    """Returns the coordinator of a search, new or resumed, and gives the journal its sampler.

    Args:
        pipeline: builds and measures candidates.
        journal: Optuna's study, with the trials of earlier runs.
        baseline: the dense network and the other simple versions.
        sampler_name: one of `SAMPLERS`.
        seed: of the sampler; a resumed search adds its number of trials, so that it does not repeat proposals.
        observers: notified of every finished trial.
        seeds: versions to try after the uniform ones, and before the sampler's own.
    """
    trials = journal.get_trials(deepcopy=False)
    # As the journal's baseline says, so that a resumed search has the space that it began with.
    space = without_slow_precisions(pipeline.space, baseline.slow_layers)
    evaluator = CandidateEvaluator(pipeline, baseline, trials)
    prior = partial(problem_prior, pipeline, space, baseline)
    knowledge = SearchKnowledge(prior, partial(observe_evaluations, objectives=objectives_of(journal)))
    sampler = SAMPLERS[sampler_name](seed + len(trials), knowledge)
    journal.sampler = sampler
    proposals = list(seeds)
    if isinstance(sampler, InformedSampler):
        proposals += sampler.initial_proposals(distributions(space))
    return Coordinator(journal, space, evaluator, baseline, pipeline.study.budget, proposals, observers)
