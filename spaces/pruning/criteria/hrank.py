"""The matrix rank of a channel's feature maps, a measure of their information."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from spaces.pruning.criteria.base import Evidence, Scores
from spaces.pruning.criteria.l2 import scores as l2_scores
from spaces.pruning.criteria.reduction import score_groups
from spaces.pruning.groups import ChannelGroup, Member

_IMAGES = 256
_BATCH = 32


def scores(network: nn.Module, groups: Sequence[ChannelGroup], evidence: Evidence) -> Scores:
    """Returns the mean rank of each channel's feature maps, after batch norm and ReLU, over calibration images.

    Maps of a few pixels have few different ranks, so many channels have equal scores there. A group without feature
    maps (linear layers only) is scored by its L2 norms.
    Source: Lin et al., HRank, 2020.
    """
    paths = {member.path for group in groups for member in _map_members(network, group)}
    ranks = _mean_ranks(network, sorted(paths), evidence.images[:_IMAGES])
    groups_with_maps = [group for group in groups if _map_members(network, group)]

    def score(member: Member) -> NDArray[np.float64] | None:
        return np.asarray(ranks[member.path][member.positions].sum(1)) if member.path in ranks else None

    return l2_scores(network, groups, evidence) | score_groups(groups_with_maps, score)


def _map_members(network: nn.Module, group: ChannelGroup) -> list[Member]:
    """Returns the layers whose outputs are a group's feature maps: its batch norms, or convolutions if it has none."""
    out = [(member, network.get_submodule(member.path)) for member in group.members if member.axis == "out"]
    norms = [member for member, module in out if isinstance(module, nn.BatchNorm2d)]
    return norms or [member for member, module in out if isinstance(module, nn.Conv2d)]


def _mean_ranks(network: nn.Module, paths: Sequence[str], images: Tensor) -> dict[str, NDArray[np.float64]]:
    """Returns the mean rank of each output channel of some layers, `(channels,)`, by path."""
    totals: dict[str, NDArray[np.float64]] = {}

    def add(path: str, maps: Tensor) -> None:
        ranks = torch.linalg.matrix_rank(maps.relu()).double().sum(0).numpy()
        totals[path] = totals.get(path, np.zeros_like(ranks)) + ranks

    hooks = [
        network.get_submodule(path).register_forward_hook(lambda _module, _args, out, path=path: add(path, out))
        for path in paths
    ]
    try:
        with torch.no_grad():
            for batch in images.split(_BATCH):
                network(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {path: total / len(images) for path, total in totals.items()}
