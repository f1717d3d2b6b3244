"""What a sampler proposed, and what it expected of it: kept with each trial, for those who read the study later."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial

from search.samplers.hypervolume.encoding import Array

RANDOM = "random"
MODELS = "surrogate"
"""Proposed by models."""
EXPLORATION = "exploration"
"""A mutated row, in addition to those that models propose."""
EVOLUTION_ALONE = "evolution"
"""A changed row where models are uninformative."""
_ATTRIBUTE = "front:proposal"
"""The system attribute of a trial that holds its proposal; journals have it under the sampler's first name."""


@dataclass(frozen=True)
class Proposal:
    """A row to try next.

    Args:
        row: `(d,)`.
        origin: what proposes it.
        costs: that are expected of it, `m` of them; none without models.
    """

    row: Array
    origin: str
    costs: tuple[float, ...] = ()


def keep_proposal(study: optuna.Study, trial: FrozenTrial, proposal: Proposal) -> None:
    """Writes into a trial that is being sampled what proposes it.

    Optuna has no public way for that: a sampler is given a frozen trial, and user attributes are the user's. Its own
    samplers, `NSGAIISampler` for one, write as is done here.
    """
    content: Any = {"origin": proposal.origin, "costs": list(proposal.costs)}
    study._storage.set_trial_system_attr(trial._trial_id, _ATTRIBUTE, content)


def origins(trials: Sequence[FrozenTrial]) -> Counter[str]:
    """Returns how many trials each origin proposed."""
    return Counter(trial.system_attrs[_ATTRIBUTE]["origin"] for trial in trials if _ATTRIBUTE in trial.system_attrs)


def expected_costs(trial: FrozenTrial) -> Sequence[float]:
    """Returns the costs that were expected of a trial when it was proposed, `m` of them; none without models."""
    costs: Sequence[float] = trial.system_attrs.get(_ATTRIBUTE, {}).get("costs", ())
    return costs


def untried(rows: Array, tried: Sequence[Array] | Array) -> Array:
    """Returns the rows `(n, d)` that were not tried, in their order, each once, `(k, d)`."""
    seen = {row_key(row) for row in tried}
    indices = []
    for index, row in enumerate(rows):
        if row_key(row) not in seen:
            seen.add(row_key(row))
            indices.append(index)
    return rows[np.array(indices, dtype=np.int64)]


def untried_or_last(rows: Array, tried: Sequence[Array] | Array) -> Array:
    """Returns the rows `(n, d)` that were not tried; where all were, the last one: something has to be proposed."""
    fresh = untried(rows, tried)
    return fresh if len(fresh) else rows[-1:]


def row_key(row: Array) -> bytes:
    """Returns what tells a row `(d,)` from others."""
    return np.round(row, 6).tobytes()
