"""What was expected of proposals before anyone measured them, and how far off that was."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from optuna.trial import FrozenTrial

from search.samplers.hypervolume.encoding import Array, Codec
from search.samplers.hypervolume.gaussian_process import HeldOut, held_out
from search.samplers.hypervolume.models import Beliefs
from search.samplers.hypervolume.observations import Observed

PROPOSAL = "front:proposal"
"""The system attribute of a trial that says what proposed it, and what was expected of it."""
_LAST, _FEWEST = 20, 4
"""So many of the last proposals tell how far off surrogates are of what they propose, where there are some."""


def origins(trials: Sequence[FrozenTrial]) -> Counter[str]:
    """Returns how many trials were proposed in each way."""
    return Counter(trial.system_attrs[PROPOSAL]["origin"] for trial in trials if PROPOSAL in trial.system_attrs)


def foresight(trials: Sequence[FrozenTrial], observed: Observed, codec: Codec) -> dict[str, HeldOut]:
    """Returns how well proposals were told before anyone measured them, by objective.

    They are where surrogates are most hopeful, so they are wrong there more often than on what is left out at random.
    """
    return {
        f"objective {place}": held_out("before measuring", *each.T)
        for place, each in enumerate(foretold(trials, observed, codec))
        if len(each) > 2
    }


def foretold(trials: Sequence[FrozenTrial], observed: Observed, codec: Codec) -> list[Array]:
    """Returns for each objective the costs that were expected of proposals and those that were measured, `(n, 2)`."""
    measured = {key_of(row): costs for row, costs in zip(observed.rows, observed.costs, strict=True)}
    pairs: list[list[tuple[float, float]]] = [[] for _ in observed.costs.T]
    for trial in trials:
        expected = trial.system_attrs.get(PROPOSAL, {}).get("costs")
        if not expected or not all(name in trial.params for name in codec.names):
            continue
        costs = measured.get(key_of(codec.encode([trial.params])[0]))
        for place, told in enumerate(expected):
            if costs is not None and not np.isnan(costs[place]):
                pairs[place].append((told, float(costs[place])))
    return [np.array(each).reshape(-1, 2) for each in pairs]


def missed_by(pairs_of: Sequence[Array], beliefs: Beliefs) -> Array:
    """Returns by how much the last proposals were worse than they were told, mean and deviation, on the scales."""
    missed = np.zeros((2, len(pairs_of)))
    for place, (pairs, belief) in enumerate(zip(pairs_of, beliefs.objectives, strict=True)):
        if len(pairs) >= _FEWEST:
            told, measured = belief.scale.forward(pairs[-_LAST:].T)
            missed[:, place] = max(float((measured - told).mean()), 0.0), float((measured - told).std())
    return missed


def key_of(row: Array) -> bytes:
    """Returns what tells a row from others."""
    return np.round(row, 6).tobytes()
