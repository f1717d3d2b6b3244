"""What a criterion is given, and what it returns."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from spaces.pruning.groups import ChannelGroup

Scores = dict[str, NDArray[np.float64]]
"""One score per channel, `(channels,)`, for each group by name; the mean of a group is 1, more is more important."""


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
