"""The first-order change of the loss if a channel were removed."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from spaces.pruning.criteria.base import Evidence, Scores
from spaces.pruning.criteria.reduction import by_channel, loss_gradients, score_groups
from spaces.pruning.groups import ChannelGroup, Member

_BATCH = 16


def scores(network: nn.Module, groups: Sequence[ChannelGroup], evidence: Evidence) -> Scores:
    """Returns the squared first-order change of the loss, averaged over batches of calibration images.

    A channel's change is the sum of gradient times value over its weights; for batch norm, over its scale and shift.
    Source: Molchanov et al., Importance Estimation for Neural Network Pruning, 2019.
    """
    parameters = dict(network.named_parameters())
    squares: dict[int, list[NDArray[np.float64]]] = defaultdict(list)
    members = [member for group in groups for member in group.members]
    for gradients in loss_gradients(network, evidence, _BATCH):
        for member in members:
            change = _change(member, parameters, gradients)
            if change is not None:
                squares[id(member)].append(np.square(change))

    def score(member: Member) -> NDArray[np.float64] | None:
        changes = squares.get(id(member))  # by id, because one axis of a layer may have channels of several groups
        return np.asarray(np.mean(changes, axis=0)) if changes else None

    return score_groups(groups, score)


def _change(
    member: Member, parameters: dict[str, nn.Parameter], gradients: dict[str, Tensor]
) -> NDArray[np.float64] | None:
    """Returns the first-order change of the loss for each channel, `(channels,)`; None without gradients."""
    names = [name for name in (f"{member.path}.weight", f"{member.path}.bias") if name in gradients]
    if member.axis == "in":
        names = names[:1]  # a bias belongs to the outputs
    changes = [by_channel(parameters[name] * gradients[name], member).sum(1) for name in names]
    return np.asarray(np.sum(changes, axis=0)) if changes else None
