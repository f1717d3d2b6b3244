"""Learned step sizes, for activations and for weights.

Source: Esser et al., Learned Step Size Quantization, 2020. Steps start at their calibrated values, because the paper's
initialization is for few bits.
"""

import torch
from torch import Tensor, nn

from search.recovery.quantizers.grid import (
    HIGHEST,
    LOWEST,
    SMALLEST_STEP,
    ActivationQuantizer,
    WeightQuantizer,
    rounded,
)


def gradient_scale(values: int, highest: int) -> float:
    """Returns the factor of a step's gradient, `1 / sqrt(values * highest)`, which balances it with the weights'.

    Args:
        values: number of values that share the step: weights, or features of one image.
        highest: largest value of the grid.
    """
    return float((values * highest) ** -0.5)


class LsqActivation(ActivationQuantizer):
    """One learned step for a tensor."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.size = nn.Parameter(torch.tensor(max(-low, high, SMALLEST_STEP * HIGHEST) / HIGHEST))

    def step(self) -> Tensor:
        """Returns the learned step."""
        return self.size.abs().clamp_min(SMALLEST_STEP)

    def forward(self, features: Tensor) -> Tensor:
        """Returns the features `(n, ...)` on the grid."""
        return rounded(features, self.step(), LOWEST, HIGHEST, gradient_scale(features[0].numel(), HIGHEST))


class LsqWeight(WeightQuantizer):
    """Learned steps of a weight."""

    def __init__(self, weight: Tensor, axis: int, limit: int, per_channel: bool) -> None:
        super().__init__(weight, axis, limit, per_channel)
        self.size = nn.Parameter(self.largest(weight) / limit)

    def step(self, weight: Tensor) -> Tensor:  # noqa: ARG002
        """Returns the learned steps."""
        return self.size.abs().clamp_min(SMALLEST_STEP)

    def forward(self, weight: Tensor) -> Tensor:
        """Returns the weight on its grid."""
        shared = weight.numel() // self.size.numel()
        return rounded(weight, self.step(weight), -self.limit, self.limit, gradient_scale(shared, self.limit))


class Lsq:
    """Quantizers of LSQ."""

    def activation(self, low: float, high: float) -> ActivationQuantizer:
        """Returns one step for the tensor."""
        return LsqActivation(low, high)

    def weight(self, weight: Tensor, axis: int, limit: int, per_channel: bool) -> WeightQuantizer:
        """Returns one step for each output channel, or for all."""
        return LsqWeight(weight, axis, limit, per_channel)
