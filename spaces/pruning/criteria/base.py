"""What a criterion is given, and what it returns."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from spaces.pruning.groups import ChannelGroup

Floats = NDArray[np.float64]

Scores = dict[str, Floats]
"""One score per channel, `(channels,)`, for each group by name; the mean of a group is 1, more is more important."""


@dataclass(frozen=True)
class Evidence:
    """Calibration images `(n, c, h, w)` and their classes `(n,)`, for criteria that look at data."""

    images: Tensor
    labels: Tensor


class Criterion(Protocol):
    '''Scores the channels of every group: a function, named by a line of `spaces.pruning.criteria.CRITERIA`.

    One that looks at weights alone needs no more than this file; `taylor` and `hrank` look at images.

    Example:
        """Magnitude: the largest absolute weight."""

        import numpy as np

        from spaces.pruning.criteria.base import Floats
        from spaces.pruning.criteria.reduction import of_weights


        def largest(filters: Floats) -> Floats:
            """Returns the largest absolute weight `(channels,)` of each channel, from all of them."""
            return np.asarray(np.abs(filters).max(axis=1))


        scores = of_weights(largest)
    '''

    def __call__(self, network: nn.Module, groups: Sequence[ChannelGroup], evidence: Evidence, /) -> Scores:
        """Returns a score for every channel of every group.

        Args:
            network: the dense network in evaluation mode; it returns a tuple of logits.
            groups: its dependency groups.
            evidence: used by criteria that need data.
        """
        ...
