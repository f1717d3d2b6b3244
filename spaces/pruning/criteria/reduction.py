"""Reduces the scores of single layers to scores of groups; every layer of a group has the same weight."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spaces.dynamic.exit_network import ExitNetwork
from spaces.pruning.criteria.base import Criterion, Evidence, Floats, Scores
from spaces.pruning.groups import ChannelGroup, Member

_TINY = float(np.finfo(np.float64).tiny)


def score_groups(groups: Sequence[ChannelGroup], score_member: Callable[[Member], Floats | None]) -> Scores:
    """Returns the scores of every group: the mean over its members, after dividing each member's scores by their mean.

    So no layer outweighs the others by its size or scale. Source: Fang et al., DepGraph, 2023.

    Args:
        groups: dependency groups.
        score_member: returns `(channels,)`, or None if a criterion does not apply to a member.
    """
    return {group.name: _mean_of([score_member(member) for member in group.members], group) for group in groups}


def of_weights(score: Callable[[Floats], Floats]) -> Criterion:
    """Returns the criterion that scores channels by the weights of convolutions and linear layers only.

    Args:
        score: returns the scores `(channels,)` of one layer from the weights of each channel, `(channels, weights)`.
    """

    def scores(network: nn.Module, groups: Sequence[ChannelGroup], _evidence: Evidence, /) -> Scores:
        modules = dict(network.named_modules())

        def of_member(member: Member) -> Floats | None:
            weight = weight_of(modules, member)
            return None if weight is None else score(by_channel(weight, member))

        return score_groups(groups, of_member)

    return scores


def _mean_of(member_scores: Sequence[Floats | None], group: ChannelGroup) -> Floats:
    """Returns the mean of the members' scores, `(channels,)`; all ones if no member has scores."""
    scores = [normalized(score) for score in member_scores if score is not None]
    return normalized(np.mean(scores, axis=0)) if scores else np.ones(group.channels)


def normalized(scores: Floats) -> Floats:
    """Returns scores divided by their mean; all ones if every score is 0."""
    mean = float(scores.mean())
    return scores / mean if mean > _TINY else np.ones_like(scores)


def by_channel(value: Tensor, member: Member) -> Floats:
    """Returns the values that belong to each channel of a group, `(channels, values)`.

    Args:
        value: a tensor of the shape of the layer's weight or bias.
        member: the layer, and its axis and positions in the group.
    """
    weight = value.detach().double()
    flat = (weight if member.axis == "out" or weight.ndim == 1 else weight.transpose(0, 1)).flatten(
        1 if weight.ndim > 1 else 0
    )
    array = flat.reshape(len(flat), -1).numpy()
    return np.asarray(array[member.positions].reshape(len(member.positions), -1))


def weight_of(modules: Mapping[str, nn.Module], member: Member) -> Tensor | None:
    """Returns the weight of a convolution or linear layer; None for a batch norm."""
    module = modules[member.path]
    return module.weight if isinstance(module, nn.Conv2d | nn.Linear) else None


def loss_gradients(network: nn.Module, evidence: Evidence, batch: int) -> Iterator[dict[str, Tensor]]:
    """Yields for each batch the gradient of the cross-entropy with respect to every parameter, by name.

    Every exit has the same weight as the network's end. Batch norm uses its running statistics, as in the artifact.
    """
    names, parameters = zip(*network.named_parameters(), strict=True)
    answers = network.answers if isinstance(network, ExitNetwork) else network
    with torch.enable_grad():
        for images, labels in zip(evidence.images.split(batch), evidence.labels.split(batch), strict=True):
            losses = [F.cross_entropy(logits, labels) for logits in answers(images)]
            gradients = torch.autograd.grad(torch.stack(losses).mean(), parameters, allow_unused=True)
            yield {name: gradient for name, gradient in zip(names, gradients, strict=True) if gradient is not None}
