"""The front's versions, recovered in full and measured again, once the search has ended."""

from collections.abc import Callable

import optuna

from search.front import Version, feasible, pareto
from search.interrupts import Interrupts
from search.store import Baseline, keep_recovered, versions_of_study
from search.workbench import Workbench

Say = Callable[[str], None]


def recover_front(bench: Workbench, stored: optuna.Study, baseline: Baseline, say: Say) -> int:
    """Fine-tunes every pruned version of the front as `[recovery.final]` says; returns how many were.

    A version that gains may push others off the front and let none in, but its own gain is only known afterwards: so
    this goes on until the front has nothing left to recover. What is done is kept; the same call goes on from there.

    Raises:
        DivergedError: a fine-tuning's loss is not finite for the second time.
        KeyboardInterrupt: the user has had enough; each version that was done is kept.
    """
    settings = bench.study.recovery.final
    if settings is None:
        return 0
    latency = bench.latency_evaluator(baseline.reference_seconds)
    done = 0
    with Interrupts() as interrupts:
        while waiting := _waiting(bench, stored, baseline):
            version = waiting[0]
            say(f"Recovering trial {version.number} in full; {len(waiting)} of the front wait.")
            with interrupts.allowed():
                evaluation = bench.evaluate(version.evaluation.candidate, latency, lambda _measured: False, settings)
            keep_recovered(stored, version.number, evaluation)
            done += 1
    return done


def _waiting(bench: Workbench, stored: optuna.Study, baseline: Baseline) -> list[Version]:
    """Returns the pruned versions of the front that have not been recovered yet."""
    dense = baseline.evaluation.measurements
    front = pareto(feasible(versions_of_study(stored), bench.study.limits, dense))
    return [
        version
        for version in front
        if version.evaluation.finetune is None and bench.is_pruned(version.evaluation.candidate)
    ]
