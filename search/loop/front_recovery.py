"""Full recovery: fine-tunes the most promising versions after the search, and measures them again."""

from collections.abc import Callable, Mapping

import optuna
from optuna.trial import FrozenTrial

from evaluators.measurement import Measurement
from search.config.budget import Budget
from search.loop.interrupts import Interrupts
from search.loop.recovery_rounds import next_training
from search.pipeline.exit_thresholds import ExitThresholdSolver
from search.pipeline.pipeline import CompressionPipeline
from search.results.evaluation import Evaluation
from search.results.pareto import Version, most_promising
from search.results.rounds import Round, rounds_of, store_rounds
from search.results.store import PROCESSOR_SECONDS, Baseline, store_recovered, versions_of, versions_of_study

RECOVERABLE = 0.05
"""Accuracy below the limit, as a share, up to which a version is recovered in full."""

Say = Callable[[str], None]


def recover_front(pipeline: CompressionPipeline, journal: optuna.Study, baseline: Baseline, say: Say) -> int:
    """Fine-tunes versions as `[recovery.final]` says and measures them again; returns the number of trainings.

    These are the most promising ones of all that keep the budget, except that their accuracy may be up to `RECOVERABLE`
    below its limit, because the search recovers with less effort. Each result is stored, so a later call resumes.

    Raises:
        DivergedError: the loss of a fine-tuning is not finite for the second time.
        KeyboardInterrupt: interrupted by the user; finished versions are stored.
    """
    final = pipeline.study.recovery.final
    latency = pipeline.references.latency_evaluator(baseline.reference_seconds)
    dense, objectives = baseline.evaluation.measurements, pipeline.study.objectives
    solver = ExitThresholdSolver(pipeline, latency, dense)
    search_seconds = _search_seconds(pipeline, journal) if final.versions else 0.0
    done = 0
    with Interrupts() as interrupts:
        while training := next_training(
            _promising(pipeline, journal, baseline), _rounds(journal), final, search_seconds, objectives
        ):
            say(f"{training}.")
            version, settings = training.version, training.settings
            with interrupts.allowed():
                evaluation = solver.evaluate(solver.resolve_again(version.evaluation.candidate, settings), (), settings)
            if _is_no_worse(evaluation, version.evaluation, pipeline.study.budget, dense):
                store_recovered(journal, version.number, evaluation)
            _note(journal, version, evaluation)
            done += 1
    return done


def _search_seconds(pipeline: CompressionPipeline, journal: optuna.Study) -> float:
    """Returns the processor time that the search took: that of weights that versions share, and that of its trials."""
    trials = map(_seconds, journal.get_trials(deepcopy=False))
    return pipeline.compressor.recovery.trained.seconds + sum(trials)


def _seconds(trial: FrozenTrial) -> float:
    lasted = trial.duration.total_seconds() if trial.duration else 0.0
    return float(trial.user_attrs.get(PROCESSOR_SECONDS, lasted))  # earlier searches did not note it


def _rounds(journal: optuna.Study) -> dict[int, list[Round]]:
    """Returns the rounds of each version; one that an earlier version recovered has had its only one."""
    recovered = {
        version.number: [Round(version.measured["accuracy"].value)]
        for version in versions_of_study(journal)
        if version.evaluation.finetune is not None and "accuracy" in version.measured
    }
    return {**recovered, **rounds_of(journal.user_attrs)}


def _note(journal: optuna.Study, version: Version, evaluation: Evaluation) -> None:
    """Adds what a training came to to the version's rounds."""
    before = rounds_of(journal.user_attrs).get(version.number, [Round(version.measured["accuracy"].value)])
    accuracy, trained = evaluation.measurements["accuracy"].value, evaluation.trained
    after = Round(accuracy, int(trained.get("images", 0)), trained.get("seconds", 0.0))
    store_rounds(journal, version.number, [*before, after])


def _is_no_worse(new: Evaluation, old: Evaluation, budget: Budget, dense: Mapping[str, Measurement]) -> bool:
    """Returns whether a version is no worse for its training: it keeps the budget now, or as many answers are right."""
    keeps = [budget.is_met(each.measurements, dense) for each in (new, old)]
    if keeps[0] != keeps[1]:
        return keeps[0]
    return new.measurements["accuracy"].value >= old.measurements["accuracy"].value


def _promising(pipeline: CompressionPipeline, journal: optuna.Study, baseline: Baseline) -> list[Version]:
    """Returns the versions that training may bring furthest, as they are by now.

    They are chosen by what the search measured at its own effort: beside one that was trained further all others would
    look worse than they are.
    """
    study, may_recover = pipeline.study, pipeline.compressor.may_recover
    recoverable = [
        version
        for version in versions_of(journal.get_trials(deepcopy=False))
        if _is_recoverable(version, study.budget, baseline) and may_recover(version.evaluation.candidate)
    ]
    present = {version.number: version for version in versions_of_study(journal)}
    chosen = most_promising(recoverable, study.objectives, study.recovery.final.versions)
    return [present[version.number] for version in chosen]


def _is_recoverable(version: Version, budget: Budget, baseline: Baseline) -> bool:
    dense, measured = baseline.evaluation.measurements, version.measured
    if not version.is_complete or not budget.without("accuracy").is_met(measured, dense):
        return False
    floor = budget.accuracy_floor(dense)
    return floor is None or measured["accuracy"].value >= floor - RECOVERABLE
