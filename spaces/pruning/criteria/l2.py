"""Magnitude: the Euclidean norm of the weights."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import nn

from spaces.pruning.criteria.base import Evidence, Scores
from spaces.pruning.criteria.reduction import rows, score_groups, weight_of
from spaces.pruning.groups import ChannelGroup, Member


def scores(network: nn.Module, groups: Sequence[ChannelGroup], evidence: Evidence) -> Scores:  # noqa: ARG001
    """Returns the L2 norm of each channel's weights.

    Source: Li et al., Pruning Filters for Efficient ConvNets, 2017, with L2 as in He et al., Soft Filter Pruning, 2018.
    """
    modules = dict(network.named_modules())

    def norm(member: Member) -> NDArray[np.float64] | None:
        weight = weight_of(modules, member)
        return None if weight is None else np.asarray(np.sqrt(np.square(rows(weight, member)).sum(1)))

    return score_groups(groups, norm)
