"""Findings about a version, and the evidence for them.

An alarm explains lost accuracy or predicts a loss; a note is only worth knowing.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluators.diagnosis.comparison import Compared
from evaluators.diagnosis.tensor_errors import TensorErrors

LOW_DB = 20.0
"""Below this signal-to-noise ratio a layer is suspicious: the error is a tenth of the signal."""


@dataclass(frozen=True)
class Finding:
    """One finding.

    Args:
        kind: its kind, in a word or two.
        alarm: whether it explains lost accuracy, or predicts a loss.
        layer: the layer; empty if it is about the whole network.
        figure: the number that the finding is based on.
        text: the finding, in a sentence.
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
    """The comparison of a version with its reference, and facts about the version.

    Args:
        reference: the name of the reference.
        version: the name of the version.
        compared: the comparison, tensor by tensor.
        has_fp16: whether the version has fp16 tensors.
        has_8_bits: whether the version has int8 or fp8 tensors.
        targets: whether one version is compared on two targets.
        variances: the running variances of the network's batch norms, by name.
        norms: the running variances in the version's files, of batch norms that are not folded.
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
    def layers(self) -> tuple[TensorErrors, ...]:
        """The error statistics of each tensor, in the order in which they are computed."""
        return self.compared.layers

    def first_low(self) -> TensorErrors | None:
        """Returns the first tensor below `LOW_DB`; None if there is none."""
        return next((layer for layer in self.layers if layer.sqnr_db < LOW_DB), None)

    def noisiest(self) -> TensorErrors:
        """Returns the tensor that adds the most noise of its own, up to the first below `LOW_DB`."""
        return min(self.until_low(), key=lambda layer: layer.own_db)

    def until_low(self) -> tuple[TensorErrors, ...]:
        """Returns the tensors up to the first below `LOW_DB`; after it, most noise comes from earlier layers."""
        low = self.first_low()
        return self.layers[: self.layers.index(low) + 1] if low else self.layers


def ratio(decibels: float) -> str:
    """Returns a signal-to-noise ratio as text: `12.3 dB`, `exact`, or `not finite`."""
    if np.isfinite(decibels):
        return f"{decibels:.1f} dB"
    return "exact" if decibels > 0 else "not finite"
