"""Training towards a candidate's shape: with fixed zeros, or pruned gradually during the training."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from search.recovery.elastic import SharedWeights, Slice, logits_with
from spaces.channels import SparsitySpace
from spaces.dynamic.exit_network import ExitNetwork
from spaces.patterns import TWO_OF_FOUR, apply_patterns, layer_weights, mask, zeros_of

RAMP = 0.5
"""Share of a fine-tuning in which the network is pruned; the rest trains its final shape."""
SR_STE_DECAY = 2e-4
"""Decay of masked weights in SR-STE."""


def ramp(done: float, end: float, start: float = 0.0) -> float:
    """Returns the sparsity at a point of the ramp, 0 to 1: a cubic that rises fast at first.

    Source: Zhu & Gupta, To Prune, or Not to Prune, 2017.

    Args:
        done: share of the ramp that is done.
        end: sparsity at its end.
        start: sparsity at its beginning.
    """
    return end + (start - end) * (1 - done) ** 3


class SparseRefined(torch.autograd.Function):
    """Masked weights with a gradient for the masked ones, too, which decays them towards zero (SR-STE).

    Source: Zhou et al., Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch, 2021.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, kept: Tensor) -> Tensor:
        """Returns the weights times the mask `kept`, both of one shape."""
        ctx.save_for_backward(weight, kept)
        return weight * kept

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Returns the gradient of the masked weights, plus 2e-4 times the weights that are masked."""
        weight, kept = ctx.saved_tensors
        return gradients[0] + SR_STE_DECAY * (1 - kept) * weight, None


class GradualPruning:
    """A network that is pruned to a candidate's shape while it is trained.

    Masks keep the largest weights and are computed anew in every step. 2:4 patterns are trained by SR-STE from the
    start; with a share of zeros masked weights get no gradient.

    Args:
        network: its weights are trained: the candidate's network, or with `channels` the one that it is a slice of.
        patterns: of zeros, by layer.
        channels: per group, at the end of the ramp; None if the network has its final widths already.
        sparsity: tells which channels a candidate keeps.
    """

    def __init__(
        self,
        network: ExitNetwork,
        patterns: Mapping[str, str],
        channels: Mapping[str, int] | None = None,
        sparsity: SparsitySpace | None = None,
    ) -> None:
        self.network = network if channels is None else copy.deepcopy(network)
        self._patterns = patterns
        self._paths = layer_weights(network, patterns)
        self._channels = channels
        self._sparsity = sparsity
        self._shared = SharedWeights(self.network, sparsity) if sparsity is not None and channels is not None else None
        self._current: tuple[dict[str, int], Slice] | None = None

    def logits(self, images: Tensor, done: float) -> list[Tensor]:
        """Returns the logits of each exit and of the trunk in the current shape.

        Args:
            images: `(n, c, h, w)`.
            done: share of the training that is done.
        """
        position = min(done / RAMP, 1.0)
        network, weights = self._shape(position)
        for layer, path in self._paths.items():
            weights[path] = self._masked(weights[path], self._patterns[layer], position)
        return logits_with(network, weights, images)

    def _shape(self, position: float) -> tuple[ExitNetwork, dict[str, Tensor]]:
        """Returns the network at a point of the ramp, and its weights."""
        if self._shared is None:
            return self.network, dict(self.network.named_parameters())
        channels = self.channels_at(position)
        if self._current is None or self._current[0] != channels:
            self._current = channels, self._shared.slice(channels)
        part = self._current[1]
        return part.network, self._shared.weights(part)

    def channels_at(self, position: float) -> dict[str, int]:
        """Returns the channels per group at a point of the ramp, rounded to steps of the space."""
        assert self._sparsity is not None
        assert self._channels is not None
        channels = {}
        for group in self._sparsity.groups:
            final = self._channels.get(group.name, group.channels)
            exact = group.channels * (1 - ramp(position, 1 - final / group.channels))
            step = self._sparsity.step(group)
            channels[group.name] = min(final + round((exact - final) / step) * step, group.channels)
        return channels

    def _masked(self, weight: Tensor, pattern: str, position: float) -> Tensor:
        if pattern == TWO_OF_FOUR:
            masked: Tensor = SparseRefined.apply(weight, mask(weight, 0.5, two_of_four=True))
            return masked
        zeros = zeros_of(pattern)
        return weight * mask(weight, zeros if self._shared is None else ramp(position, zeros))

    def finish(self, network: ExitNetwork) -> None:
        """Copies the final weights, zeros included, into a network of the final shape."""
        final, weights = self._shape(1.0)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                parameter.copy_(weights[name])
            for name, buffer in network.named_buffers():
                buffer.copy_(final.get_buffer(name))
        apply_patterns(network, self._patterns)
