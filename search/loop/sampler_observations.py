"""Reads a sampler's observations from the trials of a journal, versions that broke a limit included."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from search.config.objectives import Objectives
from search.samplers.hypervolume.observations import TrialObservation


def observe_evaluations(trials: Sequence[FrozenTrial], objectives: Objectives) -> list[TrialObservation]:
    """Returns the measurements of each trial of a search; of a duplicate those of the earlier trial.

    Optuna has no values of a trial that broke a limit, but its attributes have those that were measured or estimated.

    Args:
        trials: of the search, in any state.
        objectives: that it has.
    """
    evaluations = {trial.number: trial.user_attrs["evaluation"] for trial in trials if "evaluation" in trial.user_attrs}
    earlier = [evaluations.get(trial.user_attrs.get("duplicate_of", -1), {}) for trial in trials]
    return [
        _observation(trial, trial.user_attrs.get("evaluation") or same, objectives)
        for trial, same in zip(trials, earlier, strict=True)
    ]


def _observation(trial: FrozenTrial, evaluation: Mapping[str, Any], objectives: Objectives) -> TrialObservation:
    measured = evaluation.get("measurements", {})
    values = [measured.get(metric, {}).get("value", np.nan) for metric in objectives]
    if trial.state == TrialState.COMPLETE:
        values = trial.values
    thresholds = evaluation.get("gates") or {}
    if "ways" not in thresholds:  # not solved, or written by a version that did not store costs of paths
        return TrialObservation(values)
    paths = thresholds["ways"]
    costs = {index: paths[metric] for index, metric in enumerate(objectives) if metric in paths}
    return TrialObservation(values, thresholds["shares"], costs)
