"""Redundancy: the distance of a filter from all others of its layer."""

import numpy as np
from scipy.spatial.distance import cdist

from spaces.pruning.criteria.base import Floats
from spaces.pruning.criteria.reduction import of_weights


def distances(filters: Floats) -> Floats:
    """Returns the sum of the Euclidean distances of each channel's weights to those of all others, `(channels,)`.

    A filter near the geometric median is most easily replaced by the others.
    Source: He et al., Filter Pruning via Geometric Median, 2019.
    """
    return np.asarray(cdist(filters, filters).sum(axis=1))


scores = of_weights(distances)
