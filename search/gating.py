"""Thresholds of a candidate's exits for the study's budget: from what each exit says, and what each way out costs.

They are chosen on images that no version is scored on: of many thresholds the best looks better than it is.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluators.accuracy import accuracy_of
from evaluators.latency import FIRST, LatencyEvaluator
from evaluators.likelihoods import likelihoods
from evaluators.measurement import Measurement
from evaluators.runtimes.staged import CONFIDENCES
from evaluators.subject import Subject
from evaluators.thresholds import Cost, Solved, Thresholds
from search.budget import Budget
from search.evaluation import Evaluation
from search.study import FinetuneSection
from search.workbench import Compressed, Workbench
from spaces.candidate import NEVER_EXIT, Candidate

AIM = 0.97
"""Thresholds aim at this share of a limit: the timing that decides is another one, of other images."""
_ALIKE = 0.5
"""Expected accuracies that differ by fewer images than this are alike: counting could not tell them apart."""


def aimed(budget: Budget, metric: str, dense: Mapping[str, Measurement]) -> float:
    """Returns what solved thresholds may bring the mean of a cost to, in SI units; infinite where nothing limits it."""
    limits = [c for c in budget.constraints if c.measured_as == metric != "accuracy" and c.limits_default_statistic]
    return min((AIM * limit.ceiling(dense[metric]) for limit in limits), default=float("inf"))


@dataclass(frozen=True)
class Settled:
    """A candidate whose thresholds are known.

    Args:
        candidate: the version.
        gates: what its thresholds came to on the images that they were chosen on; None where nobody chose.
        seconds: that choosing took.
    """

    candidate: Candidate
    gates: Mapping[str, Any] | None = None
    seconds: float = 0.0

    def stamped(self, evaluation: Evaluation) -> Evaluation:
        """Returns what was measured of the version with how its thresholds came about."""
        if self.gates is None:
            return evaluation
        return replace(evaluation, gates=self.gates, seconds={"thresholds": self.seconds, **evaluation.seconds})


@dataclass(frozen=True)
class _Asked:
    """What `n` images were told by a version, and what they cost where they leave.

    Args:
        confidences: of each exit and, last, of the end, `(n, exits + 1)`.
        correct: whether each is right, in the same shape.
        costs: what leaving costs, by the metric, first what is limited.
        floor: the lowest accuracy; None where there is none.
        correction: how many times as much the first cost was as it says, when it was measured.
    """

    confidences: NDArray[np.floating]
    correct: NDArray[np.bool_]
    costs: Mapping[str, Cost]
    floor: float | None
    correction: float = 1.0

    def best(self) -> dict[str, Any]:
        """Returns the best thresholds by how likely answers are right, and what they come to by counting."""
        exits, likely = self.confidences[:, :-1], likelihoods(self.confidences, self.correct)
        costs = self._corrected()
        solved = self._cheapest_alike(Thresholds(exits, likely, costs, self.floor).solve(), likely, costs)
        return self._told(solved.thresholds, solved.accuracy)

    def outcome(self, told: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what thresholds that were found earlier come to with this correction."""
        return self._told(told["thresholds"], told["expected_accuracy"])

    def if_it_pays(self, told: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns these thresholds, or those that nothing reaches where these are no faster and no more accurate.

        They are more accurate where their answers are likely to be, by more than what is alike.
        """
        exits = self.confidences.shape[1] - 1
        whole = float(likelihoods(self.confidences, self.correct)[:, -1].mean())
        never = replace(self, correction=1.0)._told((NEVER_EXIT,) * exits, whole)
        is_better = told["expected_accuracy"] > whole + _ALIKE / len(self.correct)
        is_used = min(told["thresholds"]) < NEVER_EXIT
        return told if is_used and (is_better or told["costs"][0] < never["costs"][0]) else never

    def _corrected(self) -> tuple[Cost, ...]:
        first, *others = self.costs.values()
        return (first.times(self.correction), *others)

    def _told(self, thresholds: Sequence[float], expected: float) -> dict[str, Any]:
        """Returns, for the record, what thresholds come to by counting."""
        exits = self.confidences[:, :-1]
        told = asdict(Thresholds(exits, self.correct, self._corrected(), self.floor).outcome(thresholds))
        told |= {"expected_accuracy": expected, "images": len(exits), "correction": self.correction}
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
        closed = dict(choices.thresholds) | dict.fromkeys(choices.active_exits, NEVER_EXIT)
        never = self._bench.space.settled(choices, closed)
        # Where loading compiles, one more artifact would take longer than all else.
        compiles = self._bench.runtime.capabilities().compiles
        whole = None if compiles else self._bench.built(never, compressed, more)
        asked = self._asked(self._bench.built(choices, compressed, more), whole)
        told: Mapping[str, Any] = asked.best()
        version = self._version(choices, never, told)
        if not compiles and next(iter(asked.costs)) == "latency":
            taken = partial(self._taken, choices, never, compressed, more)
            told = self._as_it_runs(asked, told, taken)
            version = self._version(choices, never, told)
        return Settled(version, told, time.perf_counter() - begin)

    def _as_it_runs(
        self, asked: _Asked, told: Mapping[str, Any], taken: Callable[[Mapping[str, Any]], float]
    ) -> Mapping[str, Any]:
        """Returns thresholds by what versions take with exits in succession: solved again by what the first one took.

        Args:
            asked: about all exits.
            told: thresholds by the formula alone.
            taken: times the version that thresholds make.
        """
        if min(told["thresholds"]) >= NEVER_EXIT:
            return told
        found = replace(asked, correction=taken(told) / told["costs"][0])
        again = found.best()
        if again["thresholds"] != told["thresholds"] and min(again["thresholds"]) < NEVER_EXIT:
            found = replace(asked, correction=taken(again) / asked.outcome(again)["costs"][0])
            again = found.outcome(again)
        return found.if_it_pays(again)

    def _taken(
        self,
        choices: Candidate,
        never: Candidate,
        compressed: Compressed,
        more: FinetuneSection | None,
        told: Mapping[str, Any],
    ) -> float:
        """Returns the seconds of a batch of the images that thresholds are chosen on, as the version runs."""
        subject = self._bench.built(self._version(choices, never, told), compressed, more)
        return self._latency.measure(self._timed(subject)).value

    def _version(self, choices: Candidate, never: Candidate, told: Mapping[str, Any]) -> Candidate:
        found = dict(zip(choices.active_exits, told["thresholds"], strict=True))
        return self._bench.space.settled(choices, {**never.thresholds, **found})

    def _timed(self, subject: Subject) -> Subject:
        """Returns a subject whose batches are of the images that thresholds are chosen on."""
        images, target = self._bench.gate_images, self._bench.target
        return Subject(subject.network, subject.candidate, subject.artifact, images, self._bench.runtime, target)

    def resettle(self, candidate: Candidate, more: FinetuneSection) -> Settled:
        """Returns a version with new thresholds, where they are solved: training changes what its exits say."""
        return self.settle(candidate.reopened() if self._bench.has_gates else candidate, more)

    def _asked(self, subject: Subject, whole: Subject | None) -> "_Asked":
        """Returns what the exits say to the images that serve for this, and what leaving there costs."""
        images = self._bench.gate_images
        logits = subject.opened.all_logits(images.images, subject.target.batch)
        confidence = CONFIDENCES[subject.artifact.confidence]
        confidences = np.stack([confidence(logits[:, place]) for place in range(logits.shape[1])], axis=1)
        correct = logits.argmax(axis=2) == images.labels[:, None]
        return _Asked(confidences, correct, self._costs(subject, whole), self._floor)

    def _costs(self, subject: Subject, whole: Subject | None) -> dict[str, Cost]:
        """Returns what leaving costs in seconds and in FLOPs, by the metric, first what is limited.

        Where images pass blocks by, it is the mean over what they do; a gate knows nothing of thresholds of exits.

        Args:
            subject: with all of its exits.
            whole: the same without any, to tell what exits cost that nobody takes; where not given, the heads' share
                of the FLOPs tells.
        """
        ways = whole.answers if whole is not None and whole.artifact.blocks else None
        stages, heads = self._bench.flops.stages(subject, ways), self._bench.flops.heads(subject)
        profiles = ways.profiles if ways else FIRST
        paths = self._latency.paths(subject, profiles)
        added = paths[-1] * sum(heads) / sum(stages)
        if whole is not None:
            added = paths[-1] - self._latency.paths(whole, profiles)[0]
        # Most of what an exit adds is the call of one more file, whatever its head: so each adds alike.
        each = [max(added, 0.0) / len(heads)] * len(heads)
        # An engine runs a stage for as many images as it was built for, however few of them get there.
        starts = np.diff(paths).tolist() if self._bench.runtime.capabilities().compiles else ()
        seconds = Cost(paths, each, self._aimed("latency"), subject.target.batch, starts)
        flops = Cost(tuple(np.cumsum(stages)), heads, self._aimed("flops"))
        found = {"latency": seconds, "flops": flops}
        return found if seconds.limit is not None or flops.limit is None else dict(reversed(found.items()))

    def _aimed(self, metric: str) -> float | None:
        found = aimed(self._bench.study.limits, metric, self._dense)
        return found if np.isfinite(found) else None

    @cached_property
    def _floor(self) -> float | None:
        """The lowest accuracy that the budget lets through, by the dense network's on the same images."""
        limits = [limit for limit in self._bench.study.limits.constraints if limit.measured_as == "accuracy"]
        if not limits:
            return None
        answers = self._bench.subject(self._bench.space.dense()).answers_to(self._bench.gate_images)
        dense = accuracy_of(answers, self._bench.target, "threshold")
        return max(limit.floor(dense) for limit in limits)
