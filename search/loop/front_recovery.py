"""The most promising versions, recovered in full and measured again, once the search has ended."""

from collections.abc import Callable

import optuna

from search.config.budget import Budget
from search.config.study import FinetuneSection
from search.loop.interrupts import Interrupts
from search.pipeline.exit_thresholds import ExitThresholdSolver
from search.pipeline.pipeline import CompressionPipeline
from search.results.pareto import Version, pareto
from search.results.store import Baseline, store_recovered, versions_of_study

RECOVERABLE = 0.05
"""So much accuracy below the budget's limit may be won back: a version that lacks more is not tried."""

Say = Callable[[str], None]


def recover_front(pipeline: CompressionPipeline, journal: optuna.Study, baseline: Baseline, say: Say) -> int:
    """Fine-tunes versions as `[recovery.final]` says and measures them again; returns how many were.

    These are the ones on the front of all that keep the budget in everything but accuracy, and in that almost: the
    search measured them at an effort that leaves some to be won. The most accurate come first. What a version gains may
    push others off the front, so the front is drawn anew after each. What is done is kept; the same call goes on.

    Raises:
        DivergedError: a fine-tuning's loss is not finite for the second time.
        KeyboardInterrupt: the user has had enough; each version that was done is kept.
    """
    final = pipeline.study.recovery.final
    if final is None:
        return 0
    settings = FinetuneSection.model_validate(final.model_dump(exclude={"versions"}))
    latency = pipeline.references.latency_evaluator(baseline.reference_seconds)
    solver = ExitThresholdSolver(pipeline, latency, baseline.evaluation.measurements)
    done = 0
    with Interrupts() as interrupts:
        while waiting := _waiting(pipeline, journal, baseline, final.versions):
            say(f"Recovering trial {waiting[0].number} in full; {len(waiting)} versions wait.")
            candidate = waiting[0].evaluation.candidate
            with interrupts.allowed():
                evaluation = solver.evaluate(solver.resolve_again(candidate, settings), (), settings)
            store_recovered(journal, waiting[0].number, evaluation)
            done += 1
    return done


def _waiting(pipeline: CompressionPipeline, journal: optuna.Study, baseline: Baseline, most: int) -> list[Version]:
    """Returns the versions that are to be recovered and have not been, of `most` in all."""
    versions = versions_of_study(journal)
    already = sum(version.evaluation.finetune is not None for version in versions)
    front = pareto([version for version in versions if _is_within_reach(version, pipeline.study.budget, baseline)])
    waiting = [
        version
        for version in front
        if version.evaluation.finetune is None and pipeline.compressor.may_recover(version.evaluation.candidate)
    ]
    return waiting[: max(most - already, 0)]


def _is_within_reach(version: Version, budget: Budget, baseline: Baseline) -> bool:
    dense, measured = baseline.evaluation.measurements, version.measured
    if not version.is_complete or not budget.without("accuracy").is_met(measured, dense):
        return False
    floor = budget.accuracy_floor(dense)
    return floor is None or measured["accuracy"].value >= floor - RECOVERABLE
