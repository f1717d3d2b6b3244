"""The training loop: SGD with a learning rate schedule, averaged weights, checkpoints, and a retry on divergence."""

import contextlib
import copy
import json
import logging
import math
import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evaluators.data import LabelledImages
from evaluators.runtimes.cpu import cpu_flags
from search.config.study import FittingSection
from spaces import cache
from spaces.errors import UserError

logger = logging.getLogger(__name__)

Augment = Callable[[Tensor, torch.Generator], Tensor]
Report = Callable[[int, int], None]
"""Called with the progress of a training: parts done, parts in all."""

VERSION = "3"
"""Part of every cache key: raised where the same settings train otherwise than before."""
_SECOND_RATE = 0.1
"""Factor of the learning rate after a loss that is not finite."""
_WARM_UP = 0.3
"""Share of a one-cycle schedule in which the learning rate rises."""
_MOMENTUM = 0.9
_NO_GRADIENT = "does not require grad and does not have a grad_fn"
"""What torch says of a loss on which no weight has an influence."""
_BF16_FLAGS = {"amx_bf16", "avx512_bf16"}
"""CPU flags with which a training step in bf16 takes about half the time."""


class DivergedError(UserError):
    """The loss of a training is not finite, even at a tenth of the learning rate."""


class NoGradientError(UserError):
    """No gradient gets from the loss of a training to the weights."""


@dataclass(frozen=True)
class Batch:
    """One batch, and where in the training it comes.

    Args:
        images: `(n, c, h, w)`.
        labels: `(n,)`.
        done: share of the training that is done, 0 to 1.
        generator: of random numbers; a resumed training continues with the same ones.
        key: the same for the same images, augmented in the same way.
    """

    images: Tensor
    labels: Tensor
    done: float
    generator: torch.Generator
    key: Hashable = None


Step = Callable[[Batch], float]
"""Adds the gradients of one batch to those of the parameters, and returns the loss."""


