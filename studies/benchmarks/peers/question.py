"""What every contestant is given: a trained network, images, and how long it may take."""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluators.data import Splits
from search.config.study import Study
from search.loading.prepare import prepare
from search.training.loop import TrainingBatches, fast_arithmetic
from studies.benchmarks import outside
from studies.benchmarks.cifar_networks import InvertedResidual, study_on
from studies.cifar10.data import augment
from studies.cifar10.model import BasicBlock

MODELS = {
    "resnet20": "studies.cifar10.model:resnet20",
    "resnet56": "studies.benchmarks.cifar_networks:resnet56",
    "mobile": "studies.benchmarks.cifar_networks:mobile",
}
_STATISTICS = 1024
"""Training images that batch norm statistics are recomputed on."""


@dataclass(frozen=True)
class Question:
    """A trained network for CIFAR-10, and the time there is for one contestant.

    Args:
        name: of the network, in `MODELS`.
        study: as this program is asked.
        dense: trained, in evaluation mode.
        splits: images; the test images are for the final figures alone.
        minutes: of processor time.
        seed: of all chance.
        folder: for the contestant's files.
    """

    name: str
    study: Study
    dense: nn.Module
    splits: Splits
    minutes: float
    seed: int
    folder: Path

    @classmethod
    def asked(cls, name: str, data: str, weights: Path, minutes: float, seed: int, folder: Path) -> "Question":
        """Returns the question of a network whose trained weights lie in a file."""
        study = study_on(data, MODELS[name], weights)
        loaded, built = prepare(study, False, lambda *_: None, lambda _: None)
        return cls(name, study, built.network.eval(), loaded.splits, minutes, seed, folder)

    def dense_file(self) -> bytes:
        """Returns the dense network's ONNX file, as torch's own exporter writes it."""
        return self.float_file(self.dense)

    def float_file(self, network: nn.Module) -> bytes:
        """Returns a network's ONNX file in fp32."""
        return outside.exported(network.eval(), self.splits.calibration.images[:1])

    def int8_file(self, network: nn.Module, method: str = "Percentile") -> bytes:
        """Returns a network in int8 by ONNX Runtime's own `quantize_static`."""
        prepared = outside.preprocessed(self.float_file(network))
        return outside.statically_quantized(prepared, self.splits.calibration.images[:], method)


class Clock:
    """Processor time since it was made, all threads of this process together."""

    def __init__(self) -> None:
        self._begin = time.process_time()

    @property
    def minutes(self) -> float:
        """Minutes so far."""
        return (time.process_time() - self._begin) / 60


def finetune(question: Question, network: nn.Module, minutes: float, rate: float = 0.05) -> nn.Module:
    """Trains a network in place for so many processor minutes, as most people would, and returns it.

    SGD with Nesterov momentum, a cosine from `rate` after a short rise, half labels and half the dense network's
    answers, images shifted and mirrored.
    """
    optimizer = torch.optim.SGD(network.parameters(), rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    batches = TrainingBatches(question.splits.train, 128, question.seed, augment)
    clock = Clock()
    epoch, done = 0, 0.0
    network.train()
    while done < 1:
        for images, labels in batches.epoch(epoch):
            done = clock.minutes / minutes
            if done >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = rate * min(20 * done + 0.05, 0.5 + 0.5 * float(np.cos(np.pi * done)))
            with fast_arithmetic():
                with torch.no_grad():
                    teacher = question.dense(images).float()
                logits = network(images).float()
            optimizer.zero_grad()
            _loss(logits, teacher, labels).backward()
            optimizer.step()
        epoch += 1
    return network.eval()


def _loss(logits: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 2.0) -> Tensor:
    soft = F.kl_div(
        F.log_softmax(logits / temperature, 1), F.log_softmax(teacher / temperature, 1), reduction="batchmean",
        log_target=True,
    )  # fmt: skip
    return 0.5 * F.cross_entropy(logits, labels) + 0.5 * temperature**2 * soft


def recalibrate(question: Question, network: nn.Module) -> nn.Module:
    """Recomputes batch norm statistics in place, and returns the network."""
    images = torch.from_numpy(question.splits.train.images[:_STATISTICS])
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a mean over all batches
    network.train()
    with torch.no_grad():
        for part in images.split(256):
            network(part)
    for norm in norms:
        norm.momentum = 0.1
    return network.eval()


def accuracy(network: nn.Module, images: np.ndarray, labels: np.ndarray) -> float:
    """Returns the share of right answers in fp32."""
    with torch.no_grad():
        found = [network(part).argmax(1) for part in torch.from_numpy(images).split(500)]
    return float((torch.cat(found).numpy() == labels).mean())


def stages_of(network: nn.Module) -> list[tuple[str, list[int]]]:
    """Returns the path of each sequence of residual blocks, and which of its blocks return their input's shape.

    Blocks of a mobile network lie in one sequence; those of equal width count as a stage.
    """
    found = []
    for path, module in network.named_modules():
        if not isinstance(module, nn.Sequential):
            continue
        runs = [index for index, block in enumerate(module) if _returns_shape(block)]
        groups = np.split(np.array(runs), np.flatnonzero(np.diff(runs) > 1) + 1) if runs else []
        found += [(path, group.tolist()) for group in groups if len(group)]
    return found


def _returns_shape(block: nn.Module) -> bool:
    if isinstance(block, BasicBlock):
        return isinstance(block.shortcut, nn.Identity)
    return isinstance(block, InvertedResidual) and block.is_residual


def without_blocks(network: nn.Module, kept: Sequence[int]) -> nn.Module:
    """Returns a copy in which each stage of `stages_of` keeps so many of its removable blocks, evenly spread."""
    made = copy.deepcopy(network)
    gone: dict[str, set[int]] = {}
    for (path, blocks), count in zip(stages_of(network), kept, strict=True):
        stay = {blocks[round(place)] for place in np.linspace(0, len(blocks) - 1, count)} if count else set()
        gone.setdefault(path, set()).update(set(blocks) - stay)
    for path, indices in gone.items():
        sequence = made.get_submodule(path)
        assert isinstance(sequence, nn.Sequential)
        remaining = [block for index, block in enumerate(sequence) if index not in indices]
        parent, _, name = path.rpartition(".")
        setattr(made.get_submodule(parent), name, nn.Sequential(*remaining))
    return made
