"""Skip RNN: a cell that says, at each update of its state, how soon the next one is due.

Source: Campos et al., Skip RNN: Learning to Skip State Updates in Recurrent Neural Networks, 2018; its published cells.
"""

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from studies.recurrent.gru import GruClassifier

UPDATE_BIAS = 1.0
"""A new gate says 73%, so that every step is an update until it learns otherwise."""


class Skimmed(NamedTuple):
    """What a network that skips updates has to say.

    Args:
        logits: `(n, classes)`.
        updates: 1 where the state was updated and 0 where it was kept, `(n, t)`.
    """

    logits: Tensor
    updates: Tensor


class SkipState(NamedTuple):
    """What is handed from step to step.

    Args:
        hidden: the state, `(n, hidden)`.
        increment: what each step adds to the probability of an update, `(n, 1)`.
        cumulated: that probability before the step, `(n, 1)`.
    """

    hidden: Tensor
    increment: Tensor
    cumulated: Tensor

    @classmethod
    def first(cls, sequences: Tensor, hidden: int) -> "SkipState":
        """Returns the state before the first step, which is an update."""
        count = len(sequences)
        return cls(sequences.new_zeros(count, hidden), sequences.new_ones(count, 1), sequences.new_zeros(count, 1))


class SkipCell(nn.Module):
    """A GRU cell whose state is updated where the cumulated probability rounds to 1.

    Args:
        cell: may be trained.
    """

    def __init__(self, cell: nn.GRUCell) -> None:
        super().__init__()
        self.cell = cell
        self.due = nn.Linear(cell.hidden_size, 1)
        nn.init.constant_(self.due.bias, UPDATE_BIAS)

    def forward(self, inputs: Tensor, state: SkipState) -> tuple[SkipState, Tensor]:
        """Returns the state after a step with inputs `(n, features)`, and which of them updated it, `(n, 1)`."""
        cumulated = state.cumulated + torch.minimum(state.increment, 1 - state.cumulated)
        update = straight_through_round(cumulated)
        renewed = self.cell(inputs, state.hidden)
        following = SkipState(
            hidden=update * renewed + (1 - update) * state.hidden,
            increment=update * torch.sigmoid(self.due(renewed)) + (1 - update) * state.increment,
            cumulated=(1 - update) * cumulated,
        )
        return following, update


class SkipGruClassifier(nn.Module):
    """A Skip RNN that begins as a trained classifier.

    Args:
        plain: is copied.
    """

    def __init__(self, plain: GruClassifier) -> None:
        super().__init__()
        self.skip = SkipCell(copy.deepcopy(plain.cell))
        self.head = copy.deepcopy(plain.head)

    def forward(self, sequences: Tensor) -> Skimmed:
        """Returns the logits for sequences `(n, t, features)`, and where the state was updated."""
        state, updates = SkipState.first(sequences, self.skip.cell.hidden_size), []
        for inputs in sequences.unbind(dim=1):
            state, update = self.skip(inputs, state)
            updates.append(update)
        return Skimmed(self.head(state.hidden), torch.cat(updates, dim=1))


def straight_through_round(probabilities: Tensor) -> Tensor:
    """Returns the probabilities rounded to exactly 0 or 1, a half to 0, with the gradient of the identity."""
    return torch.round(probabilities).detach() + (probabilities - probabilities.detach())
