"""FLOPs of networks with masks, which decide for each image what part of a layer is computed."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evaluators.flops.evaluator import count_by_module
from spaces.dynamic.masks.base import NAME, each_opened, masks_of, needed

_BATCH = 100


class MaskedFlops:
    """Counts the FLOPs per image of a network with masks.

    Args:
        plain: the network without masks, in evaluation mode.
        masked: the same with masks.
        image: one input, `(1, c, h, w)`.
    """

    def __init__(self, plain: nn.Module, masked: nn.Module, image: Tensor) -> None:
        self._layers = count_by_module(plain, image)
        self.dense = sum(self._layers.values())
        """FLOPs without masks."""
        own = count_by_module(masked, image)
        self.gates = sum(count for path, count in own.items() if NAME in path.split("."))
        """FLOPs of the gates themselves."""

    def per_image(self, shares: Mapping[str, Tensor]) -> Tensor:
        """Returns the FLOPs that each image needs, `(n,)`, with the gradients of the shares.

        Args:
            shares: the share of each masked convolution's multiply-adds that each image needs, `(n,)`, by its path.
        """
        saved = [self._layers[path] * (1 - share) for path, share in shares.items()]
        return self.dense + self.gates - torch.stack(saved).sum(dim=0)


@dataclass(frozen=True)
class Need:
    """Predictions and FLOPs per image of a network with masks.

    Args:
        answers: the predicted class of each image, `(n,)`.
        flops: of each image, `(n,)`.
        opened: the share of open gates, by mask and kind, `(n,)` each.
    """

    answers: NDArray[np.int64]
    flops: NDArray[np.float64]
    opened: Mapping[str, NDArray[np.float64]]


def measure_need(network: nn.Module, flops: MaskedFlops, images: NDArray[np.float32]) -> Need:
    """Returns predictions and FLOPs per image of a network with masks, in evaluation mode."""
    answers = []
    counts = []
    opened = dict[str, list[Tensor]]()
    with torch.no_grad():
        for batch in _batches(images):
            answers.append(network(batch).argmax(dim=1))
            masks = masks_of(network)
            counts.append(flops.per_image(needed(masks)))
            for mask, kind, share in each_opened(masks):
                opened.setdefault(f"{mask.site.block} {kind}", []).append(share)
    return Need(
        torch.cat(answers).numpy(),
        torch.cat(counts).double().numpy(),
        {name: torch.cat(shares).double().numpy() for name, shares in opened.items()},
    )


def _batches(images: NDArray[np.float32]) -> Iterator[Tensor]:
    for start in range(0, len(images), _BATCH):
        yield torch.from_numpy(np.ascontiguousarray(images[start : start + _BATCH]))
