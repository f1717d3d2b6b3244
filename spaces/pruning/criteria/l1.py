"""Magnitude: the sum of absolute weights."""

import numpy as np

from spaces.pruning.criteria.base import Floats
from spaces.pruning.criteria.reduction import of_weights


def norm(filters: Floats) -> Floats:
    """Returns the L1 norm `(channels,)` of each channel's weights.

    Source: Li et al., Pruning Filters for Efficient ConvNets, 2017.
    """
    return np.asarray(np.abs(filters).sum(axis=1))


scores = of_weights(norm)
