"""The size that images are resized to before the network, as a dimension."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from spaces.dimensions import Choice, Value
from spaces.dynamic.exit_network import ExitNetwork

SIZE = "input.size"
"""The name of the dimension."""
_AUTO = (1 / 2, 3 / 4)
"""Shares of the images' own size that are offered beside it."""
_MULTIPLES = (32, 16, 8, 4)
"""Sizes are the nearest multiple of the first of these that is at most a fifth of the images' own size."""

Proof = Callable[[ExitNetwork], object | None]
"""Returns why a network at a smaller size cannot be used; None if it can."""


class InputSizeSpace:
    """The height and width of square input images.

    Args:
        sizes: ascending; the images' own size is the last one. None, or only one, for no choice.
    """

    def __init__(self, sizes: Sequence[int] = ()) -> None:
        self.sizes = tuple(sizes)

    def dimensions(self) -> dict[str, Choice]:
        """Returns one dimension if there is a choice of sizes."""
        return {SIZE: Choice(tuple(map(str, self.sizes)))} if len(self.sizes) > 1 else {}

    def read(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """Returns the size, if there is a choice.

        Raises:
            KeyError: the dimension has no value.
        """
        return {name.partition(".")[2]: values[name] for name in self.dimensions()}

    def size(self, values: Mapping[str, Value]) -> int | None:
        """Returns the size; None for the images' own."""
        size = int(values[SIZE]) if self.dimensions() else None
        return None if size is None or size == self.sizes[-1] else size

    def nearest(self, share: float) -> str:
        """Returns the size nearest to a share of the images' own."""
        return str(min(self.sizes, key=lambda size: abs(size - share * self.sizes[-1]), default=0))


OWN_SIZE = InputSizeSpace()
"""Images keep their size."""


def automatic_sizes(own: int) -> tuple[int, ...]:
    """Returns three sizes, from about half of the images' own size up to it."""
    step = next((multiple for multiple in _MULTIPLES if multiple <= own / 5), 1)
    return (*(max(round(share * own / step) * step, 1) for share in _AUTO), own)


def usable_sizes(
    network: ExitNetwork, image: Tensor, sizes: Sequence[int], proof: Proof = lambda _: None
) -> tuple[int, ...]:
    """Returns the sizes at which a network answers, the images' own last: at others it cannot run.

    Args:
        network: the dense network, in evaluation mode.
        image: one input, `(1, c, h, w)`.
        sizes: to try; none is larger than the images' own.
        proof: a further test of the network at a size, such as whether its ONNX file has the same outputs.
    """
    own = int(image.shape[-1])
    if image.shape[-2] != own:
        return (own,)
    smaller = [size for size in sorted(set(sizes)) if size < own and _answers(at_size(network, size), image, proof)]
    return (*smaller, own)


def at_size(network: ExitNetwork, size: int | None) -> ExitNetwork:
    """Returns the network at an input size, which shares its weights with it."""
    made = network.__new__(type(network))
    made.__dict__ = dict(network.__dict__)
    made.input_size = size
    return made


def _answers(network: ExitNetwork, image: Tensor, proof: Proof) -> bool:
    try:
        with torch.no_grad():
            expected = [logits.shape for logits in at_size(network, None)(image)]
            found = [logits.shape for logits in network(image)]
    except Exception:  # of any kind: a classifier of fixed size, a pooling larger than its features
        return False
    return found == expected and proof(network) is None
