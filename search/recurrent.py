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
        labels: `(n,)`.
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
        return F.cross_entropy(logits, labels) + cost * updates.sum(dim=1).mean()

    _fit(network, data, training, loss)


def train_predictor(
    predictor: SkipPredictor, network: RecurrentClassifier, data: Sequences, training: Training
) -> None:
    """Trains a predictor in place on which updates a frozen classifier can do without."""
    examples = updates_needed(network, data)
    _fit(predictor, examples, training, lambda both, needed: _binary(predictor(both), needed))


def updates_needed(network: RecurrentClassifier, data: Sequences) -> Sequences:
    """Returns each step's input and the state before it, side by side, and whether the update there is needed.

    It is, where leaving out this one alone changes the answer, or lowers the logit of the answer against the next best
    by more than half. The first update is always made, so it is no example.
    """
    with torch.no_grad():
        states = network.states(data.steps)
        whole = network.classifier(states[:, -1])
        both, needed = [], []
        for number in range(1, data.steps.shape[1]):
            state = states[:, number]
            both.append(torch.cat([data.steps[:, number], state], dim=1))
            for later in data.steps[:, number + 1 :].unbind(dim=1):
                state = network.cell(later, state)
            needed.append(_margin(network.classifier(state), whole) < 0.5 * _margin(whole, whole))
    return Sequences(torch.cat(both), torch.cat(needed).long())


def _margin(logits: Tensor, whole: Tensor) -> Tensor:
    """Returns by how much the answer that `whole` gives leads all others, `(n,)`."""
    answer = whole.argmax(dim=1, keepdim=True)
    others = logits.scatter(1, answer, -torch.inf).amax(dim=1)
    return logits.gather(1, answer)[:, 0] - others


def _binary(logits: Tensor, needed: Tensor) -> Tensor:
    loss: Tensor = F.binary_cross_entropy_with_logits(logits[:, 0], needed.float())
    return loss


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
