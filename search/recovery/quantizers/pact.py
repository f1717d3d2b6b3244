"""Learned clipping of activations.

Source: Choi et al., PACT, 2018. The clipping value starts at its calibrated value; the L2 penalty on it is
the weight decay. Activations that do not follow a ReLU are clipped on both sides. A weight's step follows from its
largest value.
"""

import torch
from torch import Tensor, nn

from search.recovery.quantizers.grid import HIGHEST, SMALLEST_STEP, ActivationQuantizer, LargestScaled, WeightQuantizer


class PactActivation(ActivationQuantizer):
    """A learned clipping value `alpha`: `y = clip(x, -alpha, alpha)`, with 127 steps to each side."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(max(-low, high)))

    def _edge(self) -> Tensor:
        return self.alpha.clamp_min(SMALLEST_STEP * HIGHEST)

    def step(self) -> Tensor:
        """Returns the clipping value divided by 127."""
        return self._edge() / HIGHEST

    def forward(self, features: Tensor) -> Tensor:
        """Returns the features on the grid; `alpha` has the gradient of the clipped features."""
        edge, step = self._edge(), self.step().detach()
        clipped = torch.clamp(features, -edge, edge)
        return clipped + ((clipped / step).round_() * step - clipped).detach()


class Pact:
    """Quantizers of PACT."""

    def activation(self, low: float, high: float) -> ActivationQuantizer:
        """Returns one clipping value for the tensor."""
        return PactActivation(low, high)

    def weight(self, weight: Tensor, axis: int, limit: int, per_channel: bool) -> WeightQuantizer:
        """Returns the grid scaled by the largest weight."""
        return LargestScaled(weight, axis, limit, per_channel)
