"""AdaRound: each weight is rounded up or down, whichever preserves the layer's outputs.

Every layer is treated as a matrix product: a convolution's input becomes patches, one row for each output position, of
which some are drawn at random.
Source: Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization, 2020.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from onnx import NodeProto
from torch import Tensor

from evaluators.graph.probe import observe
from evaluators.graph.stages import Stage
from evaluators.graph.template import LAYER_OPS, Arrays, Template, bounds_of
from evaluators.quantization.int8 import ABSORBED, Grids, Placement, QuantizedWeight, Quantizer, Ranges, output_axis
from evaluators.runtimes.onnx_rewrites.unsigned_activations import unsigned_activations

_ROWS = 8192
"""The number of patches of a layer's input; all of them if there are fewer."""
_ROWS_PER_IMAGE = 128
_BATCH = 256
_WARM_UP = 0.2
"""The share of optimization steps without the regulariser."""
_BETA = (20.0, 2.0)
_STRETCH = (-0.1, 1.1)

Report = Callable[[int, int], None]
Values = NDArray[np.float32]


@dataclass(frozen=True)
class Learning:
    """The optimization settings of AdaRound.

    Args:
        steps: the number of optimization steps for each layer.
        rate: Adam's learning rate. The paper's 1e-3 is for ten thousand steps and more, too low for hundreds.
        weight: of the regulariser that drives weights to levels, relative to the error of rounding to nearest. If it is
            small, weights end between two levels, and their final rounding is no better than rounding to nearest.
        seed: of the patches and their order.
    """

    steps: int = 500
    rate: float = 0.1
    weight: float = 10.0
    seed: int = 0


