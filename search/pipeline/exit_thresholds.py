"""Solves a candidate's exit thresholds for the budget, from the confidences of its exits and the costs of exit paths.

They are chosen on images that no version is scored on, because the best of many thresholds is overfitted. Costs on
these images differ a little from those on the scored ones, so thresholds aim below a limit by the uncertainty of the
timing. A version that misses a limit narrowly all the same is solved again, with costs corrected by its measurement.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np

from evaluators.accuracy import accuracy_of
from evaluators.deployed import DeployedCandidate
from evaluators.exits.exit_outputs import ExitOutputs
from evaluators.exits.threshold_problem import ResolvedThresholds, ThresholdProblem, margin
from evaluators.exits.threshold_solver import Cost
from evaluators.latency.evaluator import FIRST, LatencyEvaluator
from evaluators.measurement import Measurement
from search.config.budget import Budget
from search.config.study import FinetuneSection
from search.pipeline.compressor import CompressedNetwork
from search.pipeline.early_stopping import SOLVED_FOR, EarlyStopping, narrow_miss
from search.pipeline.pipeline import CompressionPipeline
from search.results.evaluation import Evaluation
from spaces.candidate import Candidate

AIM = 0.97
"""Share of a limit that thresholds aim at by default: the version is scored and timed on other images."""
_ROUNDS = 2
"""How often a version that misses a limit narrowly is solved again."""

Deploy = Callable[[Candidate], DeployedCandidate]
"""Deploys a candidate whose network is compressed already, with any thresholds."""


def cost_target(budget: Budget, metric: str, dense: Mapping[str, Measurement], share: float = AIM) -> float:
    """Returns the mean cost that solved thresholds aim at, in SI units; infinite without a limit on it."""
    ceiling = None if metric == "accuracy" else budget.ceiling(metric, dense)
    return float("inf") if ceiling is None else share * ceiling


@dataclass(frozen=True)
class Solution:
    """How thresholds were chosen.

    Args:
        choices: the candidate with unsolved thresholds.
        problem: the optimization problem.
        thresholds: its solution, with accuracy and costs.
    """

    choices: Candidate
    problem: ThresholdProblem
    thresholds: ResolvedThresholds


@dataclass(frozen=True)
class ResolvedCandidate:
    """A candidate with all thresholds resolved.

    Args:
        candidate: with its thresholds.
        solution: how its thresholds were solved; None if they were not.
        seconds: that solving took.
    """

    candidate: Candidate
    solution: Solution | None = None
    seconds: float = 0.0

    @property
    def thresholds(self) -> ResolvedThresholds | None:
        """The solved thresholds with their accuracy and costs; None if they were not solved."""
        return self.solution.thresholds if self.solution else None

    def with_thresholds(self, evaluation: Evaluation) -> Evaluation:
        """Returns the evaluation with the record of how its thresholds were solved."""
        if self.solution is None:
            return evaluation
        solved, seconds = self.solution.thresholds, {"thresholds": self.seconds, **evaluation.seconds}
        exits = {"exits": self.solution.choices.active_exits, "thresholds": solved.thresholds}
        answers = {**exits, **self.solution.problem.to_dict()}
        return replace(evaluation, exit_thresholds=solved.to_dict(), seconds=seconds, answers=answers)


class ExitThresholdSolver:
    """Solves the exit thresholds of each candidate of a search.

    With a limit on the mean latency or FLOPs these are the most accurate ones within it, and of equally accurate ones
    (within half an image) the cheapest; with a limit on accuracy alone the cheapest.

    Args:
        pipeline: compresses, deploys and measures candidates.
        latency: times exit paths.
        dense: the dense network's measurements.
        budget: the limits; by default the study's.
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
        """Returns the candidate with its thresholds solved, or as it is if none are unsolved.

        All exits are built, run once on the threshold images, and timed. The version with the solved thresholds is
        timed as it would run, one stage after the other, and its thresholds are solved once more with that latency. If
        exits save nothing then, the version has none.

        Args:
            choices: the candidate, its thresholds unsolved.
            finetune: fine-tuning on top of the study's recovery.
        """
        if not choices.is_unsolved:
            return ResolvedCandidate(choices)
        begin = time.perf_counter()
        compressed = self._pipeline.compress(choices, finetune)
        solution = self._solve(choices, compressed)
        version = self._with(choices, solution.thresholds.thresholds)
        return ResolvedCandidate(version, solution, time.perf_counter() - begin)

    def resolve_again(self, candidate: Candidate, finetune: FinetuneSection) -> ResolvedCandidate:
        """Returns the candidate with thresholds solved anew, if the study solves them: training changes its exits."""
        solves_thresholds = self._pipeline.solves_thresholds
        return self.resolve(candidate.unsolved() if solves_thresholds else candidate, finetune)

    def evaluate(
        self,
        resolved: ResolvedCandidate,
        stopping: Sequence[EarlyStopping] = (),
        finetune: FinetuneSection | None = None,
    ) -> Evaluation:
        """Returns the evaluation of a version, with the record of its thresholds.

        After a narrow miss the thresholds are solved again with the measured costs, and the new version is measured;
        the evaluation is of the last one.

        Args:
            resolved: the version.
            stopping: rules that may end the evaluation early.
            finetune: fine-tuning on top of the study's recovery.
        """
        evaluation = self._pipeline.evaluate(resolved.candidate, self._latency, stopping, finetune)
        for _ in range(_ROUNDS):
            corrected = self._solved_again(resolved, evaluation)
            if corrected is None:
                break
            resolved = corrected
            evaluation = self._pipeline.evaluate(resolved.candidate, self._latency, stopping, finetune)
        return resolved.with_thresholds(evaluation)

    def _solve(self, choices: Candidate, compressed: CompressedNetwork) -> Solution:
        deploy = partial(self._pipeline.deploy, compressed=compressed)
        # On runtimes that compile, loading one more artifact would take longer than the rest.
        compiles = self._pipeline.runtime.capabilities().compiles
        never = self._with(choices, [None] * len(choices.active_exits))
        all_exits = deploy(choices)
        outputs = self._outputs(all_exits)
        problem = self._problem(all_exits, outputs, None if compiles else deploy(never))
        solution = Solution(choices, problem, problem.solve())
        if compiles or next(iter(problem.costs)) != "latency" or not solution.thresholds.use_exits:
            return solution
        return self._in_succession(solution, outputs, deploy)

    def _in_succession(self, solution: Solution, outputs: ExitOutputs, deploy: Deploy) -> Solution:
        """Returns the solution corrected by the latency of the version as it runs, one stage after the other.

        Args:
            solution: from the costs of exit paths alone.
            outputs: of all exits, on the threshold images.
            deploy: deploys versions.

        Returns:
            The problem, corrected by the latency of the last version that was timed, and its thresholds.
        """
        choices, first = solution.choices, solution.thresholds

        def timed(resolved: ResolvedThresholds) -> Mapping[str, Measurement]:
            version = self._scored_on_threshold_images(deploy(self._with(choices, resolved.thresholds)))
            # Who leaves where follows from what all exits said; with gates of blocks it is a part of the route only.
            is_known = not version.artifact.blocks
            subject = version.known(outputs.answers(resolved.thresholds)) if is_known else version
            return {"latency": self._latency.measure(subject)}

        corrected = solution.problem.corrected(first, timed(first))
        again = corrected.solve()
        if again.thresholds != first.thresholds and again.use_exits:
            corrected = corrected.corrected(corrected.outcome(again), timed(again))
            again = corrected.outcome(again)
        useful = corrected.without_useless_exits(again)
        # Corrections of a version with exits do not apply to one without.
        problem = corrected if useful is again else replace(corrected, corrections={})
        return Solution(choices, problem, useful)

    def _solved_again(self, resolved: ResolvedCandidate, evaluation: Evaluation) -> ResolvedCandidate | None:
        """Returns the version with thresholds corrected by its measurement; None if unneeded or without effect."""
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
        """Returns whether costs that thresholds are solved for break limits, all narrowly, and no other costs do."""
        broken = self._budget.broken(measured, self._dense)
        costs = {limit: excess for limit, excess in broken.items() if limit.measured_as != "accuracy"}
        solved = all(limit.limits_default_statistic and limit.measured_as in SOLVED_FOR for limit in costs)
        return bool(costs) and solved and all(excess <= narrow_miss(limit, measured) for limit, excess in costs.items())

    def _with(self, choices: Candidate, thresholds: Sequence[float | None]) -> Candidate:
        """Returns the candidate with these thresholds of its active exits, by depth; None for one that is not used."""
        chosen = choices.thresholds.with_exits(dict(zip(choices.active_exits, thresholds, strict=True)))
        return self._pipeline.space.with_thresholds(choices, chosen)

    def _scored_on_threshold_images(self, version: DeployedCandidate) -> DeployedCandidate:
        """Returns the version with the threshold images as the images that it is scored on."""
        pipeline = self._pipeline
        images, target = pipeline.threshold_images, pipeline.target
        return DeployedCandidate(version.network, version.candidate, version.artifact, images, pipeline.runtime, target)

    def _outputs(self, all_exits: DeployedCandidate) -> ExitOutputs:
        """Returns what all exits of a version say of the threshold images."""
        images = self._pipeline.threshold_images.images
        logits = all_exits.session.all_logits(images, all_exits.target.batch)
        return ExitOutputs(logits, all_exits.artifact.confidence)

    def _problem(
        self, all_exits: DeployedCandidate, outputs: ExitOutputs, without_exits: DeployedCandidate | None
    ) -> ThresholdProblem:
        """Returns the problem: outputs of the exits on the threshold images, and the costs of leaving there.

        Args:
            all_exits: the version with all of its exits.
            outputs: what they say of the threshold images.
            without_exits: the version without exits; the difference is the cost of exits that no image takes. If None,
                it is estimated by the share of the exit heads in the FLOPs.
        """
        costs, aim_margin = self._costs(all_exits, without_exits)
        correct = outputs.correct(self._pipeline.threshold_images.labels)
        return ThresholdProblem(outputs.confidences, correct, costs, self._floor, aim_margin)

    def _costs(
        self, all_exits: DeployedCandidate, without_exits: DeployedCandidate | None
    ) -> tuple[dict[str, Cost], float]:
        """Returns the costs of leaving at each exit, in seconds and FLOPs, the one that counts first, and the margin.

        With block gates they are means over the blocks that images run, which do not depend on thresholds of exits.
        """
        has_gates = without_exits is not None and bool(without_exits.artifact.blocks)
        answers = without_exits.answers if without_exits is not None and has_gates else None
        flops = self._pipeline.flops
        stages, heads = flops.stages(all_exits, answers), flops.heads(all_exits)
        profiles = answers.profiles if answers else FIRST
        paths = self._latency.timed_paths(all_exits, profiles)
        aim_margin = margin(paths.half_width)
        added = paths.seconds[-1] * sum(heads) / sum(stages)
        if without_exits is not None:
            added = paths.seconds[-1] - self._latency.paths(without_exits, profiles)[0]
        # Most of the time that an exit adds is the call of one more file, so every exit adds the same.
        per_exit = [max(added, 0.0) / len(heads)] * len(heads)
        # A compiled engine runs a stage at its full batch size, however few images get there.
        starts = np.diff(paths.seconds).tolist() if self._pipeline.runtime.capabilities().compiles else ()
        seconds = Cost(paths.seconds, per_exit, self._limit("latency", 1 - aim_margin), all_exits.target.batch, starts)
        counted = Cost(tuple(np.cumsum(stages)), heads, self._limit("flops"))
        objectives = self._pipeline.study.objectives
        only_flops_count = "flops" in objectives and "latency" not in objectives
        if only_flops_count or (seconds.limit is None and counted.limit is not None):
            return {"flops": counted, "latency": seconds}, aim_margin
        return {"latency": seconds, "flops": counted}, aim_margin

    def _limit(self, metric: str, share: float = AIM) -> float | None:
        target = cost_target(self._budget, metric, self._dense, share)
        return target if np.isfinite(target) else None

    @cached_property
    def _floor(self) -> float | None:
        """The lowest accuracy within the budget, by the dense network on the threshold images, or None."""
        if not self._budget.on("accuracy"):
            return None
        pipeline = self._pipeline
        answers = pipeline.deployed(pipeline.space.dense()).answers_to(pipeline.threshold_images)
        dense = accuracy_of(answers, pipeline.target, "threshold")
        return self._budget.accuracy_floor({"accuracy": dense})
