"""Magnitude: the Euclidean norm of the weights."""

import numpy as np

from spaces.pruning.criteria.base import Floats
from spaces.pruning.criteria.reduction import of_weights


def norm(filters: Floats) -> Floats:
    """Returns the L2 norm `(channels,)` of each channel's weights.

    Source: Li et al., Pruning Filters for Efficient ConvNets, 2017, with L2 as in He et al., Soft Filter Pruning, 2018.
    """
    return np.asarray(np.sqrt(np.square(filters).sum(axis=1)))


scores = of_weights(norm)
