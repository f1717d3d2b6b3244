"""The interface of a method of fake quantization."""

from typing import Protocol

from torch import Tensor

from search.recovery.quantizers.grid import ActivationQuantizer, WeightQuantizer


class Method(Protocol):
    """Creates the quantizers of one network."""

    def activation(self, low: float, high: float) -> ActivationQuantizer:
        """Returns the quantizer of a tensor with values between `low` and `high`; 0 is included."""
        ...

    def weight(self, weight: Tensor, axis: int, limit: int, per_channel: bool) -> WeightQuantizer:
        """Returns the quantizer of a folded weight; see `WeightQuantizer`."""
        ...
