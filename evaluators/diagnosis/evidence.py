"""What findings about a version are drawn from, and what a finding is.

An alarm is what explains lost accuracy or will cost some; a note is worth knowing.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluators.diagnosis.comparison import Compared
from evaluators.diagnosis.tensor_errors import Figures

LOW_DB = 20.0
"""Below this ratio of signal to noise a layer is worth a look: the error is a tenth of the signal."""


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Args:
        kind: what it is, in a word or two.
        alarm: whether it explains lost accuracy, or will cost some.
        layer: where; empty where it is about the whole network.
        figure: the number that tells.
        text: what was found, in a sentence.
        remedy: what to do about it.
    """

    kind: str
    alarm: bool
    layer: str
    figure: float
    text: str
    remedy: str

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready copy, in which a figure that is not finite is null."""
        return asdict(self) | {"figure": self.figure if np.isfinite(self.figure) else None}


@dataclass(frozen=True)
class Evidence:
    """What findings are drawn from.

    Args:
        reference: what the version is compared with, in a word.
        version: what is examined, in a word.
        compared: the figures.
        halves: whether any of the version is in fp16.
        eights: whether any of it is in int8 or fp8.
        targets: whether one version is compared on two targets.
        variances: running variances of the network's batch norms, by name.
        norms: running variances of those that are still nodes in the version's files, as they are there.
    """

    reference: str
    version: str
    compared: Compared
    has_fp16: bool
    has_8_bits: bool
    targets: bool
    variances: Mapping[str, NDArray[np.generic]]
    norms: Mapping[str, NDArray[np.generic]]

    @property
    def layers(self) -> tuple[Figures, ...]:
        """The figures of each tensor, in the order in which they are computed."""
        return self.compared.layers

    def first_low(self) -> Figures | None:
        """Returns the first tensor below `LOW_DB`; None where there is none."""
        return next((layer for layer in self.layers if layer.sqnr_db < LOW_DB), None)

    def guilty(self) -> Figures:
        """Returns the tensor that adds most noise of its own, up to the first that is too noisy."""
        return min(self.until_low(), key=lambda layer: layer.own_db)

    def until_low(self) -> tuple[Figures, ...]:
        """Returns the tensors up to the first below `LOW_DB`: behind it little is a layer's own doing."""
        low = self.first_low()
        return self.layers[: self.layers.index(low) + 1] if low else self.layers


def ratio(decibels: float) -> str:
    """Returns a ratio of signal to noise as people read it: `12.3 dB`, `exact`, or `not finite`."""
    if np.isfinite(decibels):
        return f"{decibels:.1f} dB"
    return "exact" if decibels > 0 else "not finite"
