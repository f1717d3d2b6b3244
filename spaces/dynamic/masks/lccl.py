"""LCCL: a low-cost layer beside each convolution says where its output is zero anyway."""

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from spaces.dynamic.masks.base import LogitNorm, Mask, average
from spaces.dynamic.masks.hard_gate import Gate
from spaces.dynamic.masks.residual_blocks import Conv, Site

_OPEN_BIAS = 2.0
"""Of the normalisation to begin with, so that nearly everything is open and most is worth 1."""
_RARELY = 0.01
"""An output that is open at fewer positions than this share is closed for good at the end of a training."""
_LATELY = 0.02
"""How much the last batch counts in how often an output is open."""


class _Collaborative(nn.Module):
    """A 1x1 convolution, batch normalisation and a clamp between 0 and 1.

    Args:
        conv: that it works beside.
    """

    often: Tensor
    """The share of positions at which each output was open in the last batches of a training, `(outputs,)`."""

    def __init__(self, conv: Conv) -> None:
        super().__init__()
        stride = max(1, round(conv.source[0] / conv.size[0]))
        self.conv = nn.Conv2d(conv.inputs, conv.outputs, 1, stride, bias=False)
        self.norm = LogitNorm(conv.outputs, _OPEN_BIAS)
        self.gate = Gate()
        self.register_buffer("often", torch.ones(conv.outputs))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Returns what the convolution's output is multiplied by, and 1 where that is not zero."""
        values = self.norm(self.conv(features))
        opened = self.gate(values)
        if self.training:
            self.often.lerp_(opened.detach().mean(dim=(0, 2, 3)), _LATELY)
        return values.float().clamp(0.0, 1.0), opened

    def shut(self, chosen: Tensor) -> None:
        """Closes some outputs for all inputs, by `(outputs,)`."""
        with torch.no_grad():
            self.norm.weight[chosen] = 0.0
            self.norm.bias[chosen] = -1.0


class CollaborativeMask(Mask):
    """What each convolution gives is multiplied by its low-cost layer, whose zeros need not be computed.

    Its zeros are the activation's own, so there is no threshold to move. They are counted here with the gradient of a
    gate, so that the loss on expected FLOPs can ask for more of them; the published method takes what comes, and does
    not end at 1. Begun from a trained network that ruins it: values near zero differ by factors, which multiply from
    block to block (ResNet-20 on CIFAR-10 fell to 21% with 85% open; with an end at 1 it has 90% with 94% open).
    Source: Dong et al., More is Less: A More Complicated Network with Less Inference Complexity, 2017.
    """

    moves: ClassVar[bool] = False

    def __init__(self, site: Site, keep: float) -> None:
        super().__init__(site, keep)
        self.beside = nn.ModuleList([_Collaborative(conv) for conv in site.convs])

    def attach(self, block: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        """Multiplies what each convolution gives."""
        super().attach(block, layers)
        for number, conv in enumerate(self.site.convs):
            layers[conv.path].register_forward_hook(partial(self._multiply, number))

    def _multiply(self, number: int, _conv: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        values, opened = self.beside[number](args[0])
        self.needed[self.site.convs[number].path] = share = average(opened)
        self.opened[f"outputs{number}"] = share
        multiplied: Tensor = out * values.to(out.dtype)
        return multiplied

    @property
    def gates(self) -> list[Gate]:
        """None: what is zero is the activation's own doing, so no threshold moves it and no noise may blur it."""
        return []

    def go_on(self, done: float) -> None:
        """Closes for good, at the end of the training, what is open rarely.

        The batch normalisation behind it would make much of such a position: where the running variance is next to
        nothing, it is multiplied by hundreds, and by as much again in the next block.
        """
        if done >= 1:
            for layer in self._layers:
                layer.shut(layer.often < _RARELY)

    def open(self) -> None:
        """Makes every low-cost layer give 1."""
        self._give(1.0)

    def close(self) -> None:
        """Makes every low-cost layer give 0."""
        self._give(-1.0)

    def _give(self, value: float) -> None:
        for layer in self._layers:
            nn.init.zeros_(layer.norm.weight)
            nn.init.constant_(layer.norm.bias, value)

    @property
    def _layers(self) -> list[_Collaborative]:
        return [layer for layer in self.beside if isinstance(layer, _Collaborative)]
