"""The interface of an importance criterion."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from spaces.pruning.groups import ChannelGroup

Floats = NDArray[np.float64]

Scores = dict[str, Floats]
"""Scores of each group's channels, `(channels,)`, by the group's name; their mean is 1, more is more important."""


@dataclass(frozen=True)
class Evidence:
    """Calibration images `(n, c, h, w)` and their classes `(n,)`, for criteria that use data."""

    images: Tensor
    labels: Tensor


class Criterion(Protocol):
    '''A function that scores the channels of every group, with a line in `spaces.pruning.criteria.CRITERIA`.

    The example is the whole file of a criterion that uses weights only; `taylor` and `hrank` also use images.

    Example:
        """Magnitude: the largest absolute weight."""

        import numpy as np

        from spaces.pruning.criteria.base import Floats
        from spaces.pruning.criteria.reduction import of_weights


        def largest(filters: Floats) -> Floats:
            """Returns the largest absolute weight of each channel, `(channels,)`, from all of them."""
            return np.asarray(np.abs(filters).max(axis=1))


        scores = of_weights(largest)
    '''

    def __call__(self, network: nn.Module, groups: Sequence[ChannelGroup], evidence: Evidence, /) -> Scores:
        """Returns a score for every channel of every group.

        Args:
            network: the dense network in evaluation mode; it returns a tuple of logits.
            groups: its dependency groups.
            evidence: images and labels, for criteria that use data.
        """
        ...
