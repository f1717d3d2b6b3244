"""Optimal brain damage: the second-order change of the loss, its curvature taken from the Fisher information."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from spaces.pruning.criteria.base import Evidence, Scores
from spaces.pruning.criteria.reduction import loss_gradients, rows, score_groups
from spaces.pruning.groups import ChannelGroup, Member

_IMAGES = 128
"""Gradients are taken of one image at a time, and so many are enough to rank channels."""


def scores(network: nn.Module, groups: Sequence[ChannelGroup], evidence: Evidence) -> Scores:
    """Returns half the Fisher diagonal times the squared weights, summed over a channel's weights.

    Source: LeCun et al., Optimal Brain Damage, 1990; Theis et al., Faster Gaze Prediction with Dense Networks and
    Fisher Pruning, 2018, for the curvature.
    """
    parameters = dict(network.named_parameters())
    some = Evidence(evidence.images[:_IMAGES], evidence.labels[:_IMAGES])
    fisher = _fisher(network, some)

    def score(member: Member) -> NDArray[np.float64] | None:
        name = f"{member.path}.weight"
        if name not in fisher:
            return None
        return np.asarray(rows(0.5 * fisher[name] * parameters[name].detach().square(), member).sum(1))

    return score_groups(groups, score)


def _fisher(network: nn.Module, evidence: Evidence) -> dict[str, Tensor]:
    """Returns the mean squared gradient of every parameter, over single images."""
    total: dict[str, Tensor] = {}
    for gradients in loss_gradients(network, evidence, 1):
        for name, gradient in gradients.items():
            total[name] = total.get(name, torch.zeros_like(gradient)) + gradient.square()
    return {name: summed / len(evidence.labels) for name, summed in total.items()}
