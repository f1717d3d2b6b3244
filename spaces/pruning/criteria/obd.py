"""Optimal brain damage: the second-order change of the loss, with the Fisher information as its curvature."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from spaces.pruning.criteria.base import Evidence, Scores
from spaces.pruning.criteria.reduction import by_channel, loss_gradients, score_groups
from spaces.pruning.groups import ChannelGroup, Member

_IMAGES = 128
"""The number of images, enough to rank channels; gradients are computed one image at a time."""


def scores(network: nn.Module, groups: Sequence[ChannelGroup], evidence: Evidence) -> Scores:
    """Returns half the Fisher diagonal times the squared weights, summed over a channel's weights.

    Source: LeCun et al., Optimal Brain Damage, 1990; Theis et al., Faster Gaze Prediction with Dense Networks and
    Fisher Pruning, 2018, for the curvature.
    """
    parameters = dict(network.named_parameters())
    fisher = _fisher(network, Evidence(evidence.images[:_IMAGES], evidence.labels[:_IMAGES]))

    def score(member: Member) -> NDArray[np.float64] | None:
        name = f"{member.path}.weight"
        if name not in fisher:
            return None
        return np.asarray(by_channel(0.5 * fisher[name] * parameters[name].detach().square(), member).sum(1))

    return score_groups(groups, score)


def _fisher(network: nn.Module, evidence: Evidence) -> dict[str, Tensor]:
    """Returns the diagonal of the Fisher information: the mean over images of each parameter's squared gradient."""
    total: dict[str, Tensor] = {}
    for gradients in loss_gradients(network, evidence, 1):
        for name, gradient in gradients.items():
            total[name] = total.get(name, torch.zeros_like(gradient)) + gradient.square()
    return {name: summed / len(evidence.labels) for name, summed in total.items()}