@dataclass(frozen=True)
class LinearProblem:
    """One layer as a matrix product whose outputs `activation(inputs @ weight + bias)` are to be preserved.

    Args:
        inputs: the layer's inputs in the quantized network, `(groups, rows, k)`.
        targets: the layer's outputs in the float network, `(groups, rows, outputs)`.
        weight: float, `(groups, outputs, k)`.
        scale: of each output, `(groups, outputs, 1)`.
        bias: `(groups, 1, outputs)`.
        bounds: of the activation after the layer.
        limit: the largest level.
    """

    inputs: Tensor
    targets: Tensor
    weight: Tensor
    scale: Tensor
    bias: Tensor
    bounds: tuple[float, float]
    limit: int

    def error(self, steps: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        """Returns the mean over rows of the squared error, summed over outputs, of a weight `steps * scale`."""
        weight = torch.clamp(steps, -self.limit, self.limit) * self.scale
        outputs = self.inputs[:, rows] @ weight.transpose(1, 2) + self.bias
        return ((outputs.clamp(*self.bounds) - self.targets[:, rows]) ** 2).sum(dim=(0, 2)).mean()

    @property
    def nearest(self) -> Tensor:
        """The weight rounded to the nearest levels, `(groups, outputs, k)`."""
        return torch.round(self.weight / self.scale).clamp(-self.limit, self.limit)


def rectified_sigmoid(variable: Tensor) -> Tensor:
    """Returns `clip(1.2 sigmoid(v) - 0.1, 0, 1)`, which reaches 0 and 1."""
    low, high = _STRETCH
    return (torch.sigmoid(variable) * (high - low) + low).clamp(0, 1)


def learned_steps(problem: LinearProblem, learning: Learning) -> Tensor:
    """Returns integer levels for a layer's weight, `(groups, outputs, k)`, at most as wrong as the nearest levels.

    The error is relative to that of the nearest levels, and the regulariser `1 - |2 h - 1|^beta` is a mean, so that one
    setting suits layers of any size and scale.
    """
    floor = torch.floor(problem.weight / problem.scale)
    low, high = _STRETCH
    fraction = (problem.weight / problem.scale - floor).clamp(0.001, 0.999)
    variable = torch.logit((fraction - low) / (high - low)).requires_grad_()
    optimizer = torch.optim.Adam([variable], learning.rate)
    generator = torch.Generator().manual_seed(learning.seed)
    nearest_error = float(problem.error(problem.nearest)) or 1.0
    for step in range(learning.steps):
        rows = torch.randint(problem.inputs.shape[1], (_BATCH,), generator=generator)
        share = rectified_sigmoid(variable)
        loss = problem.error(floor + share, rows) / nearest_error
        done = (step / learning.steps - _WARM_UP) / (1 - _WARM_UP)
        if done >= 0:
            beta = _BETA[0] + (_BETA[1] - _BETA[0]) * done
            loss = loss + learning.weight * (1 - (2 * share - 1).abs() ** beta).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        learned = (floor + (variable >= 0)).clamp(-problem.limit, problem.limit)
        return min(learned, problem.nearest, key=lambda steps: float(problem.error(steps)))


@dataclass(frozen=True)
class RoundingTask:
    """A network whose weights are to be quantized.

    Args:
        template: of the network.
        stage: the whole graph.
        quantizer: writes Q/DQ.
        placement: the placement of Q/DQ.
        weights: the value of every initializer.
        ranges: of the activations.
    """

    template: Template
    stage: Stage
    quantizer: Quantizer
    placement: Placement
    weights: Arrays
    ranges: Ranges

    def learn(self, images: Values, learning: Learning, report: Report) -> Grids:
        """Returns the grids of all int8 layers, each learned behind those that are rounded already.

        Args:
            images: for calibration, `(n, c, h, w)`.
            learning: for how long and how.
            report: told how many layers are done.
        """
        exact = self.template.file(self.stage, self.stage.nodes, self.weights)
        layers = [node for node in self.stage.nodes if node.name in self.placement.nodes and node.op_type in LAYER_OPS]
        grids: dict[str, QuantizedWeight] = {}
        for index, node in enumerate(layers):
            report(index, len(layers))
            problem = self._problem(node, observe(exact, node.input[0], images), self._quantized(node, grids, images))
            weight = self.weights[node.input[1]]
            steps = learned_steps(problem, replace(learning, seed=learning.seed + index)).numpy().astype(np.int8)
            rows = steps.reshape(-1, *np.moveaxis(weight, output_axis(node), 0).shape[1:])
            scale = problem.scale.flatten().numpy()
            grids[node.input[1]] = QuantizedWeight(np.moveaxis(rows, 0, output_axis(node)), scale)
        report(len(layers), len(layers))
        return grids

    def _quantized(self, node: NodeProto, grids: Grids, images: Values) -> Iterable[Values]:
        """Returns the input of a layer in the quantized network, `(n, ...)`, in batches."""
        nodes, values = self.quantizer.write(self.stage, self.placement, self.weights, self.ranges, grids)
        tensor = next(written.input[0] for written in nodes if written.name == node.name)
        return observe(unsigned_activations(self.template.file(self.stage, nodes, values)), tensor, images)

    def _problem(self, node: NodeProto, exact: Iterable[Values], quantized: Iterable[Values]) -> LinearProblem:
        axis = output_axis(node)
        weight = self.weights[node.input[1]].astype(np.float32)
        inputs, same = (patches(node, weight.shape, values) for values in (quantized, exact))
        groups, outputs = len(inputs), weight.shape[axis]
        matrix = torch.from_numpy(np.moveaxis(weight, axis, 0).reshape(groups, outputs // groups, -1).copy())
        bias = self.weights[node.input[2]] if len(node.input) > 2 else np.zeros(outputs)
        shift = torch.from_numpy(bias.astype(np.float32)).reshape(groups, 1, -1)
        bounds = self._bounds(node.output[0])
        targets = (same @ matrix.transpose(1, 2) + shift).clamp(*bounds)
        scale = torch.from_numpy(self.quantizer.nearest(weight, axis).scale).reshape(groups, -1, 1)
        return LinearProblem(inputs, targets, matrix, scale, shift, bounds, self.quantizer.weight_limit)

    def _bounds(self, tensor: str) -> tuple[float, float]:
        """Returns the bounds of the activation that is a tensor's only reader; infinite if there is none."""
        readers = [node for node in self.stage.nodes if tensor in node.input]
        if len(readers) == 1 and readers[0].op_type in ABSORBED:
            return bounds_of(readers[0], self.template.constants)
        return -np.inf, np.inf


def patches(node: NodeProto, shape: tuple[int, ...], batches: Iterable[Values]) -> Tensor:
    """Returns the rows that a layer multiplies with its weight, `(groups, rows, k)`; the same positions in each call.

    Args:
        node: the layer.
        shape: of its weight.
        batches: of its input, `(n, c, h, w)` or `(n, ..., features)`.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.cat(
        [_rows(node, shape, torch.from_numpy(values[None]), generator) for batch in batches for values in batch]
    )
    rows = rows[torch.randperm(len(rows), generator=generator)[:_ROWS]]
    groups = rows.shape[1] // int(np.prod(shape[1:])) if node.op_type == "Conv" else 1
    return rows.reshape(len(rows), groups, -1).transpose(0, 1).contiguous()


def _rows(node: NodeProto, shape: tuple[int, ...], image: Tensor, generator: torch.Generator) -> Tensor:
    """Returns some of the rows of one image, `(rows, values)`."""
    if node.op_type != "Conv":
        rows = image.flatten(0, -2)
    else:
        attributes = {attribute.name: tuple(attribute.ints) for attribute in node.attribute}
        top, left, bottom, right = attributes.get("pads", (0, 0, 0, 0))
        dilation, stride = (attributes.get(name, (1, 1)) for name in ("dilations", "strides"))
        columns = F.unfold(F.pad(image, (left, right, top, bottom)), shape[2:], dilation, 0, stride)
        rows = columns[0].T
    return rows[torch.randperm(len(rows), generator=generator)[:_ROWS_PER_IMAGE]]
