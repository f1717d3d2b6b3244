"""What the journal's trials tell a sampler: all that was measured, of versions that broke a limit as well."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from search.results.pareto import OBJECTIVES
from search.samplers.hypervolume.observations import TrialObservation


def observe_evaluations(trials: Sequence[FrozenTrial]) -> list[TrialObservation]:
    """Returns what was measured in each trial of a search; in one of a known version, what was measured before.

    A trial that broke a limit has no values in the journal, and yet some were measured or estimated.

    Args:
        trials: of the search, in any state.
    """
    evaluations = {trial.number: trial.user_attrs["evaluation"] for trial in trials if "evaluation" in trial.user_attrs}
    return [
        _observation(
            trial, trial.user_attrs.get("evaluation") or evaluations.get(trial.user_attrs.get("duplicate_of", -1), {})
        )
        for trial in trials
    ]


def _observation(trial: FrozenTrial, evaluation: Mapping[str, Any]) -> TrialObservation:
    measured = evaluation.get("measurements", {})
    values = [measured.get(metric, {}).get("value", np.nan) for metric in OBJECTIVES]
    if trial.state == TrialState.COMPLETE:
        values = trial.values
    solved = evaluation.get("gates") or {}
    if "ways" not in solved:  # no thresholds were solved, or before the journal held what each path costs
        return TrialObservation(values)
    costs = {index: solved["ways"][metric] for index, metric in enumerate(OBJECTIVES) if metric in solved["ways"]}
    return TrialObservation(values, solved["shares"], costs)
