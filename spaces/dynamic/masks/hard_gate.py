"""A trainable hard decision: open or closed, with the gradient of a soft decision."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

OPEN, SHUT = -1e4, 1e4
"""Thresholds at which a gate is always open and always closed."""


class _Step(torch.autograd.Function):
    """1 where a number is at least 0, else 0, with the gradient of a sigmoid (straight-through).

    Source: Bengio et al., Estimating or Propagating Gradients Through Stochastic Neurons, 2013.
    """

    @staticmethod
    def forward(context: Any, margins: Tensor, temperature: float) -> Tensor:
        """Returns the step; keeps what the gradient needs."""
        context.save_for_backward(margins)
        context.temperature = temperature
        return (margins >= 0).to(margins.dtype)

    @staticmethod
    def backward(context: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Returns the gradient of `sigmoid(margins / temperature)`."""
        (margins,) = context.saved_tensors
        soft = torch.sigmoid(margins / context.temperature)
        return grads[0] * soft * (1 - soft) / context.temperature, None


@dataclass
class Noise:
    """The noise that is added to logits in training.

    Args:
        generator: draws the noise.
        strength: a factor, which falls to 0 during training, so that the end of it trains the deployed network.
    """

    generator: torch.Generator
    strength: float = 1.0


class Gate(nn.Module):
    """Decides from logits: open from a threshold on.

    In training, logistic noise, the difference of two Gumbel variables, is added where `noise` is set.
    Source: Jang et al., Categorical Reparameterization with Gumbel-Softmax, 2017.

    Args:
        temperature: of the soft decision whose gradient is used.
    """

    threshold: Tensor

    def __init__(self, temperature: float = 2 / 3) -> None:
        super().__init__()
        self.register_buffer("threshold", torch.zeros(1))
        self.temperature = temperature
        self.noise: Noise | None = None

    def forward(self, logits: Tensor) -> Tensor:
        """Returns 1 where it is open and 0 where it is closed, in the shape of the logits."""
        margins = logits.float() - self.threshold
        if torch.onnx.is_in_onnx_export():
            return (margins >= 0).to(margins.dtype)
        if self.training and self.noise is not None and self.noise.strength > 0:
            chance = torch.rand(margins.shape, generator=self.noise.generator).clamp(1e-6, 1 - 1e-6)
            margins = margins + self.noise.strength * torch.logit(chance)
        opened: Tensor = _Step.apply(margins, self.temperature)
        return opened
