"""DynConv: masks on the pixels of a block."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spaces.dynamic.masks.base import LogitNorm, Mask, average
from spaces.dynamic.masks.hard_gate import Gate
from spaces.dynamic.masks.residual_blocks import Site

_OPEN_BIAS = 2.0


class PixelMask(Mask):
    """One decision for each position of the block's output, from its input.

    The last convolution runs at open positions; each one before it runs where the next one reads: on the mask dilated
    by the kernel. That does not change the open outputs, so only the end of the block's branch is multiplied.
    Source: Verelst & Tuytelaars, Dynamic Convolutions: Exploiting Spatial Sparsity for Faster Inference, 2020.
    """

    def __init__(self, site: Site, keep: float) -> None:
        super().__init__(site, keep)
        stride = max(1, round(site.source[0] / site.size[0]))
        self.squeeze = nn.Conv2d(site.channels, 1, 3, stride, padding=1, bias=False)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.context = nn.Conv2d(site.channels, 1, 1, bias=False)
        self.norm = LogitNorm(1, _OPEN_BIAS)
        self.gate = Gate(temperature=1.0)
        self._positions = torch.empty(0)
        self._reads: list[_Reads] = []

    def attach(self, block: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        """Masks the output of the last convolution."""
        super().attach(block, layers)
        self._reads = [_Reads.of(layers[conv.path]) for conv in self.site.convs]
        layers[self.site.convs[-1].end].register_forward_hook(self._last)

    def look(self, features: Tensor) -> None:
        """Decides on positions."""
        self._positions = self.gate(self.norm(self.squeeze(features) + self.context(self.pool(features))))
        positions = self._positions
        for conv, reads in zip(reversed(self.site.convs), reversed(self._reads), strict=True):
            self.needed[conv.path] = average(positions)
            positions = reads.dilated(positions, conv.source)
        self.opened["pixels"] = average(self._positions)

    def _last(self, _module: nn.Module, _args: tuple[Any, ...], out: Tensor) -> Tensor:
        return out * self._positions.to(out.dtype)


class _Reads:
    """The positions of its input that a convolution reads.

    Args:
        kernel: its size.
        stride: of it.
        padding: of it.
        dilation: of it.
    """

    def __init__(
        self, kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...]
    ) -> None:
        self._kernel = kernel
        self._stride = stride
        self._padding = padding
        self._dilation = dilation

    @classmethod
    def of(cls, conv: nn.Module) -> "_Reads":
        """Returns those of a convolution."""
        assert isinstance(conv, nn.Conv2d)
        padding = conv.padding if isinstance(conv.padding, tuple) else (0, 0)
        return cls(conv.kernel_size, conv.stride, padding, conv.dilation)

    def dilated(self, positions: Tensor, size: tuple[int, int]) -> Tensor:
        """Returns the positions of the input that are read for some output positions, `(n, 1, *size)`."""
        ones = torch.ones(1, 1, *self._kernel, dtype=positions.dtype)
        rest = [
            size[axis]
            - ((positions.shape[2 + axis] - 1) * self._stride[axis] - 2 * self._padding[axis])
            - self._dilation[axis] * (self._kernel[axis] - 1)
            - 1
            for axis in (0, 1)
        ]
        read = F.conv_transpose2d(
            positions,
            ones,
            None,
            self._stride,
            self._padding,
            rest,
            dilation=self._dilation,
        )
        return read.clamp(max=1.0)
