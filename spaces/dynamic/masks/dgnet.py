"""DGNet: which tiles of a block are computed, and which of its hidden channels."""

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from spaces.dynamic.masks.base import LogitNorm, Mask, average, grid_of, spread
from spaces.dynamic.masks.hard_gate import Gate
from spaces.dynamic.masks.residual_blocks import Conv, Site

_OPEN_BIAS = 2.0
"""Gates start with this mean logit."""
_REDUCTION = 4


class SpatialGate(nn.Module):
    """Average pooling to tiles, and a 3x3 convolution to one logit for each.

    Args:
        site: the block.
        bias: the logit to begin with.
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
    """Global average pooling and two 1x1 convolutions, a quarter as wide between.

    Args:
        channels: of the block's input.
        outputs: channels to decide on.
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
    """A spatial gate for the whole block, and a channel gate for what each convolution but the last gives.

    All look at the block's input. What is masked is zero: the next convolution need not read it. As published, hidden
    features keep their positions in training, so that batch statistics are those of features and not of zeros: a block
    that few images need would have hardly any variance to be divided by.
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
        """Masks what each convolution but the first reads, and what the last one gives."""
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
        """Masks what the convolution of this number gave, before the next one reads it."""
        hidden = args[0] * self._hidden[number].to(args[0].dtype)
        if self.training:
            return (hidden,)
        # Detached, so that channels which may be cut are not tied to those of the block's output, masked by the same.
        return (hidden * spread(self._tiles.detach(), self.site.convs[number].size).to(hidden.dtype),)

    def _last(self, _module: nn.Module, _args: tuple[Any, ...], out: Tensor) -> Tensor:
        return out * spread(self._tiles, self.site.size).to(out.dtype)


def _product(conv: Conv, positions: Tensor, read: Tensor | None, given: Tensor | None) -> Tensor:
    """Returns the share of a convolution's multiply-adds: positions times channels read times channels given.

    Each channel that a depthwise convolution gives reads its own.
    """
    found = positions
    if given is not None:
        found = found * given
    if read is not None and conv.groups == 1:
        found = found * read
    return found
