"""The absolute scale of a channel's batch normalisation."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from spaces.pruning.criteria.base import Evidence, Scores
from spaces.pruning.criteria.l2 import scores as l2_scores
from spaces.pruning.criteria.reduction import by_channel, score_groups
from spaces.pruning.groups import ChannelGroup, Member


def scores(network: nn.Module, groups: Sequence[ChannelGroup], evidence: Evidence) -> Scores:
    """Returns the absolute scale of each channel's batch norms; a group without any is scored by its L2 norms.

    Source: Liu et al., Network Slimming, 2017.
    """
    modules = dict(network.named_modules())

    def scale(member: Member) -> NDArray[np.float64] | None:
        module = modules[member.path]
        is_norm = isinstance(module, _BatchNorm) and module.affine
        return np.asarray(np.abs(by_channel(module.weight, member)).sum(1)) if is_norm else None

    normed = [group for group in groups if any(scale(member) is not None for member in group.members)]
    return l2_scores(network, groups, evidence) | score_groups(normed, scale)
