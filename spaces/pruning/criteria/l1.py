"""Magnitude: the sum of absolute weights."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import nn

from spaces.pruning.criteria.base import Evidence, Scores
from spaces.pruning.criteria.reduction import rows, score_groups, weight_of
from spaces.pruning.groups import ChannelGroup, Member


def scores(network: nn.Module, groups: Sequence[ChannelGroup], evidence: Evidence) -> Scores:  # noqa: ARG001
    """Returns the L1 norm of each channel's weights.

    Source: Li et al., Pruning Filters for Efficient ConvNets, 2017.
    """
    modules = dict(network.named_modules())

    def norm(member: Member) -> NDArray[np.float64] | None:
        weight = weight_of(modules, member)
        return None if weight is None else np.asarray(np.abs(rows(weight, member)).sum(1))

    return score_groups(groups, norm)
