"""Elastic training in mixed precision: shared weights, and activation quantizers that all versions share."""

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
from spaces.dynamic.exit_network import ExitNetwork, resized
from spaces.errors import UserError


class MixedPrecision(nn.Module):
    """The network with the shared weights, and one quantizer for each of its activations.

    A slice of a weight is quantized by its own largest values, as in its exported file. Batch norm uses the statistics
    of the batch, because these differ between slices.

    Args:
        network: the dense one.
        int8: the placement of Q/DQ nodes, and the ranges of the dense network, which the steps start from.
        quantizer: of the activations, one of `QUANTIZERS`.

    Raises:
        UserError: the scheme is per tensor; its scale would depend on batch statistics.
    """

    def __init__(self, network: ExitNetwork, int8: QatContext, quantizer: str) -> None:
        super().__init__()
        graph = int8.builder.trainable()
        if not graph.per_channel:
            raise UserError(
                "shared weights feel int8 with a scale per output channel, got weights = 'per-tensor' in"
                " [quantization]; leave [recovery.qat] out or take another level"
            )
        self.network = network
        self._int8 = int8
        method: Method = QUANTIZERS[quantizer]()
        self._steps = {name: method.activation(*int8.builder.ranges[name]) for name in graph.scales()}
        self.activations = nn.ModuleList(self._steps.values())

    def choices(self, count: int, generator: torch.Generator) -> Sequence[Collection[str]]:
        """Returns the int8 layers of each of `count` versions: all layers in the first, random ones in the others.

        The share of int8 layers is random, too, so that all mixes from fp32 to int8 occur.
        """
        layers = self._int8.builder.layers
        choices: list[Collection[str]] = [layers]
        for _ in range(count - 1):
            share = float(torch.rand((), generator=generator))
            draws = torch.rand(len(layers), generator=generator).tolist()
            choices.append([layer for layer, draw in zip(layers, draws, strict=True) if draw < share])
        return choices

    def logits(
        self, part: ExitNetwork, weights: Mapping[str, Tensor], int8: Collection[str], images: Tensor
    ) -> list[Tensor]:
        """Returns the logits of each exit and of the trunk of one slice; gradients flow to weights and steps.

        Args:
            part: a network of the slice's shape.
            weights: the values of its parameters, by name.
            int8: names of the int8 layers.
            images: `(n, c, h, w)`.
        """
        graph = self._int8.builder.trainable(part)
        placement = self._int8.builder.int8_placement(part, Candidate({}, dict.fromkeys(int8, "int8")))
        origins = graph.rounded_tensors(placement)
        # A tensor that only shortened networks round has no step here; its range is calibrated for each of them.
        tensors = {name: self._steps[origin] for name, origin in origins.items() if origin in self._steps}
        state = {**part.state_dict(), **weights}
        weight_quantizers = {
            name: LargestScaled(graph.weight(name, state), axis, graph.weight_limit, per_channel=True)
            for name, axis in graph.rounded_weights(placement).items()
        }
        return graph.logits(
            state, resized(images, part.input_size), Rounding(tensors, weight_quantizers), batch_statistics=True
        )

    def ranges(self) -> Ranges:
        """Returns the learned range of every activation."""
        return {name: step.range() for name, step in self._steps.items()}
