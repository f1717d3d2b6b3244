"""Losses of knowledge distillation from the dense network."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from spaces.dynamic.exit_network import ExitNetwork


def distillation_loss(logits: Tensor, teacher: Tensor, labels: Tensor, weight: float, temperature: float) -> Tensor:
    """Returns the cross-entropy to the labels mixed with the KL divergence from a teacher's softened predictions.

    Args:
        logits: `(n, classes)`.
        teacher: the teacher's logits, `(n, classes)`.
        labels: `(n,)`.
        weight: the teacher's share, 0 to 1.
        temperature: softens both predictions; the divergence is multiplied by its square to keep gradients as large.

    Source: Hinton et al., Distilling the Knowledge in a Neural Network, 2015.
    """
    loss = F.cross_entropy(logits, labels) if weight < 1 else logits.new_zeros(())
    if weight > 0:
        soft = F.log_softmax(teacher.detach() / temperature, dim=1)
        divergence = F.kl_div(F.log_softmax(logits / temperature, dim=1), soft, reduction="batchmean", log_target=True)
        loss = (1 - weight) * loss + weight * temperature**2 * divergence
    return loss


def all_logits(network: ExitNetwork, images: Tensor) -> list[Tensor]:
    """Returns the logits of each exit and, last, of the trunk, in fp32; gradients of exits stop at their heads.

    Training the trunk for its exits, too, would cost accuracy at its end.
    """
    features, logits = network.run_trunk(images)
    heads = [head(feature.detach()) for head, feature in zip(network.exits.values(), features, strict=True)]
    return [output.float() for output in (*heads, logits)]


def total_loss(outputs: Sequence[Tensor], teacher: Tensor, labels: Tensor, weight: float, temperature: float) -> Tensor:
    """Returns the sum of the losses of every exit and of the trunk; see `distillation_loss`."""
    losses = [distillation_loss(logits, teacher, labels, weight, temperature) for logits in outputs]
    return torch.stack(losses).sum()
