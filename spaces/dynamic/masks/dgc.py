"""Dynamic group convolution: each group of outputs reads the input channels that count for this image."""

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from spaces.dynamic.masks.base import Mask, constant
from spaces.dynamic.masks.residual_blocks import Conv, Site

HEADS = 4
"""Groups of outputs, each with a choice of its own."""
_FIRST, _LAST = 1 / 12, 3 / 4
"""The shares of a training between which channels are taken away, a few at a time."""


class _Saliency(nn.Module):
    """Global average pooling and two 1x1 convolutions: how much each input channel counts.

    Args:
        channels: of the input.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // (8 if channels < 80 else 16), 2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Conv2d(channels, hidden, 1, bias=False)
        self.relu = nn.ReLU()
        self.tell = nn.Conv2d(hidden, channels, 1)
        self.clamp = nn.ReLU()
        nn.init.normal_(self.tell.weight, std=0.05)
        nn.init.constant_(self.tell.bias, 1.0)  # type: ignore[arg-type]

    def forward(self, features: Tensor) -> Tensor:
        """Returns `(n, channels, 1, 1)`."""
        told: Tensor = self.clamp(self.tell(self.relu(self.reduce(self.pool(features)))))
        return told

    def give(self, value: float) -> None:
        """Makes every channel count alike, whatever the input."""
        nn.init.zeros_(self.tell.weight)
        nn.init.constant_(self.tell.bias, value)  # type: ignore[arg-type]


class GroupMask(Mask):
    """Each convolution's outputs are divided into heads, and each head reads the channels of the highest saliency.

    How many is fixed, so every image costs the same. Begun from a trained network there is no shuffle of channels
    behind the heads: they are its own outputs, in their order.
    Source: Su et al., Dynamic Group Convolution for Accelerating Convolutional Neural Networks, 2020.
    """

    moves: ClassVar[bool] = False

    def __init__(self, site: Site, keep: float) -> None:
        super().__init__(site, keep)
        self._gated = [conv for conv in site.convs if conv.groups == 1 and conv.outputs % HEADS == 0]
        self.heads = nn.ModuleList([_Saliency(conv.inputs) for conv in self._gated for _ in range(HEADS)])
        self.share = keep

    def attach(self, block: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        """Makes one grouped convolution of each, whose groups are the heads; its weights stay as they are."""
        super().attach(block, layers)
        for number, conv in enumerate(self._gated):
            layers[conv.path].groups = HEADS  # type: ignore[assignment]
            layers[conv.path].register_forward_pre_hook(partial(self._read, number))

    def _read(self, number: int, _conv: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """Returns what each head reads, one after the other."""
        described, features = self._gated[number], args[0]
        kept = self._kept(described)
        self.needed[described.path] = constant(kept / described.inputs, features)
        chosen = [_highest(saliency(features), kept).to(features.dtype) for saliency in self._heads(number)]
        return (torch.cat([features * each for each in chosen], dim=1),)

    def _heads(self, number: int) -> list[_Saliency]:
        """Returns the heads of one convolution."""
        heads = [head for head in self.heads if isinstance(head, _Saliency)]
        return heads[number * HEADS : (number + 1) * HEADS]

    def _kept(self, conv: Conv) -> int:
        return max(1, round(self.share * conv.inputs))

    def go_on(self, done: float) -> None:
        """Takes channels away, between the first twelfth and three quarters of the training."""
        part = min(max((done - _FIRST) / (_LAST - _FIRST), 0.0), 1.0)
        self.share = 1 - part * (1 - self.keep)

    def open(self) -> None:
        """Lets every head read every channel as it is."""
        self.share = 1.0
        with torch.no_grad():
            for number in range(len(self._gated)):
                for saliency in self._heads(number):
                    saliency.give(1.0)

    def close(self) -> None:
        """Leaves every head one channel."""
        self.share = 0.0


def _highest(saliency: Tensor, count: int) -> Tensor:
    """Returns the highest numbers of each image as they are, and 0 in place of the others, `(n, c, 1, 1)`."""
    places = torch.topk(saliency, count, dim=1).indices
    chosen = torch.zeros_like(saliency).scatter(1, places, 1.0)  # exactly so many, where some are alike too
    return saliency * chosen
