"""LCCL: a low-cost layer beside each convolution predicts where the output is zero."""

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from spaces.dynamic.masks.base import LogitNorm, Mask, average
from spaces.dynamic.masks.hard_gate import Gate
from spaces.dynamic.masks.residual_blocks import Conv, Site

_OPEN_BIAS = 2.0
"""The initial bias of the normalisation: almost everything is open, and most factors are 1."""
_RARELY = 0.01
"""An output that is open at a smaller share of positions is closed permanently at the end of training."""
_LATELY = 0.02
"""The weight of the last batch in the moving average of open positions."""


class _Collaborative(nn.Module):
    """A 1x1 convolution, batch normalisation and a clamp between 0 and 1.

    Args:
        conv: the convolution beside it.
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
        """Returns the factors of the convolution's output, and 1 where a factor is not zero."""
        values = self.norm(self.conv(features))
        opened = self.gate(values)
        if self.training:
            self.often.lerp_(opened.detach().mean(dim=(0, 2, 3)), _LATELY)
        return values.float().clamp(0.0, 1.0), opened

    def shut(self, chosen: Tensor) -> None:
        """Closes the chosen outputs, `(outputs,)`, for all inputs."""
        with torch.no_grad():
            self.norm.weight[chosen] = 0.0
            self.norm.bias[chosen] = -1.0


class CollaborativeMask(Mask):
    """The output of each convolution is multiplied by its low-cost layer, whose zeros need not be computed.

    Zeros are those of the activation, so there is no threshold to change. They are counted here with the gradient of a
    gate, so that the loss on expected FLOPs can increase their number; the published method has no such loss, and does
    not clamp at 1. Without the clamp a trained network is ruined, because factors multiply from block to block
    (ResNet-20 on CIFAR-10 fell to 21% with 85% open; with a clamp at 1 it has 90% with 94% open).
    Source: Dong et al., More is Less: A More Complicated Network with Less Inference Complexity, 2017.
    """

    moves: ClassVar[bool] = False

    def __init__(self, site: Site, keep: float) -> None:
        super().__init__(site, keep)
        self.beside = nn.ModuleList([_Collaborative(conv) for conv in site.convs])

    def attach(self, block: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        """Multiplies the output of each convolution."""
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
        """None: zeros come from the activation, so there is no threshold to change and no noise to add."""
        return []

    def go_on(self, done: float) -> None:
        """Closes permanently, at the end of training, outputs that are rarely open.

        The batch normalisation after such an output has almost no running variance, so it would amplify the few open
        positions by hundreds, and again in the next block.
        """
        if done >= 1:
            for layer in self._layers:
                layer.shut(layer.often < _RARELY)

    def open(self) -> None:
        """Makes every low-cost layer return 1."""
        self._give(1.0)

    def close(self) -> None:
        """Makes every low-cost layer return 0."""
        self._give(-1.0)

    def _give(self, value: float) -> None:
        for layer in self._layers:
            nn.init.zeros_(layer.norm.weight)
            nn.init.constant_(layer.norm.bias, value)

    @property
    def _layers(self) -> list[_Collaborative]:
        return [layer for layer in self.beside if isinstance(layer, _Collaborative)]
