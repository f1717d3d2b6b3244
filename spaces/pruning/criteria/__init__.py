"""Which channels of a group matter: one criterion a file, one line each in the table."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from spaces.errors import UserError
from spaces.pruning.groups import ChannelGroup

Scores = dict[str, NDArray[np.float64]]
"""One score per channel, `(channels,)`, for each group by name; the mean of a group is 1, more is more important."""

CRITERIA: Mapping[str, str] = {
    "l1": "spaces.pruning.criteria.l1:scores",
    "l2": "spaces.pruning.criteria.l2:scores",
    "fpgm": "spaces.pruning.criteria.fpgm:scores",
    "bn_scale": "spaces.pruning.criteria.bn_scale:scores",
    "taylor": "spaces.pruning.criteria.taylor:scores",
    "hrank": "spaces.pruning.criteria.hrank:scores",
    "obd": "spaces.pruning.criteria.obd:scores",
    "random": "spaces.pruning.criteria.random:scores",
}
"""Every criterion, by the name that a study gives it; loaded when asked for."""


class CriterionError(UserError):
    """A criterion that does not exist."""


@dataclass(frozen=True)
class Evidence:
    """Calibration images `(n, c, h, w)` and their classes `(n,)`, for criteria that look at data."""

    images: Tensor
    labels: Tensor


class Criterion(Protocol):
    """Scores the channels of every group."""

    def __call__(self, network: nn.Module, groups: Sequence[ChannelGroup], evidence: Evidence) -> Scores:
        """Returns a score for every channel of every group.

        Args:
            network: the dense network in evaluation mode; it returns a tuple of logits.
            groups: its dependency groups.
            evidence: used by criteria that need data.
        """
        ...


def criterion(name: str) -> Criterion:
    """Returns the criterion called `name`.

    Raises:
        CriterionError: there is none.
    """
    if name not in CRITERIA:
        raise CriterionError(f"a criterion is one of {', '.join(CRITERIA)}, got {name!r}; see [space] criterion")
    module, _, attribute = CRITERIA[name].partition(":")
    found: Criterion = getattr(importlib.import_module(module), attribute)
    return found
