"""Learning from the dense network's answers as well as from the labels."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from spaces.dynamic.exit_network import ExitNetwork


def distillation_loss(logits: Tensor, teacher: Tensor, labels: Tensor, weight: float, temperature: float) -> Tensor:
    """Returns the cross-entropy to the labels mixed with the divergence from a teacher's softened answers.

    Args:
        logits: `(n, classes)`.
        teacher: the teacher's logits, `(n, classes)`.
        labels: `(n,)`.
        weight: the teacher's share, 0 to 1.
        temperature: softens both answers; the divergence is multiplied by its square, so that gradients stay as large.

    Source: Hinton et al., Distilling the Knowledge in a Neural Network, 2015.
    """
    loss = F.cross_entropy(logits, labels) if weight < 1 else logits.new_zeros(())
    if weight > 0:
        soft = F.log_softmax(teacher.detach() / temperature, dim=1)
        divergence = F.kl_div(F.log_softmax(logits / temperature, dim=1), soft, reduction="batchmean", log_target=True)
        loss = (1 - weight) * loss + weight * temperature**2 * divergence
    return loss


def all_logits(network: ExitNetwork, images: Tensor) -> list[Tensor]:
    """Returns the logits of each exit and, last, of the trunk, in fp32; the exits' losses do not reach the trunk.

    A trunk that serves its exits as well serves its own end worse.
    """
    features, logits = network.run_trunk(images)
    heads = [head(feature.detach()) for head, feature in zip(network.exits.values(), features, strict=True)]
    return [found.float() for found in (*heads, logits)]


def total_loss(found: Sequence[Tensor], teacher: Tensor, labels: Tensor, weight: float, temperature: float) -> Tensor:
    """Returns the sum of the losses of every exit and of the trunk."""
    losses = [distillation_loss(logits, teacher, labels, weight, temperature) for logits in found]
    return torch.stack(losses).sum()
