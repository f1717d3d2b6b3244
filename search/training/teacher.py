"""A trained network as the teacher of others."""

from collections.abc import Hashable

import torch
from torch import Tensor, nn

from search.training.loop import Batch, fast_arithmetic

VIEWS = 4
"""Ways in which each image is augmented where a teacher answers it."""
_MEMORY = 2**28
"""Bytes of answers that are kept at most."""


class Teacher:
    """A trained network whose answers others learn. A batch that comes again is answered once.

    Versions that are trained after one another, and shared weights before them, see the same batches. To answer these
    anew takes most of a narrow version's training: two thirds where it has a sixth of the teacher's FLOPs.
    Source: Shen & Xing, A Fast Knowledge Distillation Framework, 2022 (answers of the teacher are kept by view).

    Args:
        network: in evaluation mode.
        memory: bytes of answers that are kept; later ones are computed again.
    """

    def __init__(self, network: nn.Module, memory: int = _MEMORY) -> None:
        self._network = network
        self._left = memory
        self._kept: dict[Hashable, Tensor] = {}

    def logits(self, batch: Batch) -> Tensor:
        """Returns the teacher's logits for a batch, `(n, classes)`."""
        if batch.key in self._kept:
            return self._kept[batch.key].float()
        with torch.no_grad(), fast_arithmetic():
            logits: Tensor = self._network(batch.images)
        if batch.key is not None and (size := logits.nbytes) <= self._left:
            self._left -= size
            self._kept[batch.key] = logits
        return logits.float()
