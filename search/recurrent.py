"""Training recurrent classifiers, and what lets them leave out updates."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spaces.recurrent.classifier import RecurrentClassifier
from spaces.recurrent.predictor import SkipPredictor
from spaces.recurrent.skiprnn import SkipRnn

_CLIP = 1.0


@dataclass(frozen=True)
class Sequences:
    """Sequences with their classes.

    Args:
        steps: `(n, steps, features)`.
        labels: `(n,)`; or what else is to be told of each.
    """

    steps: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Training:
    """How a recurrent network is trained, by Adam.

    Args:
        epochs: over all sequences.
        learning_rate: at the beginning; it falls to nothing along a cosine.
        batch: sequences a step.
        seed: of the order.
    """

    epochs: int = 60
    learning_rate: float = 3e-3
    batch: int = 50
    seed: int = 0


def train_classifier(network: RecurrentClassifier, data: Sequences, training: Training) -> None:
    """Trains a recurrent classifier in place, with every update made."""
    _fit(network, data, training, lambda steps, labels: F.cross_entropy(network(steps), labels))


def train_skip_rnn(network: SkipRnn, data: Sequences, training: Training, cost: float) -> None:
    """Trains a Skip RNN in place; its classifier goes on learning.

    Args:
        network: whose classifier is trained already, as a rule.
        data: to learn from.
        training: for how long and how.
        cost: of each update, added to the loss.
    """

    def loss(steps: Tensor, labels: Tensor) -> Tensor:
        logits, updates = network(steps)
        total: Tensor = F.cross_entropy(logits, labels) + cost * updates.sum(dim=1).mean()
        return total

    _fit(network, data, training, loss)


def train_predictor(
    predictor: SkipPredictor, network: RecurrentClassifier, data: Sequences, training: Training
) -> None:
    """Trains a predictor in place on how far updates move the state of a frozen classifier."""
    examples = state_movements(network, data, torch.Generator().manual_seed(training.seed))
    _fit(predictor, examples, training, lambda both, moved: F.mse_loss(predictor(both)[:, 0], moved))


def state_movements(network: RecurrentClassifier, data: Sequences, generator: torch.Generator) -> Sequences:
    """Returns each step's input and the state before it, side by side, and how far the update would move the state.

    Each sequence leaves out updates at random, at a rate of its own, so that there are states as they are where updates
    have been left out: the longer ago the last one was, the farther the next one moves. Distances are logarithms, in
    standard deviations from their mean. The first update is always made, so it is no example.
    """
    state, both, moved = network.begin(data.steps), [], []
    rates = 0.8 * torch.rand(len(data.labels), 1, generator=generator)
    with torch.no_grad():
        for number, step in enumerate(data.steps.unbind(dim=1)):
            after = network.cell(step, state)
            if number:
                both.append(torch.cat([step, state], dim=1))
                moved.append((after - state).norm(dim=1).clamp(min=1e-6).log())
            left_out = (torch.rand(rates.shape, generator=generator) < rates).float() if number else 0.0
            state = left_out * state + (1 - left_out) * after
    distances = torch.cat(moved)
    return Sequences(torch.cat(both), (distances - distances.mean()) / distances.std())


def _fit(network: nn.Module, data: Sequences, training: Training, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    optimizer = torch.optim.Adam(network.parameters(), training.learning_rate)
    total = training.epochs * max(len(data.labels) // training.batch, 1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    network.train()
    for steps, labels in _batches(data, training):
        optimizer.zero_grad()
        loss(steps, labels).backward()
        nn.utils.clip_grad_norm_(network.parameters(), _CLIP)
        optimizer.step()
        schedule.step()
    network.eval()


def _batches(data: Sequences, training: Training) -> Iterable[tuple[Tensor, Tensor]]:
    rng, size = np.random.default_rng(training.seed), training.batch
    for _ in range(training.epochs):
        order = torch.from_numpy(rng.permutation(len(data.labels)))
        for start in range(0, max(len(order) - size + 1, 1), size):
            chosen = order[start : start + size]
            yield data.steps[chosen], data.labels[chosen]
