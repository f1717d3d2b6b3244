"""The one training loop: SGD, a learning rate over the whole run, averaged weights, checkpoints, a second try."""

import contextlib
import copy
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

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
"""Is told how many of how many parts of a training are done."""

_SECOND_RATE = 0.1
"""What is left of the learning rate after a loss that was not finite."""
_WARM_UP = 0.3
"""The share of a one-cycle run in which the learning rate rises."""
_MOMENTUM = 0.9
_BF16_FLAGS = {"amx_bf16", "avx512_bf16"}
"""Instruction sets with which a training step in bf16 took about half the time."""


class DivergedError(UserError):
    """A training whose loss is not finite, at a tenth of the learning rate too."""


class Step(Protocol):
    """What is done with one batch."""

    def __call__(self, images: Tensor, labels: Tensor, done: float, generator: torch.Generator) -> float:
        """Adds the gradients of one batch to the parameters and returns the loss.

        Args:
            images: `(n, c, h, w)`.
            labels: `(n,)`.
            done: the share of the training that is behind, 0 to 1.
            generator: for what is random; the same in a resumed training.
        """
        ...


@dataclass(frozen=True)
class TrainingBatches:
    """A training set in another order every epoch, which depends on the seed and the epoch only.

    Args:
        data: images and labels.
        size: images a batch; what is left over at an epoch's end waits for the next.
        seed: of the order and the augmentation.
        augment: changes a batch at random; not at all where not given.
        some: the images that are used; all where not given.
    """

    data: LabelledImages
    size: int
    seed: int
    augment: Augment | None = None
    some: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        count = len(self.data) if self.some is None else len(self.some)
        return max(count // self.size, 1)

    def epoch(self, index: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields one epoch's batches as `(images, labels)`."""
        those = np.arange(len(self.data)) if self.some is None else self.some
        order = np.random.default_rng(self.seed + index).permutation(those)
        generator = torch.Generator().manual_seed(self.seed + index)
        for start in range(0, len(self) * self.size, self.size):
            chosen = order[start : start + self.size]  # few images are one batch
            images = torch.from_numpy(self.data.images[chosen])
            yield (
                self.augment(images, generator) if self.augment else images,
                torch.from_numpy(self.data.labels[chosen]),
            )


@dataclass
class Fitted:
    """What a training came to.

    Args:
        epochs: that were begun.
        steps: that were done, in earlier processes too.
        seconds: of processor time that they took in the thread that trains. On a quiet machine that is about what the
            clock on the wall says; on a busy one waiting for a processor does not count, or a limit in minutes would
            leave other weights there.
        remarks: what a user should know.
    """

    epochs: int = 0
    steps: int = 0
    seconds: float = 0.0
    remarks: list[str] = field(default_factory=list)


class _NotFiniteError(Exception):
    """A loss that is not finite, in this step."""


class _Run:
    """A training under way: everything that a checkpoint holds."""

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

    @property
    def total_steps(self) -> int:
        """The steps that the settings ask for, where they do not ask for minutes."""
        return self.settings.steps or math.ceil(self.settings.epochs * len(self.batches))

    @property
    def done(self) -> float:
        """The share of the training that is behind."""
        minutes, spent = self.settings.minutes or self.settings.at_most_minutes, self.fitted.seconds / 60
        by_time = spent / minutes if minutes else 0.0
        by_steps = 0.0 if self.settings.minutes else self.fitted.steps / self.total_steps
        return min(max(by_time, by_steps), 1.0)

    def epoch(self, step: Step, report: Report) -> None:
        """Trains until the epoch's or the training's end."""
        number = self.fitted.epochs
        generator = torch.Generator().manual_seed(self.settings.seed + number)
        self.network.train()
        for images, labels in self.batches.epoch(number):
            if self.done >= 1:
                break
            if self._reported != (reached := round(100 * self.done)):
                self._reported = reached
                report(reached, 100)
            begin = time.thread_time()
            self._step(step, images, labels, generator)
            self.fitted.steps += 1
            self.fitted.seconds += time.thread_time() - begin
        self.fitted.epochs += 1

    def _step(self, step: Step, images: Tensor, labels: Tensor, generator: torch.Generator) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * self.rate * rate_at(self.settings.schedule, self.done)
        self.optimizer.zero_grad()
        loss = step(images, labels, self.done, generator)
        if not math.isfinite(loss):
            raise _NotFiniteError(f"{loss} in epoch {self.fitted.epochs + 1}")
        if self.settings.clip:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.settings.clip)
        self.optimizer.step()
        self._follow()

    def _follow(self) -> None:
        if self.average is None:
            return
        # Early on the average looks back less far, or it would hold on to the weights of the beginning.
        decay = min(self.settings.ema, (1 + self.fitted.steps) / (10 + self.fitted.steps))
        with torch.no_grad():
            for name, value in self.network.state_dict().items():
                if value.is_floating_point():
                    self.average[name].lerp_(value, 1 - decay)

    def state(self) -> dict[str, Any]:
        """Returns all that is needed to go on from here."""
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
        """Takes over what `state` returned."""
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
    """Trains a network in place and leaves it in evaluation mode, with averaged weights where the settings say so.

    After every epoch all that is needed to go on is kept in `checkpoint`, which is removed at the end. Where a loss is
    not finite, training goes on from the last whole epoch at a tenth of the learning rate, once.

    Args:
        network: whose parameters learn.
        step: what is done with one batch.
        batches: the training set.
        settings: for how long and how.
        checkpoint: a file; none where not given.
        report: told how far it is, in hundredths.

    Raises:
        DivergedError: the loss is not finite for the second time.
    """
    run = _Run(network, settings, batches)
    _resume(run, checkpoint)
    while run.done < 1:
        before = run.state()
        try:
            run.epoch(step, report)
        except _NotFiniteError as error:
            _try_again(run, before, str(error))
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


def _try_again(run: _Run, before: dict[str, Any], what: str) -> None:
    run.load(before)
    if run.rate < 1:
        raise DivergedError(
            f"a training has finite losses, got {what}, at a tenth of learning_rate {run.settings.learning_rate:g} too;"
            " lower it"
        )
    run.rate = _SECOND_RATE
    remark = f"the loss was {what}; that epoch is done again at a tenth of the learning rate"
    run.fitted.remarks.append(remark)
    logger.warning("Careful: %s", remark)  # whoever trains, the user has to see it


def rate_at(schedule: str, done: float) -> float:
    """Returns the share of the learning rate at a point of the training, 0 to 1.

    `onecycle` rises along a cosine for the first 30% and falls to nothing, `cosine` only falls.
    Source: Smith & Topin, Super-Convergence, 2018; Loshchilov & Hutter, SGDR, 2017.
    """
    if schedule == "cosine":
        return (1 + math.cos(math.pi * done)) / 2
    if done < _WARM_UP:
        return 0.04 + 0.96 * (1 - math.cos(math.pi * done / _WARM_UP)) / 2
    return (1 + math.cos(math.pi * (done - _WARM_UP) / (1 - _WARM_UP))) / 2


def fast_arithmetic() -> contextlib.AbstractContextManager[Any]:
    """Returns a context in which convolutions run in bf16 where the CPU multiplies bf16 itself, else in fp32.

    There a step takes about half the time; weights, batch norm and losses stay fp32.
    """
    if cpu_flags() & _BF16_FLAGS:
        return torch.autocast("cpu", torch.bfloat16)
    return contextlib.nullcontext()


def save(content: dict[str, Any], file: Path) -> None:
    """Writes a file that is whole or not there at all."""
    cache.write_atomically(file, lambda partial: torch.save(content, partial))


def load_weights(network: nn.Module, file: Path) -> bool:
    """Returns whether `file` was there and fitted; the network then has its weights."""
    if not file.is_file():
        return False
    try:
        network.load_state_dict(torch.load(file, weights_only=True))
    except Exception:  # a torn or foreign file is as good as none: it is made again
        return False
    return True


def _resume(run: _Run, checkpoint: Path | None) -> None:
    if checkpoint is None or not checkpoint.is_file():
        return
    beginning = run.state()
    try:
        run.load(torch.load(checkpoint, weights_only=True))
    except Exception:  # torn by the crash that it is there for, or of another training
        run.load(beginning)
