"""The precision of each layer, as dimensions."""

from collections.abc import Iterable, Mapping, Sequence

from spaces.dimensions import Choice, Dimension, Value
from spaces.dynamic.exit_network import is_of_gate

PREFIX = "precision."


class PrecisionSpace:
    """The precision of each convolution and linear layer.

    Args:
        layers: their names.
        precisions: the precisions that the target can run, the reference first.
        allowed: the allowed precisions of some layers, in the same order; other layers may have all.
        storage: further precisions for storing weights, which make files smaller and not faster.
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
        """Returns one choice per layer; none for layers with a single allowed precision."""
        return {PREFIX + layer: Choice(left) for layer, left in self.allowed.items() if len(left) > 1}

    def read(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """Returns the precision of every layer."""
        return {layer: values[PREFIX + layer] if len(left) > 1 else left[0] for layer, left in self.allowed.items()}

    def nearest(self, layer: str, precision: str) -> str:
        """Returns the precision if the layer may have it, else the next higher one that it may have."""
        candidates = self.precisions[: self.precisions.index(precision) + 1] if precision in self.precisions else ()
        allowed = self.allowed[layer]
        return next((higher for higher in reversed(candidates) if higher in allowed), allowed[0])

    def without(self, allowed: Mapping[str, Sequence[str]]) -> "PrecisionSpace":
        """Returns the space with only these precisions allowed, and storage precisions as before."""
        left = {
            layer: [kind for kind in before if kind in allowed.get(layer, before) or kind in self.storage]
            for layer, before in self.allowed.items()
        }
        return PrecisionSpace(self.layers, self.computed, left, self.storage)


def uniform(layers: Iterable[str], precision: str, reference: str = "fp32") -> dict[str, str]:
    """Returns one precision for all layers except those of gates, which keep the reference precision.

    Gates cost little, and rounding to 8 bits flips close decisions: ResNet-20 on CIFAR-10 with the top-k gates of
    dynamic group convolution, all in int8, loses 14.6 points of accuracy; with gates in fp32 it loses 0.1.
    """
    return {layer: reference if is_of_gate(layer) else precision for layer in layers}
