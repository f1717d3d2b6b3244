"""Shared weights that bear any mix of fp32 and int8, with activations' steps that all versions share."""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from evaluators.quantization.int8 import Ranges
from evaluators.quantization.trainable_graph import Rounding
from search.config.registries import QUANTIZERS
from search.recovery.base import QatContext
from search.recovery.quantizers.base import Method
from search.recovery.quantizers.grid import LargestScaled
from spaces.candidate import Candidate
from spaces.dynamic.exit_network import ExitNetwork
from spaces.errors import UserError


class MixedPrecision(nn.Module):
    """The network that holds the shared weights, with one quantizer for each activation of it.

    A slice of a weight is rounded to steps of its own largest values, as its file will be. Batch normalisation uses the
    batch's statistics, because every slice has its own.

    Args:
        network: dense.
        int8: where Q/DQ goes, and the ranges of the dense network, with which steps begin.
        quantizer: of the activations, one of `QUANTIZERS`.

    Raises:
        UserError: output channels share a scale, which would depend on batch statistics.
    """

    def __init__(self, network: ExitNetwork, int8: QatContext, quantizer: str) -> None:
        super().__init__()
        if not int8.graph.per_channel:
            raise UserError(
                "shared weights feel int8 with a scale per output channel, got weights = 'per-tensor' in"
                " [quantization]; leave [recovery.qat] out or take another level"
            )
        self.network = network
        self._int8 = int8
        made: Method = QUANTIZERS[quantizer]()
        self._steps = {name: made.activation(*int8.builder.ranges[name]) for name in int8.graph.scales()}
        self.activations = nn.ModuleList(self._steps.values())

    def choices(self, count: int, generator: torch.Generator) -> Sequence[Collection[str]]:
        """Returns which layers are int8 in each of `count` versions: all of them in the first, then random ones.

        Of each version that is random another share of the layers is, so that all mixes from fp32 to int8 occur.
        """
        layers = self._int8.builder.layers
        found: list[Collection[str]] = [layers]
        for _ in range(count - 1):
            share = float(torch.rand((), generator=generator))
            drawn = torch.rand(len(layers), generator=generator).tolist()
            found.append([layer for layer, chance in zip(layers, drawn, strict=True) if chance < share])
        return found

    def logits(
        self, part: ExitNetwork, weights: Mapping[str, Tensor], int8: Collection[str], images: Tensor
    ) -> list[Tensor]:
        """Returns the logits of each exit and of the trunk of one slice; their gradients reach weights and steps.

        Args:
            part: of the slice's shape.
            weights: the values of its parameters, by name.
            int8: the layers that are.
            images: `(n, c, h, w)`.
        """
        graph = self._int8.graph
        placement = self._int8.builder.int8_placement(part, Candidate({}, dict.fromkeys(int8, "int8"), {}))
        tensors = {name: self._steps[origin] for name, origin in graph.rounded_tensors(placement).items()}
        state = {**part.state_dict(), **weights}
        rounds = {
            name: LargestScaled(graph.weight(name, state), axis, graph.weight_limit, per_channel=True)
            for name, axis in graph.rounded_weights(placement).items()
        }
        return graph.logits(state, images, Rounding(tensors, rounds), batch_statistics=True)

    def ranges(self) -> Ranges:
        """Returns the range of every activation, as it was learned."""
        return {name: step.range() for name, step in self._steps.items()}
