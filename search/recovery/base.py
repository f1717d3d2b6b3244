"""Winning accuracy back after pruning: what a level of effort is given, and what it does."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from evaluators.artifact_builder import ArtifactBuilder
from evaluators.data import LabelledImages
from evaluators.quantization.int8 import Ranges
from evaluators.quantization.trainable_graph import TrainableGraph
from search.config.study import FittingSection, RecoverySection
from search.training.loop import Augment
from spaces import cache
from spaces.channels import SparsitySpace
from spaces.dynamic.exit_network import ExitNetwork

NO_PATTERNS: Mapping[str, str] = MappingProxyType({})
"""Every layer is dense."""

NO_RANGES: Ranges = MappingProxyType({})
"""Nothing was learned about activations."""

Say = Callable[[str, int, int], None]
"""Is told which long step is how far: its name, parts done, parts in all."""


@dataclass(frozen=True)
class QatContext:
    """What training needs to feel int8 as the target will run it.

    Args:
        builder: writes the files.
        graph: the same graph, in torch.
        calibration: images that activations' ranges are read from, `(n, c, h, w)`.
        key: of how int8 is made, and for which target.
    """

    builder: ArtifactBuilder
    graph: TrainableGraph
    calibration: NDArray[np.float32]
    key: str


@dataclass(frozen=True)
class RecoveryContext:
    """What a recovery works with.

    Args:
        network: the dense network with its exits, in evaluation mode.
        sparsity: says which channels a candidate keeps.
        train: what weights and batch statistics are learned from.
        augment: changes a batch of training images at random.
        settings: of the study.
        folder: where trained weights are kept.
        key: of the network, the data and all else that trained weights depend on.
        say: told about the steps that take long.
        int8: what trainings feel int8 with; None where the study does not ask for it.
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

    def file(self, kind: str, *parts: str) -> Path:
        """Returns the file for the weights that a training on this ground, with these settings, ends with."""
        return self.folder / "recovered" / f"{kind}-{cache.key(self.key, *parts)}.pt"


class Recovery(Protocol):
    """One level of effort: where a pruned network's weights come from, and what is done with them."""

    trains_per_candidate: ClassVar[bool]
    """Whether weights of each candidate are trained."""
    shares_weights: ClassVar[bool]
    """Whether one training serves all candidates."""
    effort: str
    """What is written into every record."""
    source: ExitNetwork
    """Pruned networks are slices of it, and its activations' ranges are theirs."""
    ranges: Ranges
    """Of activations, as they were learned for int8 together with the source; empty where they were not."""

    def recover(
        self, network: ExitNetwork, channels: Mapping[str, int], patterns: Mapping[str, str] = NO_PATTERNS
    ) -> None:
        """Wins accuracy back in place; what the patterns took away stays zero.

        Args:
            network: a slice of `source` with its patterns' zeros, in evaluation mode.
            channels: which it has.
            patterns: of zeros, by layer.
        """
        ...


def effort_of(settings: FittingSection) -> str:
    """Returns for how long a training goes: `2 epochs`, `200 steps`, `5 CPU min`, `20 epochs or 30 CPU min`."""
    if settings.minutes:
        return f"{settings.minutes:g} CPU min"
    steps = settings.steps
    epochs = settings.epochs
    limit = settings.at_most_minutes
    length = f"{steps} steps" if steps else f"{epochs:g} epoch{'s' * (epochs != 1)}"
    return f"{length} or {limit:g} CPU min" if limit else length
