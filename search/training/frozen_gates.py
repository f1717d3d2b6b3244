"""The last part of a training with gates: the network learns as it is deployed, and its gates stay as they are.

While gates learn, what they close is blurred: decisions have noise, and hidden features keep closed positions. At their
end the weights have not met what is deployed. Gates that learn on then cost accuracy (3 points on CIFAR-10), because
what a closed gate hides has no gradient.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from search.config.progress import Progress
from search.config.sections import FittingSection
from search.training.loop import Fitted, Report, TrainingBatches, fit, load_weights, save

_SHARE = 0.15
"""Of the training."""
_RATE = 0.1
"""The learning rate that this part begins with, as a share of the training's."""

Settings = TypeVar("Settings", bound=FittingSection)
Loss = Callable[[Tensor, Tensor], Tensor]
"""Returns the loss of a batch of images and labels."""


def train_in_parts(
    network: nn.Module,
    learn: Callable[[Path, Report], None],
    settle: Callable[[Path, Report], None],
    file: Path,
    progress: Progress,
) -> None:
    """Trains a network with gates in two parts, each of which is done once, and saves it.

    Args:
        network: that both parts change.
        learn: trains network and gates, with a checkpoint in a file.
        settle: trains the network with the gates that it then has, with a checkpoint in a file.
        file: for the result.
        progress: told how far it is.
    """
    unsettled = file.with_suffix(".unsettled.pt")
    if not load_weights(network, unsettled):
        learn(file.with_suffix(".partial.pt"), _telling(progress, "Training the network with its gates, once"))
        save(network.state_dict(), unsettled)
    settle(file.with_suffix(".settling.pt"), _telling(progress, "Training it as it is deployed"))
    save(network.state_dict(), file)
    unsettled.unlink()


def _telling(progress: Progress, step: str) -> Report:
    return lambda done, total: progress(step, done, total)


def while_gates_learn(settings: Settings) -> Settings:
    """Returns the settings of the training before this part."""
    return _part(settings, 1 - _SHARE)


def settle(
    network: nn.Module,
    gates: Iterable[nn.Module],
    loss_of: Loss,
    batches: TrainingBatches,
    settings: FittingSection,
    checkpoint: Path | None = None,
    report: Report = lambda _done, _total: None,
) -> Fitted:
    """Trains a network in evaluation mode, so that its batch statistics stay, and all its weights but those of gates.

    Args:
        network: with trained gates.
        gates: modules whose weights stay.
        loss_of: what is to become less.
        batches: the training set.
        settings: of the whole training.
        checkpoint: a file; none where not given.
        report: told how far it is, in hundredths.

    Raises:
        DivergedError: the loss is not finite for the second time.
    """

    def step(images: Tensor, labels: Tensor, done: float, generator: torch.Generator) -> float:  # noqa: ARG001
        network.eval()
        loss = loss_of(images, labels)
        loss.backward()
        return float(loss.detach())

    own = _part(settings, _SHARE).model_copy(
        update={"learning_rate": settings.learning_rate * _RATE, "schedule": "cosine"}
    )
    held = [parameter for gate in gates for parameter in gate.parameters() if parameter.requires_grad]
    for parameter in held:
        parameter.requires_grad_(False)
    try:
        return fit(network, step, batches, own, checkpoint, report)
    finally:
        for parameter in held:
            parameter.requires_grad_(True)


def _part(settings: Settings, share: float) -> Settings:
    """Returns the settings of a part of a training."""
    length = {
        "epochs": settings.epochs * share,
        "steps": settings.steps and max(1, round(settings.steps * share)),
        "minutes": settings.minutes and settings.minutes * share,
        "at_most_minutes": settings.at_most_minutes and settings.at_most_minutes * share,
    }
    return settings.model_copy(update=length)
