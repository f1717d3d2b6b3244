"""Training recurrent networks, and teaching them to skip updates of their state."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from search.config.sections import FittingSection
from search.training.distillation import distillation_loss
from search.training.loop import Batch, TrainingBatches, fit
from studies.recurrent.gru import GruClassifier
from studies.recurrent.skip_predictor import SkipPredictor, skipping_states
from studies.recurrent.skip_rnn import SkipGruClassifier

InSteps = Callable[[Tensor], Tensor]
"""From images `(n, c, h, w)` to sequences `(n, t, features)`."""
_DISTILLATION, _TEMPERATURE = 0.5, 2.0
"""The plain network's share in what a Skip RNN learns, and what softens both answers."""
_STEPS = 1500
_BATCH = 1000
_LEARNING_RATE = 0.01
"""How a predictor is trained."""
_RATES = (0.0, 0.3, 0.6)
"""Shares of the updates that are skipped at random for the states that a predictor learns on."""
_SMALL = 0.25
"""The share of the updates that are small moves."""


def train_classifier(
    network: GruClassifier, in_steps: InSteps, batches: TrainingBatches, settings: FittingSection
) -> None:
    """Trains a classifier on labels, in place.

    Raises:
        DivergedError: the loss is not finite for the second time.
    """

    def step(batch: Batch) -> float:
        loss = F.cross_entropy(network(in_steps(batch.images)), batch.labels)
        loss.backward()
        return float(loss.detach())

    fit(network, step, batches, settings)


def train_skipping(
    network: SkipGruClassifier,
    plain: GruClassifier,
    cost: float,
    in_steps: InSteps,
    batches: TrainingBatches,
    settings: FittingSection,
) -> None:
    """Trains a Skip RNN in place: on labels, on what the plain network answers, and on the updates that it makes.

    Source: Campos et al., Skip RNN, 2018; there `clip` is 1, and it learns from labels alone.

    Args:
        network: begins with the plain network's weights.
        plain: trained.
        cost: what one update adds to the loss.
        in_steps: makes sequences of images.
        batches: what to learn from.
        settings: of the training.

    Raises:
        DivergedError: the loss is not finite for the second time.
    """

    def step(batch: Batch) -> float:
        sequences = in_steps(batch.images)
        with torch.no_grad():
            teacher = plain(sequences)
        found = network(sequences)
        loss = distillation_loss(found.logits, teacher, batch.labels, _DISTILLATION, _TEMPERATURE)
        loss = loss + cost * found.updates.sum(dim=1).mean()
        loss.backward()
        return float(loss.detach())

    fit(network, step, batches, settings)


def same_answer(plain: GruClassifier, sequences: Tensor, states: Tensor) -> Tensor:
    """Returns whether the answer stays what it was if one update is skipped and all later ones are made, `(n, t)`.

    Args:
        plain: the frozen network.
        sequences: `(n, t, features)`.
        states: before each step and after the last, as they come about, `(n, t + 1, hidden)`.
    """
    answer, found = plain(sequences).argmax(dim=1), []
    for skipped in range(sequences.shape[1]):
        state = states[:, skipped]
        for inputs in sequences[:, skipped + 1 :].unbind(dim=1):
            state = plain.cell(inputs, state)
        found.append(plain.head(state).argmax(dim=1) == answer)
    return torch.stack(found, dim=1)


def small_move(plain: GruClassifier, sequences: Tensor, states: Tensor) -> Tensor:
    """Returns whether an update moves the state less than three quarters of all do, `(n, t)`; arguments as above."""
    count, steps, _ = sequences.shape
    before = states[:, :-1].flatten(0, 1)
    moved = (plain.cell(sequences.flatten(0, 1), before) - before).norm(dim=1).reshape(count, steps)
    small: Tensor = moved < torch.quantile(moved, _SMALL)
    return small


LABELS: Mapping[str, Callable[[GruClassifier, Tensor, Tensor], Tensor]] = {"answer": same_answer, "move": small_move}
"""What makes an update one that can be skipped, by name."""


def train_predictor(plain: GruClassifier, label: str, sequences: Tensor, seed: int) -> SkipPredictor:
    """Returns a predictor of the updates that can be skipped; the network stays as it is.

    What it skips changes the states that it meets next. So it learns on the network's own states and on those that it
    comes to when updates are skipped at random.
    Source: Tao et al., Skipping RNN State Updates without Retraining the Original Model, 2019.

    Args:
        plain: trained.
        label: one of `LABELS`.
        sequences: to learn from, `(n, t, features)`.
        seed: of its weights, batches and what is skipped.
    """
    torch.manual_seed(seed)
    predictor = SkipPredictor(plain.cell.input_size, plain.cell.hidden_size)
    states = []
    with torch.no_grad():
        for rate in _RATES:
            skips = torch.rand(sequences.shape[:2]) < rate
            states.append(skipping_states(plain, sequences, lambda step, *_, skips=skips: skips[:, step, None])[0])
        can_skip = torch.cat([LABELS[label](plain, sequences, each).flatten() for each in states]).float()
    hidden = torch.cat([each[:, :-1].flatten(0, 1) for each in states])
    _fit_predictor(predictor, sequences.flatten(0, 1).repeat(len(_RATES), 1), hidden, can_skip)
    return predictor.eval()


def _fit_predictor(predictor: SkipPredictor, inputs: Tensor, hidden: Tensor, targets: Tensor) -> None:
    optimizer = torch.optim.AdamW(predictor.parameters(), _LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
    for _ in range(_STEPS):
        chosen = torch.randint(len(targets), (_BATCH,))
        logits = predictor(inputs[chosen], hidden[chosen])[:, 0]
        loss = F.binary_cross_entropy_with_logits(logits, targets[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
