"""CGNet: the partial sums over a convolution's first input channels decide where the others are needed."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spaces.dynamic.masks.base import LogitNorm, Mask, average
from spaces.dynamic.masks.hard_gate import Gate
from spaces.dynamic.masks.residual_blocks import Conv, Site

_PARTS = 4
"""The base path reads the first of this number of equal parts of the input channels."""
_OPEN_BIAS = 2.0


class _PartialSum(nn.Module):
    """Gates on partial sums: where the sum over the first channels is high enough, the others are added.

    Args:
        conv: the convolution.
    """

    def __init__(self, conv: Conv) -> None:
        super().__init__()
        self.norm = LogitNorm(conv.outputs, _OPEN_BIAS)
        self.gate = Gate(temperature=0.5)

    def forward(self, sums: Tensor) -> Tensor:
        """Returns 1 where all channels are needed, in the shape of the partial sums."""
        decisions: Tensor = self.gate(self.norm(sums))
        return decisions


class PartialSumMask(Mask):
    """Gates every convolution of the block by its own partial sums, so that the base path is never wasted.

    The published loss pulls each channel's threshold towards a target; here the loss on expected FLOPs moves them, as
    for the other methods. `move` raises all thresholds by the same amount.
    Source: Hua et al., Channel Gating Neural Networks, 2019.
    """

    def __init__(self, site: Site, keep: float) -> None:
        super().__init__(site, keep)
        self._gated = [conv for conv in site.convs if conv.groups == 1 and conv.inputs >= _PARTS]
        self.sums = nn.ModuleList([_PartialSum(conv) for conv in self._gated])

    def attach(self, block: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        """Gates each convolution."""
        super().attach(block, layers)
        for number, conv in enumerate(self._gated):
            layers[conv.path].register_forward_hook(partial(self._gate, number))

    def _gate(self, number: int, conv: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        assert isinstance(conv, nn.Conv2d)
        base = conv.in_channels // _PARTS
        first = torch.arange(conv.in_channels).view(1, -1, 1, 1) < base
        # The same weight on an input whose other channels are zero, so that the file has the weight only once.
        sums = conv._conv_forward(args[0] * first.to(args[0].dtype), conv.weight, None)
        decisions = self.sums[number](sums)
        share, path = average(decisions), self._gated[number].path
        part = base / conv.in_channels
        self.needed[path] = part + (1 - part) * share
        self.opened[f"sums{number}"] = share
        bias = 0.0 if conv.bias is None else conv.bias.view(1, -1, 1, 1)
        return (
            torch.where(decisions > 0, out, sums + bias) if not self.training else _mixed(decisions, out, sums + bias)
        )


def _mixed(decisions: Tensor, whole: Tensor, part: Tensor) -> Tensor:
    """Returns one or the other by the decisions, with a gradient for them."""
    opened = decisions.to(whole.dtype)
    return opened * whole + (1 - opened) * part
