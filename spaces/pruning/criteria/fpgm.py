"""Redundancy: how far a filter lies from all the others of its layer."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from torch import nn

from spaces.pruning.criteria.base import Evidence, Scores
from spaces.pruning.criteria.reduction import rows, score_groups, weight_of
from spaces.pruning.groups import ChannelGroup, Member


def scores(network: nn.Module, groups: Sequence[ChannelGroup], evidence: Evidence) -> Scores:  # noqa: ARG001
    """Returns the sum of the Euclidean distances between a channel's weights and every other channel's.

    A filter near the geometric median is the easiest to replace by the rest.
    Source: He et al., Filter Pruning via Geometric Median, 2019.
    """
    modules = dict(network.named_modules())

    def distance(member: Member) -> NDArray[np.float64] | None:
        weight = weight_of(modules, member)
        if weight is None:
            return None
        filters = rows(weight, member)
        return np.asarray(cdist(filters, filters).sum(1))

    return score_groups(groups, distance)
