"""DGNet: masks on the tiles of a block and on its hidden channels."""

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from spaces.dynamic.masks.base import LogitNorm, Mask, average, grid_of, spread
from spaces.dynamic.masks.hard_gate import Gate
from spaces.dynamic.masks.residual_blocks import Conv, Site

_OPEN_BIAS = 2.0
"""The initial mean logit of gates."""
_REDUCTION = 4


class SpatialGate(nn.Module):
    """Average pooling to tiles, and a 3x3 convolution to one logit per tile.

    Args:
        site: the block.
        bias: the initial logit.
    """

    def __init__(self, site: Site, bias: float = _OPEN_BIAS) -> None:
        super().__init__()
        tile = grid_of(site.size)
        self.grid = (-(-site.size[0] // tile), -(-site.size[1] // tile))
        self.pool = nn.AdaptiveAvgPool2d(self.grid)
        self.conv = nn.Conv2d(site.channels, 1, 3, padding=1, bias=False)
        self.norm = LogitNorm(1, bias)
        self.gate = Gate()

    def forward(self, features: Tensor) -> Tensor:
        """Returns decisions on tiles `(n, 1, a, b)` for a block's input."""
        decisions: Tensor = self.gate(self.norm(self.conv(self.pool(features))))
        return decisions


class ChannelGate(nn.Module):
    """Global average pooling and two 1x1 convolutions, with a quarter of the channels in between.

    Args:
        channels: of the block's input.
        outputs: the number of channels to decide on.
    """

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        hidden = max(channels // _REDUCTION, 4)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Conv2d(channels, hidden, 1, bias=False)
        self.norm = nn.BatchNorm2d(hidden)
        self.relu = nn.ReLU()
        self.decide = nn.Conv2d(hidden, outputs, 1, bias=False)
        self.spread = LogitNorm(outputs, _OPEN_BIAS)
        self.gate = Gate()

    def forward(self, features: Tensor) -> Tensor:
        """Returns decisions on channels `(n, outputs, 1, 1)` for a block's input."""
        hidden = self.relu(self.norm(self.reduce(self.pool(features))))
        decisions: Tensor = self.gate(self.spread(self.decide(hidden)))
        return decisions


class DualMask(Mask):
    """A spatial gate for the whole block, and a channel gate for the output of each convolution but the last.

    All gates read the block's input. Masked values are zero, so the next convolution need not read them. As published,
    positions of hidden features are not masked in training, so that batch statistics are those of features and not of
    zeros: a block that few images need would have almost no variance.
    Source: Li et al., Dynamic Dual Gating Neural Networks, 2021.
    """

    factors: ClassVar[int] = 2

    def __init__(self, site: Site, keep: float) -> None:
        super().__init__(site, keep)
        self.tiles = SpatialGate(site)
        self.channels = nn.ModuleList([ChannelGate(site.channels, conv.outputs) for conv in site.convs[:-1]])
        self._tiles = torch.empty(0)
        self._hidden: list[Tensor] = []

    def attach(self, block: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        """Masks the input of each convolution but the first, and the output of the last one."""
        super().attach(block, layers)
        for number, conv in enumerate(self.site.convs[1:]):
            layers[conv.path].register_forward_pre_hook(partial(self._hide, number))
        layers[self.site.convs[-1].end].register_forward_hook(self._last)

    def look(self, features: Tensor) -> None:
        """Decides on tiles and channels."""
        self._tiles = self.tiles(features)
        self._hidden = [gate(features) for gate in self.channels]
        opened = [average(spread(self._tiles, conv.size)) for conv in self.site.convs]
        kept = [average(channels) for channels in self._hidden]
        reads, gives = [None, *kept], [*kept, None]
        for conv, share, read, given in zip(self.site.convs, opened, reads, gives, strict=True):
            self.needed[conv.path] = _product(conv, share, read, given)
        self.opened["tiles"] = opened[-1]
        self.opened |= {f"channels{number}": share for number, share in enumerate(kept)}

    def _hide(self, number: int, _conv: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """Masks the output of the convolution of this number, before the next one reads it."""
        hidden = args[0] * self._hidden[number].to(args[0].dtype)
        if self.training:
            return (hidden,)
        # Detached, so that hidden channels are not in one dependency group with those of the block's output.
        return (hidden * spread(self._tiles.detach(), self.site.convs[number].size).to(hidden.dtype),)

    def _last(self, _module: nn.Module, _args: tuple[Any, ...], out: Tensor) -> Tensor:
        return out * spread(self._tiles, self.site.size).to(out.dtype)


def _product(conv: Conv, positions: Tensor, read: Tensor | None, given: Tensor | None) -> Tensor:
    """Returns the share of a convolution's multiply-adds: positions times input channels times output channels.

    For a depthwise convolution only output channels count, because each reads only its own input channel.
    """
    share = positions
    if given is not None:
        share = share * given
    if read is not None and conv.groups == 1:
        share = share * read
    return share
