"""Full recovery: fine-tunes the most promising versions after the search, and measures them again."""

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
"""Accuracy below the limit, as a share, up to which a version is recovered in full."""

Say = Callable[[str], None]


def recover_front(pipeline: CompressionPipeline, journal: optuna.Study, baseline: Baseline, say: Say) -> int:
    """Fine-tunes versions as `[recovery.final]` says and measures them again; returns their number.

    These are the front of all versions that keep the budget, except that their accuracy may be up to `RECOVERABLE`
    below its limit, because the search recovers with less effort. The most accurate come first. A recovered version may
    dominate others, so the front is computed anew after each. Each result is stored, so a later call resumes.

    Raises:
        DivergedError: the loss of a fine-tuning is not finite for the second time.
        KeyboardInterrupt: interrupted by the user; finished versions are stored.
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
    """Returns the versions still to be recovered, of `most` in all."""
    versions = versions_of_study(journal)
    recovered = sum(version.evaluation.finetune is not None for version in versions)
    recoverable = [version for version in versions if _is_recoverable(version, pipeline.study.budget, baseline)]
    front = pareto(recoverable, pipeline.study.objectives)
    waiting = [
        version
        for version in front
        if version.evaluation.finetune is None and pipeline.compressor.may_recover(version.evaluation.candidate)
    ]
    return waiting[: max(most - recovered, 0)]


def _is_recoverable(version: Version, budget: Budget, baseline: Baseline) -> bool:
    dense, measured = baseline.evaluation.measurements, version.measured
    if not version.is_complete or not budget.without("accuracy").is_met(measured, dense):
        return False
    floor = budget.accuracy_floor(dense)
    return floor is None or measured["accuracy"].value >= floor - RECOVERABLE
