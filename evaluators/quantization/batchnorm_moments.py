"""What batch normalisation says about activations: their means, variances and ranges, without any image.

A normalised channel has mean beta and standard deviation gamma, if its statistics are right. From there normal
distributions are followed through the graph, as maps with one value for each position, so that borders, slices and
paddings are what they are.
Source: Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, 2019.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper
from scipy.special import ndtr
from torch import Tensor

from evaluators.graph.exporter import INPUT, OPSET
from evaluators.graph.probe import with_outputs
from evaluators.graph.stages import Stage
from evaluators.graph.template import Template, bounds_of
from evaluators.runtimes.onnxruntime_cpu import load
from spaces.errors import QuantizationError

Map = NDArray[np.float32]

SPAN = 6.0
"""So many standard deviations on each side of the mean are within the range."""

_MOVING = {
    *("Identity", "Dropout", "Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather"),
    *("Pad", "MaxPool", "MatMul"),
}
"""Move values, or take the largest of neighbours, which are taken to be alike: moments go as values do.

A product is one of them where it is no layer: uneven pooling is written so.
"""
_AVERAGING = {"AveragePool", "GlobalAveragePool", "ReduceMean"}


@dataclass(frozen=True)
class Moments:
    """How the values of a tensor are distributed at each of its positions.

    Args:
        mean: in the tensor's shape for one image.
        variance: in the same shape.
        low: nothing lies below it, so to say; mean less six standard deviations of what is normal.
        high: nothing lies above it.
    """

    mean: Map
    variance: Map
    low: Map
    high: Map

    @property
    def range(self) -> tuple[float, float]:
        """The lowest and highest value of the whole tensor, 0 included."""
        return min(float(self.low.min()), 0.0), max(float(self.high.max()), 0.0)

    @property
    def channel_means(self) -> NDArray[np.float64]:
        """The mean of each channel, `(channels,)`."""
        others = tuple(axis for axis in range(self.mean.ndim) if axis != 1)
        return cast(NDArray[np.float64], self.mean.mean(axis=others, dtype=np.float64))


def normal(mean: Map, variance: Map) -> Moments:
    """Returns the moments of a normal distribution, whose range ends six standard deviations from its mean."""
    reach: Map = np.float32(SPAN) * np.sqrt(variance)
    return Moments(mean, variance, mean - reach, mean + reach)


def clipped(given: Moments, low: float, high: float) -> Moments:
    """Returns the moments of `min(max(x, low), high)` for a normal `x`; either bound may be infinite.

    With `a = (low - m) / s` and `b = (high - m) / s` the mean is
    `low Phi(a) + high (1 - Phi(b)) + m (Phi(b) - Phi(a)) + s (phi(a) - phi(b))`.
    """
    mean = given.mean.astype(np.float64)
    deviation = np.sqrt(np.maximum(given.variance.astype(np.float64), 1e-24))
    a, b = (low - mean) / deviation, (high - mean) / deviation
    below = ndtr(a)
    above = ndtr(-b)
    inside = ndtr(b) - ndtr(a)
    at_low, at_high = _density(a), _density(b)
    first = mean * inside + deviation * (at_low - at_high) + _finite(low) * below + _finite(high) * above
    # About the new mean, not about 0: squares of a large mean would leave nothing of a small variance.
    off = mean - first
    second = (off**2 + deviation**2) * inside
    second += 2 * off * deviation * (at_low - at_high)
    second += deviation**2 * (_finite(a) * at_low - _finite(b) * at_high)
    second += _finite(low - first) ** 2 * below + _finite(high - first) ** 2 * above
    bounds = (np.clip(bound, low, high) for bound in (given.low, given.high))
    return Moments(first.astype(np.float32), np.maximum(second, 0).astype(np.float32), *bounds)


def _density(at: NDArray[np.float64]) -> NDArray[np.float64]:
    return cast(NDArray[np.float64], np.exp(-0.5 * at**2) / np.sqrt(2 * np.pi))


def _finite(bound: NDArray[np.float64] | float) -> NDArray[np.float64]:
    """Returns 0 in place of a bound that is none, where no share of the values lies."""
    return np.where(np.isfinite(bound), bound, 0.0)


def summed(first: Moments, second: Moments) -> Moments:
    """Returns the moments of a sum of independent values: means and variances add, and so do squared reaches."""
    mean = first.mean + second.mean
    down = np.sqrt((first.mean - first.low) ** 2 + (second.mean - second.low) ** 2)
    up = np.sqrt((first.high - first.mean) ** 2 + (second.high - second.mean) ** 2)
    return Moments(mean, first.variance + second.variance, mean - down, mean + up)


def averaged(given: Moments, count: float) -> Moments:
    """Returns the moments of means over `count` positions, for their mean moments.

    Neighbours are neither alike nor independent. What is between is taken: as many independent values as the root of
    their number, so that the reach of a mean over 8x8 positions is a third of theirs and not an eighth.
    """
    reach = np.float32(count**-0.25)
    low, high = (given.mean + reach * (bound - given.mean) for bound in (given.low, given.high))
    return Moments(given.mean, given.variance * reach**2, low, high)


def constant(value: NDArray[np.generic]) -> Moments:
    """Returns the moments of what is always the same."""
    mean = value.astype(np.float32)
    return Moments(mean, np.zeros_like(mean), mean, mean)


def of_images(images: Map) -> Moments:
    """Returns the moments of a network's input: each channel's over some images, with their extremes as its range."""
    axes = (0, *range(2, images.ndim))
    like = np.ones((1, *images.shape[1:]), dtype=np.float32)
    mean, variance = (found(images, axis=axes, keepdims=True, dtype=np.float64) for found in (np.mean, np.var))
    spread = (mean, variance, images.min(keepdims=True), images.max(keepdims=True))
    return Moments(*((like * part).astype(np.float32) for part in spread))


def activation_moments(
    template: Template, stage: Stage, state: Mapping[str, Tensor], images: Map
) -> dict[str, Moments]:
    """Returns the moments of every activation of a network.

    Behind a batch normalisation, folded or not, they are what it says. A layer without one adds up the moments of its
    inputs as if they were independent. Maximum pooling keeps them: its outputs are larger than that.

    Args:
        template: of the network.
        stage: all of its graph.
        state: its state dict.
        images: what the network's input is like. Nothing else is read from them.

    Raises:
        QuantizationError: an operator does something else with values.
    """
    return _Walk(template, stage, state).follow(of_images(images))


class _Walk:
    """One way through the graph of one network."""

    def __init__(self, template: Template, stage: Stage, state: Mapping[str, Tensor]) -> None:
        self._values = dict(template.weights(state))
        self._file = template.file(stage, stage.nodes, self._values)
        self._nodes = onnx.load_from_string(self._file).graph.node  # with as many groups as are left
        self._layers = set(template.layers.values())
        self._norms = {fold.weight: fold.norm for fold in template.folds}
        self._state = state

    def follow(self, given: Moments) -> dict[str, Moments]:
        """Returns the moments of every tensor that depends on the input, for those of the input."""
        names = [name for node in self._nodes for name in node.output if name]
        # Shapes, and what is computed from shapes, do not depend on the image.
        run = load(with_outputs(self._file, names), 1)
        self._values |= dict(zip(names, run(np.zeros_like(given.mean)), strict=True))
        found = {INPUT: given}
        for node in self._nodes:
            if node.op_type != "Shape" and any(name in found for name in node.input):
                found |= zip(node.output, self._through(node, found), strict=True)
        return found

    def _through(self, node: NodeProto, found: Mapping[str, Moments]) -> Sequence[Moments]:
        norm = self._norm(node)
        if norm is not None:
            return [self._normalised(node, norm)]
        inputs = [found.get(name) or constant(self._values[name]) for name in node.input if name]
        if node.op_type == "Add":
            return [summed(*inputs)]
        if node.op_type == "Concat":
            axis = node.attribute[0].i
            parts = zip(*((part.mean, part.variance, part.low, part.high) for part in inputs), strict=True)
            return [Moments(*(np.concatenate(part, axis) for part in parts))]
        first = found.get(node.input[0])
        if first is not None and node.op_type in ("Relu", "Clip"):
            return [clipped(first, *bounds_of(node, self._values))]
        if first is not None and (node.op_type in ("Conv", "Gemm") or node.name in self._layers):
            return [self._layer(node, first)]
        if first is not None and node.op_type in _AVERAGING:
            (moved,) = self._moved(node, found)
            return [averaged(moved, first.mean.size / moved.mean.size)]
        if node.op_type in _MOVING and sum(name in found for name in node.input) == 1:
            return self._moved(node, found)
        raise QuantizationError(
            "distributions are followed through convolutions, linear layers, batch norm, ReLU, clipping, additions,"
            f" concatenations, pooling and reshaping, got {node.op_type} at {node.name!r};"
            ' say "data" for quantization.ranges, and for quantization.bias_correction'
        )

    def _norm(self, node: NodeProto) -> tuple[str, str] | None:
        """Returns the names of gamma and beta of the batch normalisation that a node is or has taken in."""
        if node.op_type == "BatchNormalization":
            return node.input[1], node.input[2]
        return self._norms[node.input[1]][:2] if node.op_type == "Conv" and node.input[1] in self._norms else None

    def _normalised(self, node: NodeProto, norm: tuple[str, str]) -> Moments:
        like = np.ones_like(self._values[node.output[0]])
        shape = [1, -1, *[1] * (like.ndim - 2)]
        gamma, beta = (self._state[name].detach().numpy().reshape(shape) for name in norm)
        return normal(like * beta, like * gamma**2)

    def _layer(self, node: NodeProto, given: Moments) -> Moments:
        weight, *bias = (self._values[name] for name in node.input[1:])
        mean = self._run(node, 0, [weight, *bias])(given.mean)[0]
        variance = self._run(node, 0, [weight**2, *(np.zeros_like(part) for part in bias)])(given.variance)[0]
        return normal(mean, variance)

    def _moved(self, node: NodeProto, found: Mapping[str, Moments]) -> list[Moments]:
        at = next(index for index, name in enumerate(node.input) if name in found)
        others = [self._values[name] for index, name in enumerate(node.input) if name and index != at]
        run, given = self._run(node, at, others), found[node.input[at]]
        mean, variance, low, high = (run(part) for part in (given.mean, given.variance, given.low, given.high))
        return [Moments(*parts) for parts in zip(mean, variance, low, high, strict=True)]

    def _run(self, node: NodeProto, at: int, others: Sequence[NDArray[np.generic]]) -> Callable[[Map], Sequence[Map]]:
        """Returns a node as a function of its input number `at`; the rest is given."""
        names = [name for index, name in enumerate(node.input) if name and index != at]
        source = helper.make_tensor_value_info(node.input[at], TensorProto.FLOAT, None)
        outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in node.output]
        constants = [numpy_helper.from_array(value, name) for name, value in zip(names, others, strict=True)]
        graph = helper.make_graph([node], "node", [source], outputs, constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
        return load(model.SerializeToString(), 1)
