"""How int8 is felt in training: a method of fake quantization is a file and a table line."""

import importlib
from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from search.recovery.quantizers.grid import ActivationQuantizer, WeightQuantizer

QUANTIZERS: Mapping[str, str] = {
    "lsq": "search.recovery.quantizers.lsq:Lsq",
    "pact": "search.recovery.quantizers.pact:Pact",
    "dorefa": "search.recovery.quantizers.dorefa:DoReFa",
}
"""Every method, by the name that a study gives it; loaded when asked for."""


class Method(Protocol):
    """Makes the quantizers of one network."""

    def activation(self, low: float, high: float) -> ActivationQuantizer:
        """Returns the quantizer of a tensor whose values lay between `low` and `high`, 0 included."""
        ...

    def weight(self, weight: Tensor, axis: int, limit: int, per_channel: bool) -> WeightQuantizer:
        """Returns the quantizer of a folded weight; see `WeightQuantizer`."""
        ...


def method(name: str) -> Method:
    """Returns the method of that name, one of `QUANTIZERS`."""
    module, _, attribute = QUANTIZERS[name].partition(":")
    made: Method = getattr(importlib.import_module(module), attribute)()
    return made
