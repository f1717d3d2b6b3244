"""What every exit of a version says of some images, so that any thresholds can be tried without running it again."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluators.inference.staged import CONFIDENCES, Routes
from evaluators.runtimes.base import Images


@dataclass(frozen=True)
class ExitOutputs:
    """The outputs of a version with all of its exits for `n` images, none of which left early.

    Args:
        logits: of each exit and, last, of the end, `(n, exits + 1, classes)`.
        confidence: the measure of confidence, a name in `CONFIDENCES`.
    """

    logits: Images
    confidence: str

    @property
    def confidences(self) -> NDArray[np.floating]:
        """How sure each exit and, last, the end is, `(n, exits + 1)`."""
        measure = CONFIDENCES[self.confidence]
        return np.stack([measure(self.logits[:, exit_]) for exit_ in range(self.logits.shape[1])], axis=1)

    def correct(self, labels: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Returns whether each exit and, last, the end is right, `(n, exits + 1)`, for labels `(n,)`."""
        right: NDArray[np.bool_] = self.logits.argmax(axis=2) == labels[:, None]
        return right

    def answers(self, thresholds: Sequence[float | None]) -> tuple[Images, Routes]:
        """Returns the logits `(n, classes)` that images are answered with, and the exits `(n,)` that answer them.

        Args:
            thresholds: of each exit; None for one that is left out, which is then not counted as an exit either.
        """
        used = [exit_ for exit_, threshold in enumerate(thresholds) if threshold is not None]
        limits = np.array([threshold for threshold in thresholds if threshold is not None])
        leaves = np.ones((len(self.logits), len(used) + 1), dtype=np.bool_)
        leaves[:, :-1] = self.confidences[:, used] >= limits
        routes = leaves.argmax(axis=1)
        columns = np.array([*used, self.logits.shape[1] - 1])
        return self.logits[np.arange(len(routes)), columns[routes]], routes
