"""Training recurrent networks, and teaching them to skip updates of their state."""

import copy
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from search.recovery.distillation import distillation_loss
from search.recovery.fitting import TrainingBatches, fit
from search.sections import FittingSection
from spaces.recurrent.gru import GruClassifier
from spaces.recurrent.predictor import SkipPredictor, roll_out
from spaces.recurrent.skip_rnn import SkipGruClassifier

InSteps = Callable[[Tensor], Tensor]
"""From images `(n, c, h, w)` to sequences `(n, t, features)`."""
_DISTILLATION, _TEMPERATURE = 0.5, 2.0
"""The plain network's share in what a Skip RNN learns, and what softens both answers."""
_STEPS, _BATCH, _RATE = 600, 1000, 0.01
"""How a predictor is trained in each round."""


def train_classifier(
    network: GruClassifier, in_steps: InSteps, batches: TrainingBatches, settings: FittingSection
) -> None:
    """Trains a classifier on labels, in place.

    Raises:
        DivergedError: the loss is not finite for the second time.
    """

    def step(images: Tensor, labels: Tensor, done: float, generator: torch.Generator) -> float:  # noqa: ARG001
        loss = F.cross_entropy(network(in_steps(images)), labels)
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

    def step(images: Tensor, labels: Tensor, done: float, generator: torch.Generator) -> float:  # noqa: ARG001
        sequences = in_steps(images)
        with torch.no_grad():
            teacher = plain(sequences)
        found = network(sequences)
        loss = distillation_loss(found.logits, teacher, labels, _DISTILLATION, _TEMPERATURE)
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
    """Returns whether an update moves the state less than half of all updates do, `(n, t)`; arguments as above."""
    count, steps, _ = sequences.shape
    before = states[:, :-1].flatten(0, 1)
    moved = (plain.cell(sequences.flatten(0, 1), before) - before).norm(dim=1).reshape(count, steps)
    return moved < moved.median()


LABELS: Mapping[str, Callable[[GruClassifier, Tensor, Tensor], Tensor]] = {"answer": same_answer, "move": small_move}
"""What makes an update one that can be skipped, by name."""


def train_predictor(
    plain: GruClassifier, label: str, sequences: Tensor, seed: int, rounds: int = 3, threshold: float = 0.5
) -> SkipPredictor:
    """Returns a predictor of the updates that can be skipped; the network stays as it is.

    What it skips changes the states that it meets next. So after the first round, on the network's own states, it also
    learns on those that its own decisions lead to.
    Source: Tao et al., Skipping RNN State Updates without Retraining the Original Model, 2019; Ross et al., A Reduction
    of Imitation Learning and Structured Prediction to No-Regret Online Learning, 2011, for the rounds.

    Args:
        plain: trained.
        label: one of `LABELS`.
        sequences: to learn from, `(n, t, features)`.
        seed: of its weights and batches.
        rounds: how often it is trained.
        threshold: above which it skips between the rounds.
    """
    torch.manual_seed(seed)
    predictor = SkipPredictor(plain.cell.input_size, plain.cell.hidden_size)
    frozen = copy.deepcopy(plain).eval()
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    for index in range(rounds):
        with torch.no_grad():
            states, _ = roll_out(frozen, predictor, 1.0 if index == 0 else threshold, sequences)
            can_skip = LABELS[label](frozen, sequences, states).float()
        seen.append((sequences.flatten(0, 1), states[:, :-1].flatten(0, 1), can_skip.flatten()))
        inputs, hidden, targets = (torch.cat(parts) for parts in zip(*seen, strict=True))
        _fit_predictor(predictor, inputs, hidden, targets)
    return predictor.eval()


def _fit_predictor(predictor: SkipPredictor, inputs: Tensor, hidden: Tensor, targets: Tensor) -> None:
    optimizer = torch.optim.AdamW(predictor.parameters(), _RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
    for _ in range(_STEPS):
        chosen = torch.randint(len(targets), (_BATCH,))
        logits = predictor(inputs[chosen], hidden[chosen])[:, 0]
        loss = F.binary_cross_entropy_with_logits(logits, targets[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
