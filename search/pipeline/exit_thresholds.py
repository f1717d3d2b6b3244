"""Thresholds of a candidate's exits for the study's budget: from what each exit says, and what each exit path costs.

They are chosen on images that no version is scored on: of many thresholds the best looks better than it is. What they
cost there is not quite what they cost where it counts, so they aim a little below a limit, by what the timing leaves
open; a version that misses one narrowly all the same is solved again, with what its measurement told.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np

from evaluators.accuracy import accuracy_of
from evaluators.deployed import DeployedCandidate
from evaluators.exits.threshold_solver import Cost
from evaluators.inference.staged import CONFIDENCES
from evaluators.latency.evaluator import FIRST, LatencyEvaluator
from evaluators.measurement import Measurement
from search.config.budget import Budget
from search.config.study import FinetuneSection
from search.pipeline.compressor import CompressedNetwork
from search.pipeline.early_stopping import SOLVED_FOR, EarlyStopping, narrow, violations
from search.pipeline.pipeline import CompressionPipeline
from search.pipeline.threshold_problem import ResolvedThresholds, ThresholdProblem, margin
from search.results.evaluation import Evaluation
from spaces.candidate import NEVER_EXIT, Candidate

AIM = 0.97
"""Thresholds aim at about this share of a limit: what decides is counted and timed on other images."""
_ROUNDS = 2
"""So often is a version solved again that misses a limit narrowly."""

Deploy = Callable[[Candidate], DeployedCandidate]
"""Deploys a candidate that has been compressed already, with any thresholds."""


def aimed(budget: Budget, metric: str, dense: Mapping[str, Measurement], share: float = AIM) -> float:
    """Returns what solved thresholds may bring the mean of a cost to, in SI units; infinite where nothing limits it."""
    limits = [c for c in budget.constraints if c.measured_as == metric != "accuracy" and c.limits_default_statistic]
    return min((share * limit.ceiling(dense[metric]) for limit in limits), default=float("inf"))


@dataclass(frozen=True)
class Solution:
    """How thresholds were chosen.

    Args:
        choices: the version before, its thresholds not chosen.
        problem: what they were chosen from.
        thresholds: what they come to on the images that they were chosen on.
    """

    choices: Candidate
    problem: ThresholdProblem
    thresholds: ResolvedThresholds


@dataclass(frozen=True)
class ResolvedCandidate:
    """A candidate whose thresholds are known.

    Args:
        candidate: the version.
        solution: how its thresholds were chosen; None where nobody chose.
        seconds: that choosing took.
    """

    candidate: Candidate
    solution: Solution | None = None
    seconds: float = 0.0

    @property
    def thresholds(self) -> ResolvedThresholds | None:
        """What the thresholds come to on the images that they were chosen on; None where nobody chose."""
        return self.solution.thresholds if self.solution else None

    def stamped(self, evaluation: Evaluation) -> Evaluation:
        """Returns what was measured of the version with how its thresholds came about."""
        if self.thresholds is None:
            return evaluation
        seconds = {"thresholds": self.seconds, **evaluation.seconds}
        return replace(evaluation, exit_thresholds=self.thresholds.to_dict(), seconds=seconds)


class ExitThresholdSolver:
    """Finds the best thresholds of each candidate of a search.

    With a limit on the mean latency or FLOPs they are the most accurate ones within it, and of equal accuracy, by half
    of an image, the cheapest; with a limit on accuracy alone the cheapest.

    Args:
        pipeline: compresses, deploys and measures candidates.
        latency: times exit paths.
        dense: the dense network's measurements.
        budget: the limits; the study's where not given.
    """

    def __init__(
        self,
        pipeline: CompressionPipeline,
        latency: LatencyEvaluator,
        dense: Mapping[str, Measurement],
        budget: Budget | None = None,
    ) -> None:
        self._pipeline = pipeline
        self._latency = latency
        self._dense = dense
        self._budget = budget or pipeline.study.budget

    def resolve(self, choices: Candidate, finetune: FinetuneSection | None = None) -> ResolvedCandidate:
        """Returns the version that the choices come to: thresholds where they are open, else as it is.

        All exits are built, asked once about the images that serve for this, and timed. The version that they come to
        is timed as it runs, with exits in succession, and they are solved once more by what that took; where exits then
        save nothing, the version has none.

        Args:
            choices: of all else.
            finetune: fine-tuning that comes on top of the study's recovery.
        """
        if not choices.is_unresolved:
            return ResolvedCandidate(choices)
        begin = time.perf_counter()
        compressed = self._pipeline.compress(choices, finetune)
        solution = self._solve(choices, compressed)
        version = self._with(choices, solution.thresholds.thresholds)
        return ResolvedCandidate(version, solution, time.perf_counter() - begin)

    def resolve_again(self, candidate: Candidate, finetune: FinetuneSection) -> ResolvedCandidate:
        """Returns a version with new thresholds, where they are solved: training changes what its exits say."""
        solves = self._pipeline.solves_thresholds
        return self.resolve(candidate.unresolved() if solves else candidate, finetune)

    def evaluate(
        self,
        resolved: ResolvedCandidate,
        stopping: Sequence[EarlyStopping] = (),
        finetune: FinetuneSection | None = None,
    ) -> Evaluation:
        """Returns what was measured of a version, with how its thresholds came about.

        One that misses a limit narrowly is solved again with what was measured, and measured again: the evaluation is
        of the last one.

        Args:
            resolved: the version.
            stopping: what may end the evaluation early.
            finetune: fine-tuning that comes on top of the study's recovery.
        """
        evaluation = self._pipeline.evaluate(resolved.candidate, self._latency, stopping, finetune)
        for _ in range(_ROUNDS):
            again = self._solved_again(resolved, evaluation)
            if again is None:
                break
            resolved = again
            evaluation = self._pipeline.evaluate(resolved.candidate, self._latency, stopping, finetune)
        return resolved.stamped(evaluation)

    def _solve(self, choices: Candidate, compressed: CompressedNetwork) -> Solution:
        deploy = partial(self._pipeline.deploy, compressed=compressed)
        # Where loading compiles, one more artifact would take longer than all else.
        compiles = self._pipeline.runtime.capabilities().compiles
        never = self._with(choices, [NEVER_EXIT] * len(choices.active_exits))
        problem = self._problem(deploy(choices), None if compiles else deploy(never))
        solution = Solution(choices, problem, problem.solve())
        if compiles or next(iter(problem.costs)) != "latency" or not solution.thresholds.use_exits:
            return solution
        return self._in_succession(solution, deploy)

    def _in_succession(self, solution: Solution, deploy: Deploy) -> Solution:
        """Returns thresholds by what versions take with exits in succession: solved again by what the first one took.

        Args:
            solution: by exit paths alone.
            deploy: deploys versions.

        Returns:
            The problem, corrected by what the last version took, and its thresholds.
        """
        choices, first = solution.choices, solution.thresholds

        def timed(resolved: ResolvedThresholds) -> Mapping[str, Measurement]:
            version = deploy(self._with(choices, resolved.thresholds))
            return {"latency": self._latency.measure(self._on_threshold_images(version))}

        corrected = solution.problem.corrected(first, timed(first))
        again = corrected.solve()
        if again.thresholds != first.thresholds and again.use_exits:
            corrected = corrected.corrected(corrected.outcome(again), timed(again))
            again = corrected.outcome(again)
        paying = corrected.without_useless_exits(again)
        # What exits cost more in succession says nothing of a version without any.
        problem = corrected if paying is again else replace(corrected, corrections={})
        return Solution(choices, problem, paying)

    def _solved_again(self, resolved: ResolvedCandidate, evaluation: Evaluation) -> ResolvedCandidate | None:
        """Returns a version with thresholds by what its measurement told; None where there is no need or use."""
        solution = resolved.solution
        if solution is None or not self._misses_narrowly(evaluation.measurements):
            return None
        begin = time.perf_counter()
        problem = solution.problem.corrected(solution.thresholds, evaluation.measurements)
        again = replace(problem.solve(), rounds=solution.thresholds.rounds + 1)
        version = self._with(solution.choices, again.thresholds)
        if version == resolved.candidate or not problem.may_keep(again):
            return None
        seconds = resolved.seconds + sum(evaluation.seconds.values()) + time.perf_counter() - begin
        return ResolvedCandidate(version, Solution(solution.choices, problem, again), seconds)

    def _misses_narrowly(self, measured: Mapping[str, Measurement]) -> bool:
        """Returns whether limits are broken that thresholds are solved for, none by much, and no others."""
        broken = violations(self._budget, measured, self._dense)
        costs = {limit: by for limit, by in broken.items() if limit.measured_as != "accuracy"}
        solved = all(limit.limits_default_statistic and limit.measured_as in SOLVED_FOR for limit in costs)
        return bool(costs) and solved and all(by <= narrow(limit, measured) for limit, by in costs.items())

    def _with(self, choices: Candidate, thresholds: Sequence[float]) -> Candidate:
        """Returns the choices with these thresholds of their active exits; the other exits never answer."""
        never = dict(choices.thresholds) | dict.fromkeys(choices.active_exits, NEVER_EXIT)
        chosen = dict(zip(choices.active_exits, thresholds, strict=True))
        return self._pipeline.space.with_thresholds(choices, {**never, **chosen})

    def _on_threshold_images(self, version: DeployedCandidate) -> DeployedCandidate:
        """Returns a version whose batches are of the images that thresholds are chosen on."""
        pipeline = self._pipeline
        images, target = pipeline.threshold_images, pipeline.target
        return DeployedCandidate(version.network, version.candidate, version.artifact, images, pipeline.runtime, target)

    def _problem(self, all_exits: DeployedCandidate, without_exits: DeployedCandidate | None) -> ThresholdProblem:
        """Returns what the exits say to the images that serve for this, and what leaving there costs.

        Args:
            all_exits: the version with all of its exits.
            without_exits: the same without any, to tell what exits cost that nobody takes; where not given, the heads'
                share of the FLOPs tells.
        """
        images = self._pipeline.threshold_images
        logits = all_exits.session.all_logits(images.images, all_exits.target.batch)
        confidence = CONFIDENCES[all_exits.artifact.confidence]
        confidences = np.stack([confidence(logits[:, place]) for place in range(logits.shape[1])], axis=1)
        correct = logits.argmax(axis=2) == images.labels[:, None]
        costs, left = self._costs(all_exits, without_exits)
        return ThresholdProblem(confidences, correct, costs, self._floor, left)

    def _costs(
        self, all_exits: DeployedCandidate, without_exits: DeployedCandidate | None
    ) -> tuple[dict[str, Cost], float]:
        """Returns what leaving costs in seconds and in FLOPs, by the metric, first what is limited, and the margin.

        Where images pass blocks by, it is the mean over what they do; a gate knows nothing of thresholds of exits.
        """
        whole = without_exits
        answers = whole.answers if whole is not None and whole.artifact.blocks else None
        flops = self._pipeline.flops
        stages, heads = flops.stages(all_exits, answers), flops.heads(all_exits)
        profiles = answers.profiles if answers else FIRST
        paths = self._latency.timed_paths(all_exits, profiles)
        left = margin(paths.half_width)
        added = paths.seconds[-1] * sum(heads) / sum(stages)
        if whole is not None:
            added = paths.seconds[-1] - self._latency.paths(whole, profiles)[0]
        # Most of what an exit adds is the call of one more file, whatever its head: so each adds alike.
        each = [max(added, 0.0) / len(heads)] * len(heads)
        # An engine runs a stage for as many images as it was built for, however few of them get there.
        starts = np.diff(paths.seconds).tolist() if self._pipeline.runtime.capabilities().compiles else ()
        seconds = Cost(paths.seconds, each, self._aimed("latency", 1 - left), all_exits.target.batch, starts)
        counted = Cost(tuple(np.cumsum(stages)), heads, self._aimed("flops"))
        if seconds.limit is None and counted.limit is not None:
            return {"flops": counted, "latency": seconds}, left
        return {"latency": seconds, "flops": counted}, left

    def _aimed(self, metric: str, share: float = AIM) -> float | None:
        limit = aimed(self._budget, metric, self._dense, share)
        return limit if np.isfinite(limit) else None

    @cached_property
    def _floor(self) -> float | None:
        """The lowest accuracy that the budget lets through, by the dense network's on the same images."""
        limits = [limit for limit in self._budget.constraints if limit.measured_as == "accuracy"]
        if not limits:
            return None
        pipeline = self._pipeline
        answers = pipeline.deployed(pipeline.space.dense()).answers_to(pipeline.threshold_images)
        dense = accuracy_of(answers, pipeline.target, "threshold")
        return max(limit.floor(dense) for limit in limits)
