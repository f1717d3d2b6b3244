"""LCCL: a low-cost layer beside each convolution says where its output is zero anyway."""

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from spaces.masks.gate import Gate
from spaces.masks.mask import LogitNorm, Mask, average
from spaces.masks.sites import Conv, Site

_OPEN_BIAS = 2.0
"""Of the normalisation to begin with, so that nearly everything is open and most is worth 1."""


class _Collaborative(nn.Module):
    """A 1x1 convolution, batch normalisation and a clamp between 0 and 1.

    Args:
        conv: that it works beside.
    """

    def __init__(self, conv: Conv) -> None:
        super().__init__()
        stride = max(1, round(conv.source[0] / conv.size[0]))
        self.conv = nn.Conv2d(conv.inputs, conv.outputs, 1, stride, bias=False)
        self.norm = LogitNorm(conv.outputs, _OPEN_BIAS)
        self.gate = Gate()

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Returns what the convolution's output is multiplied by, and 1 where that is not zero."""
        values = self.norm(self.conv(features))
        opened = self.gate(values)
        return values.float().clamp(0.0, 1.0), opened


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

    def open(self) -> None:
        """Makes every low-cost layer give 1."""
        self._give(1.0)

    def close(self) -> None:
        """Makes every low-cost layer give 0."""
        self._give(-1.0)

    def _give(self, value: float) -> None:
        for layer in self.beside:
            assert isinstance(layer, _Collaborative)
            nn.init.zeros_(layer.norm.weight)
            nn.init.constant_(layer.norm.bias, value)
