"""Errors of the models on the sampler's own proposals: predicted before, measured after.

Proposals are where models are most optimistic, so errors there are larger than on trials held out at random.
"""

from collections.abc import Sequence

import numpy as np
from optuna.trial import FrozenTrial

from search.samplers.hypervolume.encoding import Array, Codec
from search.samplers.hypervolume.gaussian_process import HeldOutErrors, held_out_errors
from search.samplers.hypervolume.models import Posteriors
from search.samplers.hypervolume.observations import Observations
from search.samplers.hypervolume.proposals import expected_costs, row_key

_LAST = 20
"""The number of latest proposals from which current errors are estimated."""
_FEWEST = 4
"""With fewer proposals, the models' own uncertainty is taken as it is."""
_FEWEST_SHOWN = 3


def prediction_errors(
    trials: Sequence[FrozenTrial], observations: Observations, codec: Codec
) -> dict[int, HeldOutErrors]:
    """Returns the errors of predictions made before the proposals were measured, by the index of the objective.

    Args:
        trials: of the study.
        observations: what was measured of them.
        codec: of the space.
    """
    return {
        objective: held_out_errors("before measuring", *pairs.T)
        for objective, pairs in enumerate(predicted_and_measured(trials, observations, codec))
        if len(pairs) >= _FEWEST_SHOWN
    }


def predicted_and_measured(trials: Sequence[FrozenTrial], observations: Observations, codec: Codec) -> list[Array]:
    """Returns for each objective the predicted and the measured costs of proposals, `(n, 2)`.

    Args:
        trials: of the study, in order.
        observations: what was measured of them.
        codec: of the space.
    """
    measured = {row_key(row): costs for row, costs in zip(observations.rows, observations.costs, strict=True)}
    pairs_of: list[list[tuple[float, float]]] = [[] for _ in observations.costs.T]
    for trial in trials:
        expected = expected_costs(trial)
        if not expected or not all(name in trial.params for name in codec.names):
            continue
        costs = measured.get(row_key(codec.encode([trial.params])[0]))
        for objective, cost in enumerate(expected):
            if costs is not None and not np.isnan(costs[objective]):
                pairs_of[objective].append((cost, float(costs[objective])))
    return [np.array(pairs).reshape(-1, 2) for pairs in pairs_of]


def recent_bias_and_std(pairs_of: Sequence[Array], posteriors: Posteriors) -> Array:
    """Returns by how much the last measurements were worse than predicted, transformed: mean and deviation, `(2, m)`.

    Proposals that were better than predicted make no proposal look safer, so the mean is at least 0.

    Args:
        pairs_of: predicted and measured costs of proposals, in order, `(n, 2)` for each objective.
        posteriors: have the transformation of costs.
    """
    bias_and_std = np.zeros((2, len(pairs_of)))
    for objective, (pairs, posterior) in enumerate(zip(pairs_of, posteriors.objectives, strict=True)):
        if len(pairs) >= _FEWEST:
            predicted, measured = posterior.transform.forward(pairs[-_LAST:].T)
            errors = measured - predicted
            bias_and_std[:, objective] = max(float(errors.mean()), 0.0), float(errors.std())
    return bias_and_std
