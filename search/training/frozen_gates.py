"""The last part of a training with gates: the network is trained as it is deployed, with frozen gates.

While gates are trained, decisions have noise, and features at closed positions are not removed, so the weights do not
see what is deployed. Training gates on with hard decisions costs accuracy (3 points on CIFAR-10), because closed
positions have no gradient.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn

from search.config.progress import Progress
from search.config.sections import FittingSection
from search.training.loop import Batch, Fitted, Report, TrainingBatches, fit, load_weights, save

_SHARE = 0.15
"""Share of the training with frozen gates."""
_RATE = 0.1
"""Initial learning rate of this part, as a share of that of the training."""

Settings = TypeVar("Settings", bound=FittingSection)
Loss = Callable[[Tensor, Tensor], Tensor]
"""Returns the loss of a batch of images and labels."""


def train_in_parts(
    network: nn.Module,
    learn: Callable[[Path, Report], None],
    train_frozen: Callable[[Path, Report], None],
    file: Path,
    progress: Progress,
) -> None:
    """Trains a network with gates in two parts, and saves it; an interrupted call resumes.

    Args:
        network: trained in place by both parts.
        learn: trains network and gates; takes a checkpoint file and a progress callback.
        train_frozen: trains the network with frozen gates; takes the same.
        file: for the result.
        progress: called with the progress.
    """
    first_part = file.with_suffix(".unsettled.pt")
    if not load_weights(network, first_part):
        learn(file.with_suffix(".partial.pt"), _report_to(progress, "Training the network with its gates, once"))
        save(network.state_dict(), first_part)
    train_frozen(file.with_suffix(".settling.pt"), _report_to(progress, "Training it as it is deployed"))
    save(network.state_dict(), file)
    first_part.unlink()


def _report_to(progress: Progress, step: str) -> Report:
    return lambda done, total: progress(step, done, total)


def while_gates_learn(settings: Settings) -> Settings:
    """Returns the settings of the first part, in which gates are trained."""
    return _part(settings, 1 - _SHARE)


def train_with_frozen_gates(
    network: nn.Module,
    gates: Iterable[nn.Module],
    loss_of: Loss,
    batches: TrainingBatches,
    settings: FittingSection,
    checkpoint: Path | None = None,
    report: Report = lambda _done, _total: None,
) -> Fitted:
    """Trains a network in evaluation mode, with fixed batch norm statistics and fixed gates.

    Args:
        network: with trained gates.
        gates: modules whose weights are fixed.
        loss_of: the loss of a batch.
        batches: the training set.
        settings: of the whole training.
        checkpoint: file that each epoch is saved to, or None.
        report: called with the progress, in percent.

    Raises:
        DivergedError: the loss is not finite for the second time.
    """

    def step(batch: Batch) -> float:
        network.eval()
        loss = loss_of(batch.images, batch.labels)
        loss.backward()
        return float(loss.detach())

    part = _part(settings, _SHARE).model_copy(
        update={"learning_rate": settings.learning_rate * _RATE, "schedule": "cosine"}
    )
    frozen = [parameter for gate in gates for parameter in gate.parameters() if parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        return fit(network, step, batches, part, checkpoint, report)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def _part(settings: Settings, share: float) -> Settings:
    """Returns the settings of a share of a training."""
    length = {
        "epochs": settings.epochs * share,
        "steps": settings.steps and max(1, round(settings.steps * share)),
        "minutes": settings.minutes and settings.minutes * share,
        "at_most_minutes": settings.at_most_minutes and settings.at_most_minutes * share,
    }
    return settings.model_copy(update=length)
