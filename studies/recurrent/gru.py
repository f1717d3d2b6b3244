"""A GRU that reads a sequence and says its class."""

import torch
from torch import Tensor, nn


class GruClassifier(nn.Module):
    """A GRU, and a linear layer on its last state.

    Args:
        features: of one step of a sequence.
        hidden: values of the state.
        classes: how many there are.
    """

    def __init__(self, features: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.cell = nn.GRUCell(features, hidden)
        self.head = nn.Linear(hidden, classes)

    def states(self, sequences: Tensor) -> Tensor:
        """Returns the state before each step and, last, after all of them, `(n, t + 1, hidden)`.

        Args:
            sequences: `(n, t, features)`.
        """
        states = [sequences.new_zeros(len(sequences), self.cell.hidden_size)]
        for inputs in sequences.unbind(dim=1):
            states.append(self.cell(inputs, states[-1]))
        return torch.stack(states, dim=1)

    def forward(self, sequences: Tensor) -> Tensor:
        """Returns logits `(n, classes)` for sequences `(n, t, features)`."""
        logits: Tensor = self.head(self.states(sequences)[:, -1])
        return logits
