"""Thresholds of a candidate's exits for the study's budget: from what each exit says, and what each way out costs.

They are chosen on images that no version is scored on: of many thresholds the best looks better than it is. What they
cost there is not quite what they cost where it counts, so they aim a little below a limit, by what the timing leaves
open; a version that misses one narrowly all the same is solved again, with what its measurement told.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluators.accuracy import accuracy_of
from evaluators.deployed import Subject
from evaluators.exits.correctness import likelihoods
from evaluators.exits.threshold_solver import Cost, Solved, Thresholds
from evaluators.inference.staged import CONFIDENCES
from evaluators.latency.evaluator import FIRST, LatencyEvaluator
from evaluators.measurement import Measurement
from search.config.budget import Budget, Constraint
from search.config.study import FinetuneSection
from search.pipeline.early_stopping import Screen
from search.pipeline.workbench import Compressed, StopEarly, Workbench
from search.results.evaluation import Evaluation
from spaces.candidate import NEVER_EXIT, Candidate

AIM = 0.97
"""Thresholds aim at about this share of a limit: what decides is counted and timed on other images."""
NARROW = 0.1
"""A limit on latency or FLOPs that is missed by less than this share, or its timing's interval, is missed narrowly."""
_MOST_NARROW = 0.25
"""Of a limit: however wide the interval, more is no narrow miss."""
_ROUNDS = 2
"""So often is a version solved again that misses a limit narrowly."""
_LEAST_MARGIN = 0.01
"""Of a limit: an interval of a few turns may be narrow by luck."""
_MOST_MARGIN = 0.1
"""Of a limit: what lies further below is too dear a price for a timing that was disturbed."""
_ALIKE = 0.5
"""Expected accuracies that differ by fewer images than this are alike: counting could not tell them apart."""
_SOLVED = ("latency", "flops")
"""What thresholds are solved for."""


def aimed(budget: Budget, metric: str, dense: Mapping[str, Measurement], share: float = AIM) -> float:
    """Returns what solved thresholds may bring the mean of a cost to, in SI units; infinite where nothing limits it."""
    limits = [c for c in budget.constraints if c.measured_as == metric != "accuracy" and c.limits_default_statistic]
    return min((share * limit.ceiling(dense[metric]) for limit in limits), default=float("inf"))


def margin(half_width: float) -> float:
    """Returns the share of a limit that is left open for a timing, and for the one that decides, being off.

    Args:
        half_width: of the 95% interval of what costs are told by, as a share of it; the other one's is taken to be
            alike.
    """
    return float(np.clip(np.sqrt(2) * half_width, _LEAST_MARGIN, _MOST_MARGIN))


def is_hopeless(budget: Budget, measured: Mapping[str, Measurement], dense: Mapping[str, Measurement]) -> bool:
    """Returns whether the rest of a version need not be measured: it breaks a limit, and not narrowly.

    What a version loses that lies just outside tells a sampler what those just inside would lose.
    """
    return any(by > _narrow(limit, measured) for limit, by in _broken(budget, measured, dense).items())


def _broken(
    budget: Budget, measured: Mapping[str, Measurement], dense: Mapping[str, Measurement]
) -> dict[Constraint, float]:
    """Returns the limits that are broken, as far as was measured, and by which share of them."""
    known = [limit for limit in budget.constraints if limit.measured_as in measured]
    over = {limit: limit.violation(measured[limit.measured_as], dense[limit.measured_as]) for limit in known}
    return {limit: by for limit, by in over.items() if by > 0}


def _narrow(limit: Constraint, measured: Mapping[str, Measurement]) -> float:
    """Returns the share of a limit by which it may be missed narrowly."""
    if limit.measured_as not in _SOLVED:
        return 0.0
    return float(np.clip(_half_width(measured[limit.measured_as]), NARROW, _MOST_NARROW))


def _half_width(measured: Measurement) -> float:
    return measured.notes.get("half_width", 0.0)


@dataclass(frozen=True)
class Settled:
    """A candidate whose thresholds are known.

    Args:
        candidate: the version.
        gates: what its thresholds came to on the images that they were chosen on; None where nobody chose.
        seconds: that choosing took.
        asked: what they were chosen from; None where nobody chose.
    """

    candidate: Candidate
    gates: Mapping[str, Any] | None = None
    seconds: float = 0.0
    asked: "_Asked | None" = None

    def stamped(self, evaluation: Evaluation) -> Evaluation:
        """Returns what was measured of the version with how its thresholds came about."""
        if self.gates is None:
            return evaluation
        return replace(evaluation, gates=self.gates, seconds={"thresholds": self.seconds, **evaluation.seconds})