@dataclass(frozen=True)
class TrainingBatches:
    """A training set, shuffled in every epoch by the seed and the number of the epoch.

    Args:
        data: images and labels.
        size: images per batch; incomplete batches at the end of an epoch are dropped.
        seed: of the order and the augmentation.
        augment: augments a batch at random, or None.
        indices: of the images that are used; all if None.
        views: epochs that differ; later ones have the batches of these in another order. None: all differ.
    """

    data: LabelledImages
    size: int
    seed: int
    augment: Augment | None = None
    indices: NDArray[np.int64] | None = None
    views: int | None = None

    def __len__(self) -> int:
        count = len(self.data) if self.indices is None else len(self.indices)
        return max(count // self.size, 1)

    def epoch(self, index: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields one epoch's batches as `(images, labels)`."""
        for _, images, labels in self.keyed_epoch(index):
            yield images, labels

    def keyed_epoch(self, index: int) -> Iterator[tuple[Hashable, Tensor, Tensor]]:
        """Yields one epoch's batches as `(key, images, labels)`; equal keys are equal batches."""
        view = index if self.views is None else index % self.views
        indices = np.arange(len(self.data)) if self.indices is None else self.indices
        order = np.random.default_rng(self.seed + view).permutation(indices)
        numbers = np.arange(len(self)) if view == index else np.random.default_rng(index).permutation(len(self))
        generator = torch.Generator().manual_seed(self.seed + view)
        for number in numbers.tolist():
            chosen = order[number * self.size : (number + 1) * self.size]  # fewer images than `size` are one batch
            images = torch.from_numpy(self.data.images[chosen])
            if self.augment:
                if self.views is not None:  # a batch is augmented in the same way wherever it comes
                    generator.manual_seed((self.seed + view) * len(self) + number)
                images = self.augment(images, generator)
            yield (self.seed, self.size, view, number), images, torch.from_numpy(self.data.labels[chosen])


@dataclass
class Fitted:
    """The record of a training.

    Args:
        epochs: number of epochs that were begun.
        steps: number of steps, those of interrupted processes included.
        seconds: CPU time of the training thread. Unlike wall-clock time it does not depend on how busy the machine is,
            so a limit in minutes gives about the same number of steps.
        remarks: for the user.
        images: that were shown, each as often as it was.
    """

    epochs: int = 0
    steps: int = 0
    seconds: float = 0.0
    remarks: list[str] = field(default_factory=list)
    images: int = 0

    def __add__(self, other: "Fitted") -> "Fitted":
        """Returns the record of both trainings together."""
        return Fitted(
            self.epochs + other.epochs,
            self.steps + other.steps,
            self.seconds + other.seconds,
            [*self.remarks, *other.remarks],
            self.images + other.images,
        )


class _NotFiniteError(Exception):
    """The loss of a step is not finite."""


class _Run:
    """A running training: everything that a checkpoint contains."""

    def __init__(self, network: nn.Module, settings: FittingSection, batches: TrainingBatches) -> None:
        self.network = network
        self.settings = settings
        self.batches = batches
        self.optimizer = torch.optim.SGD(
            network.parameters(),
            settings.learning_rate,
            _MOMENTUM,
            weight_decay=settings.weight_decay,
            nesterov=True,
        )
        self.average = copy.deepcopy(network.state_dict()) if settings.ema else None
        self.rate = 1.0
        self.fitted = Fitted()
        self._reported = -1
        self._layout = torch.channels_last

    @property
    def total_steps(self) -> int:
        """Number of steps by the settings, unless these give minutes."""
        return self.settings.steps or math.ceil(self.settings.epochs * len(self.batches))

    @property
    def done(self) -> float:
        """The share of the training that is done."""
        minutes = self.settings.minutes or self.settings.at_most_minutes
        by_time = self.fitted.seconds / 60 / minutes if minutes else 0.0
        by_steps = 0.0 if self.settings.minutes else self.fitted.steps / self.total_steps
        return min(max(by_time, by_steps), 1.0)

    def epoch(self, step: Step, report: Report) -> None:
        """Trains to the end of the epoch or of the training."""
        number = self.fitted.epochs
        generator = torch.Generator().manual_seed(self.settings.seed + number)
        self.network.train()
        for key, images, labels in self.batches.keyed_epoch(number):
            if self.done >= 1:
                break
            if self._reported != (percent := round(100 * self.done)):
                self._reported = percent
                report(percent, 100)
            begin = time.thread_time()
            self._step(step, Batch(images, labels, self.done, generator, key))
            self.fitted.steps += 1
            self.fitted.images += len(labels)
            self.fitted.seconds += time.thread_time() - begin
        self.fitted.epochs += 1

    def _step(self, step: Step, batch: Batch) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * self.rate * rate_at(self.settings.schedule, batch.done)
        loss = self._gradients(step, batch)
        if not math.isfinite(loss):
            raise _NotFiniteError(f"{loss} in epoch {self.fitted.epochs + 1}")
        if self.settings.clip:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.settings.clip)
        self.optimizer.step()
        self._update_average()

    def _gradients(self, step: Step, batch: Batch) -> float:
        """Computes the gradients of a batch, with its channels last in memory; returns the loss.

        A step then takes 5 to 45% less time. Networks that use `view` on features cannot read them so.
        """
        self.optimizer.zero_grad()
        try:
            return _loss(step, replace(batch, images=batch.images.contiguous(memory_format=self._layout)))
        except RuntimeError as error:
            if self._layout is torch.contiguous_format or "view size" not in str(error):
                raise
            self._layout = torch.contiguous_format
            return self._gradients(step, batch)

    def _update_average(self) -> None:
        if self.average is None:
            return
        # A smaller decay at first, or the average would keep the initial weights for long.
        decay = min(self.settings.ema, (1 + self.fitted.steps) / (10 + self.fitted.steps))
        with torch.no_grad():
            for name, value in self.network.state_dict().items():
                if value.is_floating_point():
                    self.average[name].lerp_(value, 1 - decay)

    def state(self) -> dict[str, Any]:
        """Returns a checkpoint to resume from."""
        return copy.deepcopy(
            {
                "network": self.network.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "average": self.average,
                "rate": self.rate,
                "fitted": vars(self.fitted),
            }
        )

    def load(self, state: dict[str, Any]) -> None:
        """Resumes from a checkpoint of `state`."""
        state = copy.deepcopy(state)
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average = state["average"]
        self.rate = state["rate"]
        self.fitted = Fitted(**state["fitted"])


def fit(
    network: nn.Module,
    step: Step,
    batches: TrainingBatches,
    settings: FittingSection,
    checkpoint: Path | None = None,
    report: Report = lambda _done, _total: None,
) -> Fitted:
    """Trains a network in place and leaves it in evaluation mode, with averaged weights if the settings say so.

    After every epoch the state is saved to `checkpoint`, from which an interrupted training resumes; it is removed at
    the end. If a loss is not finite, training is repeated once from the last complete epoch, at a tenth of the learning
    rate.

    Args:
        network: its parameters are trained.
        step: computes the gradients of one batch.
        batches: the training set.
        settings: length and hyperparameters of the training.
        checkpoint: file that each epoch is saved to, or None.
        report: called with the progress, in percent.

    Raises:
        DivergedError: the loss is not finite for the second time.
        NoGradientError: it does not depend on any weight.
    """
    run = _Run(network, settings, batches)
    _resume(run, checkpoint)
    while run.done < 1:
        last_epoch = run.state()
        try:
            run.epoch(step, report)
        except _NotFiniteError as error:
            _retry(run, last_epoch, str(error))
            continue
        if checkpoint is not None:
            save(run.state(), checkpoint)
    report(100, 100)
    if run.average is not None:
        network.load_state_dict(run.average)
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    network.eval()
    return run.fitted


def _loss(step: Step, batch: Batch) -> float:
    try:
        return step(batch)
    except RuntimeError as error:
        if not str(error).endswith(_NO_GRADIENT):
            raise
        raise NoGradientError(
            "a network that is trained has a forward with gradients, got one that switches them off; take"
            " torch.no_grad() and detach() out of it, or leave out what trains"
        ) from error


def _retry(run: _Run, last_epoch: dict[str, Any], loss: str) -> None:
    run.load(last_epoch)
    if run.rate < 1:
        raise DivergedError(
            f"a training has finite losses, got {loss}, at a tenth of learning_rate {run.settings.learning_rate:g} too;"
            " lower it"
        )
    run.rate = _SECOND_RATE
    remark = f"the loss was {loss}; that epoch is done again at a tenth of the learning rate"
    run.fitted.remarks.append(remark)
    logger.warning("Careful: %s", remark)  # shown to the user whichever training this is


def rate_at(schedule: str, done: float) -> float:
    """Returns the factor of the learning rate at a point of the training, `done` from 0 to 1.

    `onecycle` rises along a cosine for the first 30% and then falls to zero, `cosine` only falls.
    Source: Smith & Topin, Super-Convergence, 2018; Loshchilov & Hutter, SGDR, 2017.
    """
    if schedule == "cosine":
        return (1 + math.cos(math.pi * done)) / 2
    if done < _WARM_UP:
        return 0.04 + 0.96 * (1 - math.cos(math.pi * done / _WARM_UP)) / 2
    return (1 + math.cos(math.pi * (done - _WARM_UP) / (1 - _WARM_UP))) / 2


def fast_arithmetic() -> contextlib.AbstractContextManager[Any]:
    """Returns an autocast context for bf16 on CPUs with bf16 instructions, else one without effect.

    With bf16 a step takes about half the time; weights, batch norm and losses stay fp32.
    """
    if cpu_flags() & _BF16_FLAGS:
        return torch.autocast("cpu", torch.bfloat16)
    return contextlib.nullcontext()


def save(content: dict[str, Any], file: Path) -> None:
    """Writes a file atomically."""
    cache.write_atomically(file, lambda partial: torch.save(content, partial))


def save_fitted(content: dict[str, Any], fitted: Fitted, file: Path) -> None:
    """Writes trained weights, and beside them what their training took."""
    text = json.dumps(vars(fitted))
    cache.write_atomically(_record(file), lambda partial: partial.write_text(text, encoding="utf-8"))
    save(content, file)


def fitted_of(file: Path) -> Fitted:
    """Returns what the training of the weights in a file took; nothing if that is not known."""
    try:
        return Fitted(**json.loads(_record(file).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # weights of an earlier version have no record
        return Fitted()


def _record(file: Path) -> Path:
    return file.with_suffix(".json")


def load_weights(network: nn.Module, file: Path) -> bool:
    """Loads weights into the network; returns False if the file is missing, damaged or of another network."""
    if not file.is_file():
        return False
    try:
        network.load_state_dict(torch.load(file, weights_only=True))
    except Exception:  # a damaged or foreign file is replaced
        return False
    return True


def _resume(run: _Run, checkpoint: Path | None) -> None:
    if checkpoint is None or not checkpoint.is_file():
        return
    initial = run.state()
    try:
        run.load(torch.load(checkpoint, weights_only=True))
    except Exception:  # damaged by a crash, or of another training
        run.load(initial)
