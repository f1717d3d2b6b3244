"""Redundancy: how far a filter lies from all the others of its layer."""

import numpy as np
from scipy.spatial.distance import cdist

from spaces.pruning.criteria.base import Floats
from spaces.pruning.criteria.reduction import of_weights


def distances(filters: Floats) -> Floats:
    """Returns the sum of the Euclidean distances `(channels,)` between a channel's weights and every other channel's.

    A filter near the geometric median is the easiest to replace by the rest.
    Source: He et al., Filter Pruning via Geometric Median, 2019.
    """
    return np.asarray(cdist(filters, filters).sum(axis=1))


scores = of_weights(distances)
