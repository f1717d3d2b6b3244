"""DoReFa: weights transformed by tanh, and activations on a fixed grid.

Source: Zhou et al., DoReFa-Net, 2016, equations 9 and 11. The paper's weights lie within -1 and 1 and its activations
within 0 and 1, with 2^k - 1 steps. Here both keep their range from before training, weights per output channel, and
have 254 steps, so that zero is on the grid.
"""

import math

import torch
from torch import Tensor

from search.recovery.quantizers.grid import (
    HIGHEST,
    SMALLEST_STEP,
    ActivationQuantizer,
    WeightQuantizer,
    rounded,
)


class DoReFaActivation(ActivationQuantizer):
    """Clips at the calibrated range."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.register_buffer("size", torch.tensor(max(-low, high, SMALLEST_STEP * HIGHEST) / HIGHEST))

    def step(self) -> Tensor:
        """Returns the step from calibration."""
        return self.get_buffer("size")

    def forward(self, features: Tensor) -> Tensor:
        """Returns the features on the grid."""
        return rounded(features, self.step(), -HIGHEST, HIGHEST)


class DoReFaWeight(WeightQuantizer):
    """`tanh(w) / max|tanh(w)|`, rounded, times the largest magnitude of the weight before training."""

    def __init__(self, weight: Tensor, axis: int, limit: int, per_channel: bool) -> None:
        super().__init__(weight, axis, limit, per_channel)
        self.register_buffer("edge", self.largest(weight))

    def start(self, weight: Tensor) -> Tensor:
        """Returns the weight that the tanh transforms into `weight`."""
        edge = self.get_buffer("edge")
        return edge * torch.atanh(weight / edge * math.tanh(1))

    def step(self, weight: Tensor) -> Tensor:  # noqa: ARG002
        """Returns the largest magnitude before training divided by the limit."""
        return self.get_buffer("edge") / self.limit

    def forward(self, weight: Tensor) -> Tensor:
        """Returns the transformed weight on its grid."""
        edge = self.get_buffer("edge")
        transformed = torch.tanh(weight / edge)
        largest = self.largest(transformed)
        return rounded(transformed / largest * edge, self.step(weight), -self.limit, self.limit)


class DoReFa:
    """Quantizers of DoReFa."""

    def activation(self, low: float, high: float) -> ActivationQuantizer:
        """Returns the grid of the calibrated range."""
        return DoReFaActivation(low, high)

    def weight(self, weight: Tensor, axis: int, limit: int, per_channel: bool) -> WeightQuantizer:
        """Returns the grid of the weight before training."""
        return DoReFaWeight(weight, axis, limit, per_channel)
