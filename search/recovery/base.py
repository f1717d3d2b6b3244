"""Interfaces of accuracy recovery after pruning."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from evaluators.artifact_builder import ArtifactBuilder
from evaluators.data import LabelledImages
from evaluators.quantization.int8 import Ranges
from search.config.study import FinetuneSection, FittingSection, RecoverySection
from search.training.loop import Augment, Fitted, TrainingBatches
from search.training.teacher import VIEWS, Teacher
from spaces import cache
from spaces.channels import SparsitySpace
from spaces.depth import ALL_BLOCKS, DepthSpace
from spaces.dynamic.exit_network import ExitNetwork
from spaces.input_size import OWN_SIZE, InputSizeSpace

NO_PATTERNS: Mapping[str, str] = MappingProxyType({})
"""No layer has a pattern of zeros."""

NO_RANGES: Ranges = MappingProxyType({})
"""No ranges of activations were learned."""

Say = Callable[[str, int, int], None]
"""Called with the progress of a long step: its name, parts done, parts in all."""


@dataclass(frozen=True)
class QatContext:
    """What quantization-aware training needs to simulate int8 as on the target.

    Args:
        builder: exports artifacts, and returns their graphs in torch.
        calibration: images that ranges of activations are measured on, `(n, c, h, w)`.
        key: identifies the int8 scheme and the target, for cache keys.
    """

    builder: ArtifactBuilder
    calibration: NDArray[np.float32]
    key: str


@dataclass(frozen=True)
class RecoveryContext:
    """The network, images and settings that a recovery uses.

    Args:
        network: the dense network with its exits, in evaluation mode.
        sparsity: tells which channels a candidate keeps.
        train: images for weights and batch norm statistics.
        augment: augments a batch of training images at random.
        settings: of the study.
        folder: cache of trained weights.
        key: identifies the network, the data and all else that trained weights depend on.
        say: called with the progress of long steps.
        int8: what quantization-aware training needs; None if the study does not ask for it.
        depth: tells which blocks a candidate keeps.
        input_size: tells which sizes its input may have.
    """

    network: ExitNetwork
    sparsity: SparsitySpace
    train: LabelledImages
    augment: Augment | None
    settings: RecoverySection
    folder: Path
    key: str
    say: Say
    int8: QatContext | None = None
    depth: DepthSpace = ALL_BLOCKS
    input_size: InputSizeSpace = OWN_SIZE

    @cached_property
    def teacher(self) -> Teacher:
        """The dense network as the teacher of all trainings, with the answers that it has given."""
        return Teacher(self.network.trunk)

    def batches(self, settings: FittingSection) -> TrainingBatches:
        """Returns the training set in such batches that the teacher's answers are used again."""
        return TrainingBatches(self.train, settings.batch, settings.seed, self.augment, views=VIEWS)

    def file(self, kind: str, *parts: str) -> Path:
        """Returns the cache file for the result of a training in this context, with these settings."""
        return self.folder / "recovered" / f"{kind}-{cache.key(self.key, *parts)}.pt"


def form_key(network: ExitNetwork) -> str:
    """Returns the blocks that a network lacks and its input size, as part of a cache key; empty for neither."""
    removed = repr(network.removed_blocks) if network.removed_blocks else ""
    return removed + (f"@{network.input_size}" if network.input_size else "")


class Recovery(Protocol):
    """One level of recovery: where a pruned network's weights come from, and how they are recovered."""

    trains_per_candidate: ClassVar[bool]
    """Whether the weights of each candidate are trained separately."""
    shares_weights: ClassVar[bool]
    """Whether one training serves all candidates."""
    effort: str
    """The recovery as text, noted in every evaluation."""
    source: ExitNetwork
    """The network that pruned ones are cut from; they take over its ranges of activations."""
    ranges: Ranges
    """Ranges of activations that were learned together with the source; empty without such training."""
    trained: Fitted
    """What the training of weights that versions share took; nothing without such training."""

    def recover(
        self, network: ExitNetwork, channels: Mapping[str, int], patterns: Mapping[str, str] = NO_PATTERNS
    ) -> None:
        """Recovers accuracy in place; weights that patterns set to zero stay zero.

        Args:
            network: pruned from `source`, in evaluation mode.
            channels: number of channels that it keeps, by group.
            patterns: of zeros, by layer.
        """
        ...


def effort_of(settings: FittingSection) -> str:
    """Returns the length of a training as text: `2 epochs`, `5 CPU min`, `20 epochs or 30 CPU min`, `4 CPU min in 2
    rounds`.
    """
    rounds = settings.rounds if isinstance(settings, FinetuneSection) else 1
    times = 2**rounds - 1  # each is twice as long as the one before
    suffix = f" in {rounds} rounds" if rounds > 1 else ""
    if settings.minutes:
        minutes = settings.minutes * times
        return (f"{minutes:g} CPU min" if minutes >= 1 else f"{60 * minutes:.2g} CPU s") + suffix
    epochs = settings.epochs * times
    length = f"{settings.steps * times} steps" if settings.steps else f"{epochs:g} epoch{'s' * (epochs != 1)}"
    limit = settings.at_most_minutes
    return (f"{length} or {limit * times:g} CPU min" if limit else length) + suffix
