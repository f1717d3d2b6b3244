"""One precision per layer, among those that the target runs."""

from collections.abc import Mapping, Sequence

from torch import nn

from spaces.network import layer_name
from spaces.space import Choice, Dimension, Value

PREFIX = "precision."


def quantizable_layers(network: nn.Module) -> list[str]:
    """Returns the names of the convolutions and linear layers, in the order in which they are registered."""
    return [layer_name(path) for path, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]


class PrecisionSpace:
    """The precision of each convolution and linear layer.

    Args:
        layers: their names.
        precisions: what the target can run, the reference first.
    """

    def __init__(self, layers: Sequence[str], precisions: Sequence[str]) -> None:
        self.layers = tuple(layers)
        self.precisions = tuple(precisions)

    def dimensions(self) -> dict[str, Dimension]:
        """Returns one choice per layer; none where the target has one precision only."""
        if len(self.precisions) == 1:
            return {}
        return {PREFIX + layer: Choice(self.precisions) for layer in self.layers}

    def read(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """Returns the precision of every layer."""
        if len(self.precisions) == 1:
            return dict.fromkeys(self.layers, self.precisions[0])
        return {layer: values[PREFIX + layer] for layer in self.layers}
