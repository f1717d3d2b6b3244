"""A recurrent classifier: a GRU cell that reads a sequence step by step, and a linear layer on its last state."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

Decide = Callable[[Tensor, Tensor], Tensor]
"""Turns a step's input `(n, f)` and the state before it `(n, d)` into 1 where it is updated, else 0, `(n, 1)`."""


class RecurrentClassifier(nn.Module):
    """A GRU that answers after the last step.

    Args:
        features: of a step.
        hidden: width of the state.
        classes: to tell apart.
    """

    def __init__(self, features: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.cell = nn.GRUCell(features, hidden)
        self.classifier = nn.Linear(hidden, classes)

    def forward(self, sequences: Tensor) -> Tensor:
        """Returns logits `(n, classes)` for sequences `(n, steps, features)`; every step updates the state."""
        state = self.begin(sequences)
        for step in sequences.unbind(dim=1):
            state = self.cell(step, state)
        logits: Tensor = self.classifier(state)
        return logits

    def begin(self, sequences: Tensor) -> Tensor:
        """Returns the state before the first step, `(n, hidden)`."""
        return sequences.new_zeros(len(sequences), self.cell.hidden_size)

    def states(self, sequences: Tensor) -> Tensor:
        """Returns the state before each step and after the last, `(n, steps + 1, hidden)`; every step updates it."""
        found = [self.begin(sequences)]
        for step in sequences.unbind(dim=1):
            found.append(self.cell(step, found[-1]))
        return torch.stack(found, dim=1)

    def answer(self, sequences: Tensor, decide: Decide) -> tuple[Tensor, Tensor]:
        """Returns logits `(n, classes)`, and which updates were made, `(n, steps)`.

        Args:
            sequences: `(n, steps, features)`.
            decide: who updates; the first step always does, there being no state before it.
        """
        state, made = self.begin(sequences), []
        for number, step in enumerate(sequences.unbind(dim=1)):
            updates = decide(step, state) if number else torch.ones(len(sequences), 1)
            state = updates * self.cell(step, state) + (1 - updates) * state
            made.append(updates)
        return self.classifier(state), torch.cat(made, dim=1)
