"""ONNX operators as torch functions whose gradients flow: what exported networks are made of.

Source: ONNX operator schemas, opset 17.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor

from spaces.errors import QuantizationError

Inputs = Sequence[Tensor]
Attributes = Mapping[str, Any]
Operator = Callable[[Inputs, Attributes], Tensor]


@dataclass(frozen=True)
class Operation:
    """One node, its operator looked up and its attributes read.

    Args:
        node: as it stands in the graph.
        run: its operator.
        attributes: by name.
    """

    node: NodeProto
    run: Operator
    attributes: Attributes

    @classmethod
    def of(cls, node: NodeProto) -> "Operation":
        """Returns a node as something that can be run.

        Raises:
            QuantizationError: there is no such operator.
        """
        if node.op_type not in OPERATORS:
            raise QuantizationError(
                f"training in int8 runs the operators of convolutional networks, got {node.op_type} at {node.name!r};"
                " leave [recovery.qat] out"
            )
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        return cls(node, OPERATORS[node.op_type], attributes)


def as_tensor(value: TensorProto) -> Tensor:
    """Returns the values of an initializer or a constant."""
    return torch.from_numpy(np.array(numpy_helper.to_array(value)))


def convolution(inputs: Inputs, attributes: Attributes) -> Tensor:
    """Returns a convolution with as many groups as its weight `(out, in per group, ...)` leaves."""
    images, weight = inputs[0], inputs[1]
    images, padding = _padded(images, attributes, 0.0)
    return torch.convolution(
        images,
        weight,
        inputs[2] if len(inputs) > 2 else None,
        attributes.get("strides", [1] * len(padding)),
        padding,
        attributes.get("dilations", [1] * len(padding)),
        False,
        [0] * len(padding),
        images.shape[1] // weight.shape[1],
    )


def _padded(images: Tensor, attributes: Attributes, value: float) -> tuple[Tensor, list[int]]:
    """Returns the images and the padding per axis that a torch function adds itself, the same on both sides."""
    axes = images.ndim - 2
    pads = list(attributes.get("pads", [0] * 2 * axes))
    if pads[:axes] == pads[axes:]:
        return images, pads[:axes]
    both = [amount for axis in reversed(range(axes)) for amount in (pads[axis], pads[axes + axis])]
    return F.pad(images, both, value=value), [0] * axes


def _gemm(inputs: Inputs, attributes: Attributes) -> Tensor:
    left, right = inputs[0], inputs[1]
    left = left.T if attributes.get("transA") else left
    right = right.T if attributes.get("transB") else right
    alpha, beta = attributes.get("alpha", 1.0), attributes.get("beta", 1.0)
    product = torch.matmul(left, right).mul(alpha)
    return product.add(inputs[2], alpha=beta) if len(inputs) > 2 else product


def _max_pool(inputs: Inputs, attributes: Attributes) -> Tensor:
    images, padding = _padded(inputs[0], attributes, -torch.inf)
    return F.max_pool2d(
        images,
        attributes["kernel_shape"],
        attributes.get("strides", [1, 1]),
        padding,
        attributes.get("dilations", [1, 1]),
        bool(attributes.get("ceil_mode", 0)),
    )


def _average_pool(inputs: Inputs, attributes: Attributes) -> Tensor:
    images, padding = _padded(inputs[0], attributes, 0.0)
    if images is not inputs[0] and not attributes.get("count_include_pad", 0):
        raise QuantizationError(
            f"training in int8 averages over windows padded alike on both sides, got pads {attributes['pads']};"
            " leave [recovery.qat] out"
        )
    return F.avg_pool2d(
        images,
        attributes["kernel_shape"],
        attributes.get("strides", [1, 1]),
        padding,
        bool(attributes.get("ceil_mode", 0)),
        bool(attributes.get("count_include_pad", 0)),
    )


def _batch_norm(inputs: Inputs, attributes: Attributes) -> Tensor:
    features, weight, bias, mean, variance = inputs
    return F.batch_norm(features, mean, variance, weight, bias, False, 0.0, attributes.get("epsilon", 1e-5))


def _layer_norm(inputs: Inputs, attributes: Attributes) -> Tensor:
    shape = list(inputs[0].shape[attributes.get("axis", -1) :])
    bias = inputs[2] if len(inputs) > 2 else None
    return F.layer_norm(inputs[0], shape, inputs[1], bias, attributes.get("epsilon", 1e-5))


def _clip(data: Tensor, *bounds: Tensor) -> Tensor:
    low, high = (bounds[at] if len(bounds) > at and bounds[at].numel() else None for at in (0, 1))
    return torch.clamp(data, low, high)


def _divide(dividend: Tensor, divisor: Tensor) -> Tensor:
    return torch.div(dividend, divisor, rounding_mode=None if dividend.is_floating_point() else "trunc")


def _remainder(inputs: Inputs, attributes: Attributes) -> Tensor:
    return (torch.fmod if attributes.get("fmod") else torch.remainder)(inputs[0], inputs[1])


def _reduce_mean(inputs: Inputs, attributes: Attributes) -> Tensor:
    axes = attributes.get("axes", list(range(inputs[0].ndim)))
    return inputs[0].mean(axes, keepdim=bool(attributes.get("keepdims", 1)))


def _reshape(data: Tensor, shape: Tensor) -> Tensor:
    return data.reshape([size or data.shape[axis] for axis, size in enumerate(shape.tolist())])  # 0 keeps the size


def _flatten(inputs: Inputs, attributes: Attributes) -> Tensor:
    axis = attributes.get("axis", 1) % (inputs[0].ndim + 1)
    return inputs[0].reshape(int(np.prod(inputs[0].shape[:axis])), -1)


def _transpose(inputs: Inputs, attributes: Attributes) -> Tensor:
    return inputs[0].permute(attributes.get("perm", tuple(reversed(range(inputs[0].ndim)))))


def _concatenate(inputs: Inputs, attributes: Attributes) -> Tensor:
    return torch.cat(list(inputs), attributes["axis"])


def _gather(inputs: Inputs, attributes: Attributes) -> Tensor:
    data, indices = inputs
    axis = attributes.get("axis", 0) % data.ndim
    chosen = torch.where(indices < 0, indices + data.shape[axis], indices)
    found = data.index_select(axis, chosen.flatten())
    return found.reshape((*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :]))


def _slice(
    data: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Tensor | None = None
) -> Tensor:
    count = len(starts)
    every_axis = list(range(count)) if axes is None else axes.tolist()
    every_step = [1] * count if steps is None else steps.tolist()
    for axis, start, end, step in zip(every_axis, starts.tolist(), ends.tolist(), every_step, strict=True):
        chosen = range(*slice(start, end, step).indices(data.shape[axis]))
        if step > 0:
            where = (slice(None),) * (axis % data.ndim)
            data = data[(*where, slice(chosen.start, chosen.stop, step))]
        else:  # torch has no slices that run backwards
            data = data.index_select(axis, torch.tensor(list(chosen), dtype=torch.int64))
    return data


def _pad(inputs: Inputs, attributes: Attributes) -> Tensor:
    mode = attributes.get("mode", b"constant").decode()
    data, pads = inputs[0], inputs[1].tolist()
    both = [amount for axis in reversed(range(data.ndim)) for amount in (pads[axis], pads[data.ndim + axis])]
    if mode == "constant":
        return F.pad(data, both, value=float(inputs[2]) if len(inputs) > 2 and inputs[2].numel() else 0.0)
    return F.pad(data, both[:4], mode={"edge": "replicate"}.get(mode, mode))


def _unsqueeze(data: Tensor, axes: Tensor) -> Tensor:
    rank = data.ndim + axes.numel()
    for axis in sorted(axis % rank for axis in axes.tolist()):
        data = data.unsqueeze(axis)
    return data


def _squeeze(data: Tensor, axes: Tensor | None = None) -> Tensor:
    return data.squeeze() if axes is None else data.squeeze(tuple(axes.tolist()))


def _cast(inputs: Inputs, attributes: Attributes) -> Tensor:
    kind = torch.from_numpy(np.empty(0, helper.tensor_dtype_to_np_dtype(attributes["to"]))).dtype
    return inputs[0].to(kind)


def _filled(inputs: Inputs, attributes: Attributes) -> Tensor:
    value = as_tensor(attributes["value"]) if "value" in attributes else torch.zeros(1)
    return value.expand(inputs[0].tolist())


def _hard_sigmoid(inputs: Inputs, attributes: Attributes) -> Tensor:
    return inputs[0].mul(attributes.get("alpha", 0.2)).add(attributes.get("beta", 0.5)).clamp(0, 1)


def _from_inputs(function: Callable[..., Tensor]) -> Operator:
    """Returns the operator that computes a function of its inputs and has no attributes."""
    return lambda inputs, _attributes: function(*inputs)


OPERATORS: Mapping[str, Operator] = {
    "Add": _from_inputs(operator.add),
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Clip": _from_inputs(_clip),
    "Concat": _concatenate,
    "Constant": lambda _inputs, attributes: as_tensor(attributes["value"]),
    "ConstantOfShape": _filled,
    "Conv": convolution,
    "Div": _from_inputs(_divide),
    "Einsum": lambda inputs, attributes: torch.einsum(attributes["equation"].decode(), *inputs),
    "Equal": _from_inputs(torch.eq),
    "Erf": _from_inputs(torch.erf),
    "Exp": _from_inputs(torch.exp),
    "Expand": _from_inputs(lambda data, shape: data * torch.ones(shape.tolist(), dtype=data.dtype)),
    "Flatten": _flatten,
    "Gather": _gather,
    "Gemm": _gemm,
    "GlobalAveragePool": _from_inputs(lambda features: features.mean((2, 3), keepdim=True)),
    "GreaterOrEqual": _from_inputs(torch.ge),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _from_inputs(F.hardswish),
    "Identity": _from_inputs(lambda data: data),
    "LayerNormalization": _layer_norm,
    "LeakyRelu": lambda inputs, attributes: F.leaky_relu(inputs[0], attributes.get("alpha", 0.01)),
    "MatMul": _from_inputs(torch.matmul),
    "MaxPool": _max_pool,
    "Mod": _remainder,
    "Mul": _from_inputs(operator.mul),
    "Pad": _pad,
    "Pow": _from_inputs(torch.pow),
    "ReduceMean": _reduce_mean,
    "Relu": _from_inputs(torch.relu),
    "Reshape": _from_inputs(_reshape),
    "Shape": _from_inputs(lambda data: torch.tensor(data.shape)),
    "Sigmoid": _from_inputs(torch.sigmoid),
    "Slice": _from_inputs(_slice),
    "Softmax": lambda inputs, attributes: torch.softmax(inputs[0], attributes.get("axis", -1)),
    "Sqrt": _from_inputs(torch.sqrt),
    "Squeeze": _from_inputs(_squeeze),
    "Sub": _from_inputs(operator.sub),
    "Tanh": _from_inputs(torch.tanh),
    "Transpose": _transpose,
    "Unsqueeze": _from_inputs(_unsqueeze),
    "Where": _from_inputs(torch.where),
}
"""Every operator that can be trained through, by its ONNX name."""
