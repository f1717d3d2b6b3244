"""The grids of int8, as the files have them, and the gradients that pass through rounding."""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evaluators.quantization.int8 import QuantizedWeight

LOWEST, HIGHEST = -128, 127
"""What s8 holds: what lies beyond is clipped."""
SMALLEST_STEP = 1e-8
"""A scale in a file is no smaller."""


class Rounded(torch.autograd.Function):
    """Values on a grid: the step learns as in LSQ, values learn where they are not clipped.

    `v = round(clip(x / s, low, high)) * s`; `dv/ds = round(x / s) - x / s` inside, `low` and `high` beyond.
    Source: Esser et al., Learned Step Size Quantization, 2020, equations 1 to 5.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, step: Tensor, low: int, high: int, gradient_scale: float) -> Tensor:
        """Returns the values on the grid; the gradient of `step`, which broadcasts, is multiplied by the scale."""
        ctx.save_for_backward(values, step)
        ctx.edges = low, high, gradient_scale
        return (values / step).clamp_(low, high).round_().mul_(step)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        """Returns the gradients of the values and of the step."""
        values, step = ctx.saved_tensors
        low, high, gradient_scale = ctx.edges
        ratio = values / step
        inside = (ratio >= low) & (ratio <= high)
        learned = None
        if ctx.needs_input_grad[1]:
            change = ratio.clamp(low, high).round_().sub_(ratio.mul_(inside)).mul_(gradients[0])
            learned = change.sum_to_size(step.shape) * gradient_scale
        return gradients[0] * inside, learned, None, None, None


def rounded(values: Tensor, step: Tensor, low: int, high: int, gradient_scale: float = 1.0) -> Tensor:
    """Returns values on the grid of a step that broadcasts against them; see `Rounded`."""
    made: Tensor = Rounded.apply(values, step, low, high, gradient_scale)
    return made


class ActivationQuantizer(nn.Module, ABC):
    """Puts one activation tensor on its grid."""

    @abstractmethod
    def step(self) -> Tensor:
        """Returns the size of a step, positive, `()`."""

    def range(self) -> tuple[float, float]:
        """Returns the lowest and highest value, from which a file's scale becomes exactly this step."""
        edge = HIGHEST * float(self.step().detach())
        return -edge, edge


class WeightQuantizer(nn.Module, ABC):
    """Puts one folded weight on its grid, with a step per output channel or one for all.

    Args:
        weight: as it is before training.
        axis: of the output channels.
        limit: the largest value on the grid, in steps.
        per_channel: whether each output channel has a step of its own.
    """

    def __init__(self, weight: Tensor, axis: int, limit: int, per_channel: bool) -> None:
        super().__init__()
        self.axis = axis
        self.limit = limit
        self._others = [index for index in range(weight.ndim) if index != axis or not per_channel]

    def largest(self, weight: Tensor) -> Tensor:
        """Returns the largest magnitude of each output channel, or of all of them, with axes of size 1 elsewhere."""
        return weight.detach().abs().amax(self._others, keepdim=True).clamp_min(SMALLEST_STEP * self.limit)

    def start(self, weight: Tensor) -> Tensor:
        """Returns the weight that training begins with, so that what is deployed begins with `weight`."""
        return weight

    @abstractmethod
    def step(self, weight: Tensor) -> Tensor:
        """Returns the size of a step, positive, of a shape that broadcasts against the weight."""

    def grid(self, weight: Tensor) -> QuantizedWeight:
        """Returns what is deployed of a trained folded weight: s8 values and the scale of each output channel."""
        with torch.no_grad():
            values, step = self(weight), self.step(weight)
        scale = step.flatten().expand(weight.shape[self.axis])
        return QuantizedWeight((values / step).round().numpy().astype(np.int8), scale.numpy().astype(np.float32))


class LargestScaled(WeightQuantizer):
    """The step that a file has without any training: what is largest is the last step.

    Nothing but the weight learns, so any slice of a weight has its grid at once.
    Source: Jacob et al., Quantization and Training of Neural Networks, 2018, section 3 (straight-through gradients).
    """

    def step(self, weight: Tensor) -> Tensor:
        """Returns the largest magnitude, in steps of the limit."""
        return self.largest(weight) / self.limit

    def forward(self, weight: Tensor) -> Tensor:
        """Returns the weight on its grid."""
        return rounded(weight, self.step(weight), -self.limit, self.limit)
