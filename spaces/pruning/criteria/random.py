"""Random scores, the baseline for all criteria."""

import zlib
from collections.abc import Sequence

import numpy as np
from torch import nn

from spaces.pruning.criteria.base import Evidence, Scores
from spaces.pruning.criteria.reduction import normalized
from spaces.pruning.groups import ChannelGroup


def scores(_network: nn.Module, groups: Sequence[ChannelGroup], _evidence: Evidence, /) -> Scores:
    """Returns uniform random scores, the same ones for the same groups."""
    return {
        group.name: normalized(np.random.default_rng(zlib.crc32(group.name.encode())).random(group.channels))
        for group in groups
    }
