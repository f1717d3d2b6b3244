"""The search itself: ask, evaluate, tell, until trials or time run out."""

import json
import logging
import math
import time
from collections import ChainMap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from evaluators.latency.evaluator import LatencyEvaluator
from evaluators.latency.slow_layers import Examined
from evaluators.measurement import Measurement
from evaluators.streams import Stream
from search.config.budget import Budget
from search.config.environment import environment
from search.config.registries import SAMPLERS
from search.loop.front_recovery import REACH
from search.loop.interrupts import Interrupts
from search.loop.patience import Stall
from search.loop.sampler_prior import meaning_of
from search.pipeline.early_stopping import Screen, most_asked, saved_seconds
from search.pipeline.exit_thresholds import GateSolver, Settled, is_hopeless
from search.pipeline.workbench import Workbench
from search.results.evaluation import Evaluation
from search.results.pareto import OBJECTIVES, Version
from search.results.simple_versions import Given, Simple
from search.results.store import REPORT, Baseline, versions_of
from search.samplers.base import InformedSampler
from search.samplers.distributions import distributions, first_guesses
from search.samplers.hypervolume.encoding import Codec
from spaces.candidate import Candidate
from spaces.dimensions import Value
from spaces.joint import JointSpace

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
        bench: builds and measures candidates.
        stored: Optuna's study; the truth.
        baseline: the dense network.
        sampler_name: proposes candidates.
        seed: of the sampler; a search that goes on draws anew, by the seed and the number of its trials.
        observers: told about every finished trial.
        seeds: versions to try after those that treat every layer alike, and before a sampler's own.
    """

    def __init__(
        self,
        bench: Workbench,
        stored: optuna.Study,
        baseline: Baseline,
        sampler_name: str,
        seed: int,
        observers: list[Observer],
        seeds: Sequence[Mapping[str, Value]] = (),
    ) -> None:
        self._bench = bench
        self._seeds: Sequence[Mapping[str, Value]] = seeds
        self._stored = stored
        self._dense = baseline.evaluation.measurements
        self._budget: Budget = bench.study.budget
        self._observers = observers
        self._latency: LatencyEvaluator = bench.latency_evaluator(baseline.reference_seconds)
        self._gates = GateSolver(bench, self._latency, self._dense)
        # From the journal, so that a search that goes on has the space that it began with.
        self._space = narrowed(bench.space, baseline.examined)
        self._distributions = distributions(self._space)
        self._known: dict[str, Version] = {
            version.evaluation.candidate.key: version for version in versions_of(stored.get_trials(deepcopy=False))
        }
        self._simple = {each.evaluation.candidate.key: each.evaluation for each in baseline.simple if each.is_own}
        lines = baseline.lines_to_beat
        self._screen = screen_of(bench, self._dense, ChainMap(self._known, {line.title: line for line in lines}))
        self._settled = settled_choices(stored.get_trials(deepcopy=False), self._known.values())
        self._codec = Codec(self._distributions)
        drawn = seed + len(stored.get_trials(deepcopy=False))
        stored.sampler = SAMPLERS[sampler_name](drawn, partial(meaning_of, bench, self._space, baseline))
        if isinstance(stored.sampler, InformedSampler):
            self._seeds = [*seeds, *stored.sampler.initial_proposals(self._distributions)]
        self._stall = Stall(self._budget, self._dense, lines)
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
                settled = self._settle(choices)
                known = self._known.get(settled.candidate.key)
                evaluation = known.evaluation if known else self._measure(settled)
        except Exception as error:
            logger.debug("trial %d failed", trial.number, exc_info=True)
            trial.set_user_attr("reason", f"{type(error).__name__}: {error}".strip()[:2000])
            self._stored.tell(trial, state=TrialState.FAIL)
        else:
            telling = time.monotonic()
            if choices.is_open:
                trial.set_user_attr("choices", choices.key)
                self._settled[choices.key] = evaluation.candidate
            self._tell(trial, evaluation, self._known.get(evaluation.candidate.key))
            self._overhead["tell"] += time.monotonic() - telling
        finished = self._stored.get_trials(deepcopy=False)[trial.number]
        self._count(finished)
        for observer in self._observers:
            observer.trial_done(finished, time.monotonic() - begin)

    def _settle(self, choices: Candidate) -> Settled:
        known = self._settled.get(choices.key)
        return Settled(known) if known else self._gates.settle(choices)

    def _measure(self, settled: Settled) -> Evaluation:
        """Returns what is measured of a version; what is known of it where solving it again came to an earlier one."""
        simple = self._simple.get(settled.candidate.key)  # measured before the first trial, and in full
        if simple:
            return simple
        found = self._gates.measure(settled, self._is_hopeless, screen=self._screen)
        known = self._known.get(found.candidate.key)
        return known.evaluation if known else found

    def _is_hopeless(self, measured: Mapping[str, Measurement]) -> bool:
        return is_hopeless(self._budget, measured, self._dense)

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


def screen_of(bench: Workbench, dense: Mapping[str, Measurement], known: Mapping[str, Version]) -> Screen | None:
    """Returns what ends hopeless versions early; None where the study wants none, or there are too few images.

    Frames of a stream are alike, so the first ones do not stand for the others: a stream is asked in one go.
    """
    count = most_asked(len(bench.scored), bench.target.batch)
    if not count or not bench.study.search.early or isinstance(bench.scored, Stream):
        return None
    reach = REACH if bench.study.recovery.final else 0.0
    right = bench.subject(bench.space.dense()).first_answers(count).correct
    return Screen(bench.study.budget, dense, right, known, len(bench.scored), bench.target.batch, reach)


def settled_choices(trials: Sequence[FrozenTrial], versions: Iterable[Version]) -> dict[str, Candidate]:
    """Returns what the choices of earlier trials came to once thresholds were solved, by the key of the choices.

    Timings decide with, so the same choices may come to other thresholds a second time: they are solved once.
    """
    candidates = {version.number: version.evaluation.candidate for version in versions}
    numbers = {
        trial.user_attrs["choices"]: trial.user_attrs.get("duplicate_of", trial.number)
        for trial in trials
        if "choices" in trial.user_attrs
    }
    return {key: candidates[number] for key, number in numbers.items() if number in candidates}


def is_counted(trial: FrozenTrial) -> bool:
    """Returns whether a trial counts towards `--trials`: finished, and not cut short from outside."""
    return trial.state.is_finished() and "interrupted" not in trial.user_attrs


def narrowed(space: JointSpace, examined: Examined | None) -> JointSpace:
    """Returns the space without the precisions in which a layer was slower."""
    if examined is None:
        return space
    return space.narrowed(examined.allowed(space.precision.layers, space.precision.computed))


def put_right_running(stored: optuna.Study) -> None:
    """Gives up trials that a stopped process left running, and queues the same proposals again."""
    for trial in stored.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if "evaluation" in trial.user_attrs:  # it was measured, and stopped on the way into the journal
            version = Version(trial.number, Evaluation.from_dict(trial.user_attrs["evaluation"]))
            whole = version.is_complete
            values = [version.measured[metric].value for metric in OBJECTIVES] if whole else None
            state = TrialState.COMPLETE if whole else TrialState.PRUNED
            stored.tell(trial.number, values, state)
            continue
        # A trial is told by its number, but its attributes are written through a Trial only, and to a Trial of what
        # another process asked for there is no other way than by the number that the storage gives it.
        running = Trial(stored, trial._trial_id)
        running.set_user_attr("interrupted", True)
        running.set_user_attr("reason", "interrupted")
        stored.tell(running, state=TrialState.FAIL)
        if trial.params:
            stored.enqueue_trial(trial.params, skip_if_exists=False)


def measure_baseline(
    bench: Workbench, given: Given | None = None, trials: int | None = None, timeout_s: float | None = None
) -> Baseline:
    """Returns the dense network's figures, on the same target and by the same protocol as every candidate.

    Args:
        bench: measures it.
        given: what was measured of the network before exits, gates and masks; none where not given.
        trials: how many the search will have; as many as the study says where not given.
        timeout_s: how long it will take at most.
    """
    same = given is not None and bench.has_references(given.forms)
    spent = given.spent if given and same else bench.time_references()
    seconds = {name: taken.work for name, taken in spent.items()}
    latency = bench.latency_evaluator(seconds)
    simple = simple_versions(bench, latency, given, same)
    dense = simple[0].evaluation
    precision = bench.space.precision.precisions[0]
    twice = latency.same_twice(precision, bench.data.validation.images[: bench.target.batch])
    walls = {name: taken.wall for name, taken in spent.items()}
    search_s = min((trials or bench.study.search.trials) * sum(dense.seconds.values()), timeout_s or math.inf)
    examined = bench.examine(search_s) if bench.examines else None
    machine = environment(bench.runtime.device(), bench.runtime.state())
    return Baseline(dense, seconds, twice, machine, walls, examined, tuple(simple))


def simple_versions(bench: Workbench, latency: LatencyEvaluator, given: Given | None, same: bool) -> list[Simple]:
    """Returns the network as it is in each precision: the search's own, then as it was given where that is another.

    Args:
        bench: measures them, in full.
        latency: of this search.
        given: what was measured before; of a file that is the same, accuracy and latency hold.
        same: whether its latencies were told beside the references of this search.
    """
    own, others = [], []
    for precision in bench.space.precision.computed:
        candidate, earlier = bench.space.whole(precision), given.of(precision) if given else None
        is_known = same and given is not None and bench.writes(candidate, given.forms[precision])
        if earlier and is_known and earlier.measurements["accuracy"].n == len(bench.scored):
            subject = bench.subject(candidate)
            measured = {**earlier.measurements, **bench.costs(subject)}
            found = replace(earlier, candidate=candidate, measurements=measured, digest=subject.artifact.digest)
        else:
            found = bench.evaluate(candidate, latency, lambda _measured: False)
            if earlier:
                before = earlier if same else bench.given.simple(precision, latency).evaluation
                others.append(Simple(precision, replace(before, candidate=candidate), is_own=False))
        own.append(Simple(precision, found))
    return [*own, *others]
