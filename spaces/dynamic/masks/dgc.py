"""Dynamic group convolution: each group of outputs reads the most salient input channels of an image."""

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from spaces.dynamic.masks.base import Mask, constant
from spaces.dynamic.masks.residual_blocks import Conv, Site

HEADS = 4
"""The number of groups of outputs, each with its own choice of input channels."""
_FIRST, _LAST = 1 / 12, 3 / 4
"""The shares of training between which channels are removed, a few at a time."""


class _Saliency(nn.Module):
    """Global average pooling and two 1x1 convolutions: the saliency of each input channel.

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
        saliency: Tensor = self.clamp(self.tell(self.relu(self.reduce(self.pool(features)))))
        return saliency

    def give(self, value: float) -> None:
        """Gives every channel the same saliency, whatever the input."""
        nn.init.zeros_(self.tell.weight)
        nn.init.constant_(self.tell.bias, value)  # type: ignore[arg-type]


class GroupMask(Mask):
    """Each convolution's outputs are divided into heads, and each head reads the channels of the highest saliency.

    Their number is fixed, so every image costs the same. There is no shuffle of channels after the heads, because they
    start from a trained network and keep the order of its outputs.
    Source: Su et al., Dynamic Group Convolution for Accelerating Convolutional Neural Networks, 2020.
    """

    moves: ClassVar[bool] = False

    def __init__(self, site: Site, keep: float) -> None:
        super().__init__(site, keep)
        self._gated = [conv for conv in site.convs if conv.groups == 1 and conv.outputs % HEADS == 0]
        self.heads = nn.ModuleList([_Saliency(conv.inputs) for conv in self._gated for _ in range(HEADS)])
        self.share = keep

    def attach(self, block: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        """Turns each convolution into a grouped one, whose groups are the heads; its weights stay."""
        super().attach(block, layers)
        for number, conv in enumerate(self._gated):
            layers[conv.path].groups = HEADS  # type: ignore[assignment]
            layers[conv.path].register_forward_pre_hook(partial(self._read, number))

    def _read(self, number: int, _conv: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """Returns the inputs of all heads, concatenated along the channels."""
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
        """Removes channels, between the first twelfth and three quarters of training."""
        part = min(max((done - _FIRST) / (_LAST - _FIRST), 0.0), 1.0)
        self.share = 1 - part * (1 - self.keep)

    def open(self) -> None:
        """Lets every head read every channel unscaled."""
        self.share = 1.0
        with torch.no_grad():
            for number in range(len(self._gated)):
                for saliency in self._heads(number):
                    saliency.give(1.0)

    def close(self) -> None:
        """Leaves every head one channel."""
        self.share = 0.0


def _highest(saliency: Tensor, count: int) -> Tensor:
    """Returns the highest saliencies of each image, with 0 in place of the others, `(n, c, 1, 1)`."""
    indices = torch.topk(saliency, count, dim=1).indices
    chosen = torch.zeros_like(saliency).scatter(1, indices, 1.0)  # exactly `count`, also with ties
    return saliency * chosen
