"""A small network beside a frozen GRU that predicts which updates of its state can be left out.

Source: Tao et al., Skipping RNN State Updates without Retraining the Original Model, 2019.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from studies.recurrent.gru import GruClassifier
from studies.recurrent.skip_rnn import Skimmed

Skips = Callable[[int, Tensor, Tensor], Tensor]
"""Which of some sequences skip a step `(n, 1)`, from its index, what it reads and the state before it."""
_WIDTH = 10
"""Of both hidden layers, as published."""


class SkipPredictor(nn.Module):
    """Two hidden layers of ten, on what the step reads and the state before it.

    Args:
        features: of one step of a sequence.
        hidden: values of the state.
    """

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.first = nn.Linear(features + hidden, _WIDTH)
        self.second = nn.Linear(_WIDTH, _WIDTH)
        self.last = nn.Linear(_WIDTH, 1)

    def forward(self, inputs: Tensor, hidden: Tensor) -> Tensor:
        """Returns logits `(n, 1)`: how much more likely an update can be skipped than not.

        Args:
            inputs: of the step, `(n, features)`.
            hidden: the state before it, `(n, hidden)`.
        """
        inner = torch.relu(self.first(torch.cat([inputs, hidden], dim=1)))
        logits: Tensor = self.last(torch.relu(self.second(inner)))
        return logits


def skimmed(plain: GruClassifier, predictor: SkipPredictor, threshold: float, sequences: Tensor) -> Skimmed:
    """Returns the logits for sequences `(n, t, features)`, and where the state was updated.

    Args:
        plain: the frozen network.
        predictor: decides at every step.
        threshold: an update is skipped where that is more probably harmless; at 1 none is, below 0 all are.
        sequences: what is read.
    """

    def skips(step: int, inputs: Tensor, hidden: Tensor) -> Tensor:  # noqa: ARG001
        return torch.sigmoid(predictor(inputs, hidden)) > threshold

    states, updates = skipping_states(plain, sequences, skips)
    return Skimmed(plain.head(states[:, -1]), updates)


def skipping_states(plain: GruClassifier, sequences: Tensor, skips: Skips) -> tuple[Tensor, Tensor]:
    """Returns the states `(n, t + 1, hidden)` that come of skipping, and where they were updated, `(n, t)`."""
    states = [sequences.new_zeros(len(sequences), plain.cell.hidden_size)]
    updates = []
    for step, inputs in enumerate(sequences.unbind(dim=1)):
        skip = skips(step, inputs, states[-1])
        states.append(torch.where(skip, states[-1], plain.cell(inputs, states[-1])))
        updates.append((~skip).to(inputs.dtype))
    return torch.stack(states, dim=1), torch.cat(updates, dim=1)
