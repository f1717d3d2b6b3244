"""Skip RNN: after each update the state itself says how long it will do."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spaces.recurrent.classifier import RecurrentClassifier

_HALF = 0.5
"""The chance from which an update is made."""
_BIAS = 1.0
"""Of the update gate to begin with: each step adds 73% of an update."""


class _Round(torch.autograd.Function):
    """1 from a half on, else 0, with the gradient of the identity (straight-through)."""

    @staticmethod
    def forward(context: Any, chances: Tensor) -> Tensor:  # noqa: ARG004
        """Returns the rounded numbers."""
        return (chances >= _HALF).to(chances.dtype)

    @staticmethod
    def backward(context: Any, *grads: Tensor) -> Tensor:  # noqa: ARG004
        """Returns the gradient as it comes."""
        return grads[0]


class SkipRnn(nn.Module):
    """A recurrent classifier whose state tells how likely the next updates are.

    With an increment d told by the last update, the chance of an update grows by d with each step; the state is updated
    when it reaches a half, and the chance begins again at 0. So the number of steps to skip is known after each update,
    and nothing at all has to be run until then.
    Source: Campos et al., Skip RNN: Learning to Skip State Updates in Recurrent Neural Networks, 2018.

    Args:
        network: where it begins, a trained one as a rule.
    """

    def __init__(self, network: RecurrentClassifier) -> None:
        super().__init__()
        self.network = network
        self.gate = nn.Linear(network.cell.hidden_size, 1)
        nn.init.normal_(self.gate.weight, std=0.01)
        nn.init.constant_(self.gate.bias, _BIAS)

    def forward(self, sequences: Tensor) -> tuple[Tensor, Tensor]:
        """Returns logits `(n, classes)` for sequences `(n, steps, features)`, and which updates were made `(n, steps)`.

        Both have the gradients of the decisions.
        """
        state = self.network.begin(sequences)
        chance, increment = sequences.new_zeros(len(sequences), 1), sequences.new_ones(len(sequences), 1)
        made = []
        for step in sequences.unbind(dim=1):
            chance = chance + torch.minimum(increment, 1 - chance)
            updates: Tensor = _Round.apply(chance)
            state = updates * self.network.cell(step, state) + (1 - updates) * state
            increment = updates * torch.sigmoid(self.gate(state)) + (1 - updates) * increment
            chance = (1 - updates) * chance
            made.append(updates)
        return self.network.classifier(state), torch.cat(made, dim=1)


def steps_to_skip(increment: float, most: int) -> int:
    """Returns how many steps are skipped after an update, `most` at most.

    The sums are rounded as those of the network are, so that both skip the same steps.

    Args:
        increment: that the update told, between 0 and 1.
        most: steps that are left.
    """
    step, one = np.float32(increment), np.float32(1)
    chance, count = min(step, one), 0
    while chance < _HALF and count < most:
        chance += min(step, one - chance)
        count += 1
    return count