@dataclass(frozen=True)
class _Asked:
    """What `n` images were told by a version, and what they cost where they leave.

    Args:
        choices: the version's, thresholds of its exits being open.
        confidences: of each exit and, last, of the end, `(n, exits + 1)`.
        correct: whether each is right, in the same shape.
        costs: what leaving costs, by the metric, first what is limited; a limit is what is aimed at.
        floor: the lowest accuracy; None where there is none.
        margin: how far below the budget's limit on latency that is, as a share of it.
        corrections: how many times as much costs were as they say, where they were measured, by the metric.
    """

    choices: Candidate
    confidences: NDArray[np.floating]
    correct: NDArray[np.bool_]
    costs: Mapping[str, Cost]
    floor: float | None
    margin: float
    corrections: Mapping[str, float] = field(default_factory=dict)

    def corrected(self, told: Mapping[str, Any], measured: Mapping[str, Measurement]) -> "_Asked":
        """Returns the same in the light of what was measured of a version with the thresholds that `best` told."""
        before = dict(zip(self.costs, told["costs"], strict=True))
        known = [metric for metric in before if metric in measured]
        found = {metric: self._correction(metric) * measured[metric].value / before[metric] for metric in known}
        left = margin(_half_width(measured["latency"])) if "latency" in measured else self.margin
        seconds = self.costs["latency"]
        if seconds.limit is not None:
            seconds = replace(seconds, limit=seconds.limit * (1 - left) / (1 - self.margin))
        costs = {**self.costs, "latency": seconds}
        return replace(self, costs=costs, margin=left, corrections={**self.corrections, **found})

    def may_keep(self, told: Mapping[str, Any]) -> bool:
        """Returns whether the thresholds that `best` told keep the budget's limits, as far as they tell."""
        found = zip(self.costs.values(), told["costs"], strict=True)
        return all(cost.limit is None or mean * (1 - self.margin) <= cost.limit for cost, mean in found)

    def _correction(self, metric: str) -> float:
        return self.corrections.get(metric, 1.0)

    def best(self) -> dict[str, Any]:
        """Returns the best thresholds by how likely answers are right, and what they come to by counting."""
        exits, likely = self.confidences[:, :-1], likelihoods(self.confidences, self.correct)
        costs = self._corrected()
        solved = self._cheapest_alike(Thresholds(exits, likely, costs, self.floor).solve(), likely, costs)
        return self._told(solved.thresholds, solved.accuracy)

    def outcome(self, told: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what thresholds that were found earlier come to with these corrections."""
        return self._told(told["thresholds"], told["expected_accuracy"])

    def if_it_pays(self, told: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns these thresholds, or those that nothing reaches where these are no faster and no more accurate.

        They are more accurate where their answers are likely to be, by more than what is alike.
        """
        exits = self.confidences.shape[1] - 1
        whole = float(likelihoods(self.confidences, self.correct)[:, -1].mean())
        never = replace(self, corrections={})._told((NEVER_EXIT,) * exits, whole)
        is_better = told["expected_accuracy"] > whole + _ALIKE / len(self.correct)
        is_used = min(told["thresholds"]) < NEVER_EXIT
        return told if is_used and (is_better or told["costs"][0] < never["costs"][0]) else never

    def _corrected(self) -> tuple[Cost, ...]:
        return tuple(cost.times(self._correction(metric)) for metric, cost in self.costs.items())

    def _told(self, thresholds: Sequence[float], expected: float) -> dict[str, Any]:
        """Returns, for the record, what thresholds come to by counting."""
        exits = self.confidences[:, :-1]
        told = asdict(Thresholds(exits, self.correct, self._corrected(), self.floor).outcome(thresholds))
        told |= {"expected_accuracy": expected, "images": len(exits)}
        told |= {"correction": self._correction(next(iter(self.costs))), "margin": self.margin}
        return told | {"ways": {metric: [float(each) for each in cost.leave] for metric, cost in self.costs.items()}}

    def _cheapest_alike(self, best: Solved, likely: NDArray[np.floating], costs: Sequence[Cost]) -> Solved:
        """Returns the cheapest thresholds that are as accurate as the best ones, as far as so many images can tell.

        Without, a budget that is easily kept would leave it to chance what exits save. Where no cost is limited the
        best ones are cheap already.
        """
        if all(cost.limit is None for cost in costs):
            return best
        enough = best.accuracy - _ALIKE / len(likely)
        floor = enough if self.floor is None else max(enough, min(self.floor, best.accuracy))
        found = Thresholds(self.confidences[:, :-1], likely, costs, floor, is_frugal=True).solve()
        is_better = found.accuracy >= floor and found.costs[0] < best.costs[0]
        return found if is_better else best


class GateSolver:
    """Finds the best thresholds of each candidate of a search.

    With a limit on the mean latency or FLOPs they are the most accurate ones within it, and of those that are alike
    by half of an image the cheapest; with a limit on accuracy alone the cheapest.

    Args:
        bench: builds candidates.
        latency: times the ways out.
        dense: the dense network's measurements.
    """

    def __init__(self, bench: Workbench, latency: LatencyEvaluator, dense: Mapping[str, Measurement]) -> None:
        self._bench = bench
        self._latency = latency
        self._dense = dense

    def settle(self, choices: Candidate, more: FinetuneSection | None = None) -> Settled:
        """Returns the version that the choices come to: thresholds where they are open, else as it is.

        All exits are built, asked once about the images that serve for this, and timed. The version that they come to
        is timed as it runs, with exits in succession, and they are solved once more by what that took; where exits then
        save nothing, the version has none.

        Args:
            choices: of all else.
            more: fine-tuning that comes on top of the study's recovery.
        """
        if not choices.is_open:
            return Settled(choices)
        begin = time.perf_counter()
        compressed = self._bench.compressed(choices, more)
        never = self._version(choices, {"thresholds": [NEVER_EXIT] * len(choices.active_exits)})
        # Where loading compiles, one more artifact would take longer than all else.
        compiles = self._bench.runtime.capabilities().compiles
        whole = None if compiles else self._bench.built(never, compressed, more)
        asked = self._asked(choices, self._bench.built(choices, compressed, more), whole)
        told: Mapping[str, Any] = asked.best()
        version = self._version(choices, told)
        if not compiles and next(iter(asked.costs)) == "latency":
            asked, told = self._as_it_runs(asked, told, partial(self._taken, choices, compressed, more))
            version = self._version(choices, told)
        return Settled(version, told, time.perf_counter() - begin, asked)

    def _as_it_runs(
        self, asked: _Asked, told: Mapping[str, Any], taken: Callable[[Mapping[str, Any]], Measurement]
    ) -> tuple[_Asked, Mapping[str, Any]]:
        """Returns thresholds by what versions take with exits in succession: solved again by what the first one took.

        Args:
            asked: about all exits.
            told: thresholds by the formula alone.
            taken: times the version that thresholds make.

        Returns:
            What was asked, corrected by what the last version took, and its thresholds.
        """
        if min(told["thresholds"]) >= NEVER_EXIT:
            return asked, told
        found = asked.corrected(told, {"latency": taken(told)})
        again = found.best()
        if again["thresholds"] != told["thresholds"] and min(again["thresholds"]) < NEVER_EXIT:
            found = asked.corrected(asked.outcome(again), {"latency": taken(again)})
            again = found.outcome(again)
        paying = found.if_it_pays(again)
        # What exits cost more in succession says nothing of a version without any.
        return (found if paying is again else replace(found, corrections={})), paying

    def _taken(
        self, choices: Candidate, compressed: Compressed, more: FinetuneSection | None, told: Mapping[str, Any]
    ) -> Measurement:
        """Returns what a batch of the images that thresholds are chosen on takes, as the version runs."""
        return self._latency.measure(self._timed(self._bench.built(self._version(choices, told), compressed, more)))

    def measure(
        self,
        settled: Settled,
        stop: StopEarly,
        more: FinetuneSection | None = None,
        screen: Screen | None = None,
    ) -> Evaluation:
        """Returns what was measured of a version, with how its thresholds came about.

        One that misses a limit narrowly is solved again with what was measured, and measured again: the evaluation is
        of the last one.

        Args:
            settled: the version.
            stop: see `Workbench.evaluate`.
            more: fine-tuning that comes on top of the study's recovery.
            screen: see `Workbench.evaluate`.
        """
        found = self._bench.evaluate(settled.candidate, self._latency, stop, more=more, screen=screen)
        for _ in range(_ROUNDS):
            again = self._again(settled, found)
            if again is None:
                break
            settled = again
            found = self._bench.evaluate(settled.candidate, self._latency, stop, more=more, screen=screen)
        return settled.stamped(found)

    def _again(self, settled: Settled, found: Evaluation) -> Settled | None:
        """Returns a version that was measured with thresholds by what that told; None where there is no need or use."""
        if settled.asked is None or settled.gates is None or not self._misses_narrowly(found.measurements):
            return None
        begin = time.perf_counter()
        asked = settled.asked.corrected(settled.gates, found.measurements)
        told = asked.best()
        version = self._version(settled.asked.choices, told)
        if version == settled.candidate or not asked.may_keep(told):
            return None
        spent = settled.seconds + sum(found.seconds.values()) + time.perf_counter() - begin
        return Settled(version, {**told, "rounds": settled.gates.get("rounds", 0) + 1}, spent, asked)

    def _misses_narrowly(self, measured: Mapping[str, Measurement]) -> bool:
        """Returns whether limits are broken that thresholds are solved for, none by much, and no others."""
        found = _broken(self._bench.study.budget, measured, self._dense)
        broken = {limit: by for limit, by in found.items() if limit.measured_as != "accuracy"}
        solved = all(limit.limits_default_statistic for limit in broken)
        return bool(broken) and solved and all(by <= _narrow(limit, measured) for limit, by in broken.items())

    def _version(self, choices: Candidate, told: Mapping[str, Any]) -> Candidate:
        never = dict(choices.thresholds) | dict.fromkeys(choices.active_exits, NEVER_EXIT)
        found = dict(zip(choices.active_exits, told["thresholds"], strict=True))
        return self._bench.space.settled(choices, {**never, **found})

    def _timed(self, subject: Subject) -> Subject:
        """Returns a subject whose batches are of the images that thresholds are chosen on."""
        images, target = self._bench.gate_images, self._bench.target
        return Subject(subject.network, subject.candidate, subject.artifact, images, self._bench.runtime, target)

    def resettle(self, candidate: Candidate, more: FinetuneSection) -> Settled:
        """Returns a version with new thresholds, where they are solved: training changes what its exits say."""
        return self.settle(candidate.reopened() if self._bench.has_gates else candidate, more)

    def _asked(self, choices: Candidate, subject: Subject, whole: Subject | None) -> "_Asked":
        """Returns what the exits say to the images that serve for this, and what leaving there costs."""
        images = self._bench.gate_images
        logits = subject.opened.all_logits(images.images, subject.target.batch)
        confidence = CONFIDENCES[subject.artifact.confidence]
        confidences = np.stack([confidence(logits[:, place]) for place in range(logits.shape[1])], axis=1)
        correct = logits.argmax(axis=2) == images.labels[:, None]
        costs, left = self._costs(subject, whole)
        return _Asked(choices, confidences, correct, costs, self._floor, left)

    def _costs(self, subject: Subject, whole: Subject | None) -> tuple[dict[str, Cost], float]:
        """Returns what leaving costs in seconds and in FLOPs, by the metric, first what is limited, and the margin.

        Where images pass blocks by, it is the mean over what they do; a gate knows nothing of thresholds of exits.

        Args:
            subject: with all of its exits.
            whole: the same without any, to tell what exits cost that nobody takes; where not given, the heads' share
                of the FLOPs tells.
        """
        ways = whole.answers if whole is not None and whole.artifact.blocks else None
        stages, heads = self._bench.flops.stages(subject, ways), self._bench.flops.heads(subject)
        profiles = ways.profiles if ways else FIRST
        timed = self._latency.timed_paths(subject, profiles)
        paths, left = timed.seconds, margin(timed.half_width)
        added = paths[-1] * sum(heads) / sum(stages)
        if whole is not None:
            added = paths[-1] - self._latency.paths(whole, profiles)[0]
        # Most of what an exit adds is the call of one more file, whatever its head: so each adds alike.
        each = [max(added, 0.0) / len(heads)] * len(heads)
        # An engine runs a stage for as many images as it was built for, however few of them get there.
        starts = np.diff(paths).tolist() if self._bench.runtime.capabilities().compiles else ()
        seconds = Cost(paths, each, self._aimed("latency", 1 - left), subject.target.batch, starts)
        flops = Cost(tuple(np.cumsum(stages)), heads, self._aimed("flops"))
        found = {"latency": seconds, "flops": flops}
        if seconds.limit is None and flops.limit is not None:
            found = dict(reversed(found.items()))
        return found, left

    def _aimed(self, metric: str, share: float = AIM) -> float | None:
        found = aimed(self._bench.study.budget, metric, self._dense, share)
        return found if np.isfinite(found) else None

    @cached_property
    def _floor(self) -> float | None:
        """The lowest accuracy that the budget lets through, by the dense network's on the same images."""
        limits = [limit for limit in self._bench.study.budget.constraints if limit.measured_as == "accuracy"]
        if not limits:
            return None
        answers = self._bench.subject(self._bench.space.dense()).answers_to(self._bench.gate_images)
        dense = accuracy_of(answers, self._bench.target, "threshold")
        return max(limit.floor(dense) for limit in limits)
