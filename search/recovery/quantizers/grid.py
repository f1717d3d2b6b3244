"""Grids of int8 as in exported files, with gradients through rounding."""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evaluators.quantization.int8 import QuantizedWeight

LOWEST, HIGHEST = -128, 127
"""Limits of signed int8; values beyond are clipped."""
SMALLEST_STEP = 1e-8
"""Lower limit of a scale in a file."""


class Rounded(torch.autograd.Function):
    """Rounds values to a grid; the step has the gradient of LSQ, values one where they are not clipped.

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
        step_gradient = None
        if ctx.needs_input_grad[1]:
            change = ratio.clamp(low, high).round_().sub_(ratio.mul_(inside)).mul_(gradients[0])
            step_gradient = change.sum_to_size(step.shape) * gradient_scale
        return gradients[0] * inside, step_gradient, None, None, None


def rounded(values: Tensor, step: Tensor, low: int, high: int, gradient_scale: float = 1.0) -> Tensor:
    """Returns values on the grid of a step that broadcasts against them; see `Rounded`."""
    result: Tensor = Rounded.apply(values, step, low, high, gradient_scale)
    return result


class ActivationQuantizer(nn.Module, ABC):
    """Puts one activation tensor on its grid."""

    @abstractmethod
    def step(self) -> Tensor:
        """Returns the step size, positive, `()`."""

    def range(self) -> tuple[float, float]:
        """Returns the lowest and highest value; the scale that an export derives from them is exactly this step."""
        edge = HIGHEST * float(self.step().detach())
        return -edge, edge


class WeightQuantizer(nn.Module, ABC):
    """Puts one folded weight on its grid, with a step per output channel or one for all.

    Args:
        weight: before training.
        axis: of the output channels.
        limit: largest value of the grid, in steps.
        per_channel: whether each output channel has its own step.
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
        """Returns the weight to start training with, so that its quantized form starts at `weight`."""
        return weight

    @abstractmethod
    def step(self, weight: Tensor) -> Tensor:
        """Returns the step size, positive; it broadcasts against the weight."""

    def grid(self, weight: Tensor) -> QuantizedWeight:
        """Returns the deployed form of a trained folded weight: int8 values, and the scale of each output channel."""
        with torch.no_grad():
            values, step = self(weight), self.step(weight)
        scale = step.flatten().expand(weight.shape[self.axis])
        return QuantizedWeight((values / step).round().numpy().astype(np.int8), scale.numpy().astype(np.float32))


class LargestScaled(WeightQuantizer):
    """The step of an export without training: the largest magnitude is the last step.

    The step is not trained, so every slice of a weight has its own grid at once.
    Source: Jacob et al., Quantization and Training of Neural Networks, 2018, section 3 (straight-through gradients).
    """

    def step(self, weight: Tensor) -> Tensor:
        """Returns the largest magnitude divided by the limit."""
        return self.largest(weight) / self.limit

    def forward(self, weight: Tensor) -> Tensor:
        """Returns the weight on its grid."""
        return rounded(weight, self.step(weight), -self.limit, self.limit)
