"""How the operators are counted that fvcore does not know, and which of a network's are not counted at all."""

import logging
import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from fvcore.nn import FlopCountAnalysis
from fvcore.nn.jit_handles import get_shape

Handle = Callable[[Sequence[Any], Sequence[Any]], Counter[str]]
"""Returns the FLOPs of one call, by the operator's name, from its inputs and outputs in the traced graph."""


def _convolution(inputs: Sequence[Any], outputs: Sequence[Any]) -> Counter[str]:
    """A convolution whose padding is a word, `same` or `valid`."""
    batch, _, *positions = get_shape(outputs[0])
    return Counter({"conv": batch * math.prod(positions) * math.prod(get_shape(inputs[1]))})


def _attention(inputs: Sequence[Any], _outputs: Sequence[Any]) -> Counter[str]:
    """Both products of attention: of queries `(..., l, e)` with keys `(..., s, e)`, and of that with the values."""
    query, key, value = (get_shape(each) for each in inputs[:3])
    return Counter({"attention": math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])})


def _product(inputs: Sequence[Any], _outputs: Sequence[Any]) -> Counter[str]:
    """A product of `(b, n, k)` and `(b, k, m)` that is added to something."""
    left, right = get_shape(inputs[1]), get_shape(inputs[2])
    return Counter({"bmm": math.prod(left) * right[-1]})


def _vector_product(inputs: Sequence[Any], _outputs: Sequence[Any]) -> Counter[str]:
    """A product of a matrix, or a vector, and a vector."""
    return Counter({"mv": math.prod(get_shape(inputs[0]))})


def _recurrent(inputs: Sequence[Any], _outputs: Sequence[Any]) -> Counter[str]:
    """All steps of a recurrent layer: each of its matrices once a step, for every sequence."""
    parameters = next(each for each in inputs[1:] if str(each.type()) == "List[Tensor]" and _matrices(each))
    steps_and_sequences = math.prod(get_shape(inputs[0])[:-1])
    return Counter({"recurrent": steps_and_sequences * sum(_matrices(parameters))})


def _matrices(values: Any) -> list[int]:
    """Returns the sizes of the matrices in a list of tensors."""
    shapes = [get_shape(each) for each in values.node().inputs()]
    return [math.prod(shape) for shape in shapes if len(shape) == 2]


HANDLES: Mapping[str, Handle] = {
    "aten::_convolution_mode": _convolution,
    "aten::scaled_dot_product_attention": _attention,
    "aten::baddbmm": _product,
    "aten::addbmm": _product,
    "aten::mv": _vector_product,
    "aten::dot": _vector_product,
    **dict.fromkeys(("aten::lstm", "aten::gru", "aten::rnn_tanh", "aten::rnn_relu"), _recurrent),
}
"""The operators that multiply and that fvcore does not know."""

_ELEMENTWISE = """
abs add addcmul alpha_dropout bernoulli celu clamp_max clamp_min div dropout elu erf exp expm1 feature_dropout gelu glu
hardshrink hardsigmoid hardswish hardtanh le leaky_relu log log1p log_sigmoid logical_and logical_not logical_or lt
maximum minimum mish mul ne neg pow prelu reciprocal relu6 rrelu rsqrt rsub selu sigmoid sign silu sin cos softplus
softshrink softsign sqrt square sub tanh threshold where
"""
_SUMS = """
amax amin argmax argmin avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_max_pool1d adaptive_max_pool2d
cumsum linalg_vector_norm log_softmax max_pool1d max_pool2d max_pool2d_with_indices max_pool3d mean min norm prod
softmax std sum topk sort var var_mean
"""
_MOVES = """
alias broadcast_tensors broadcast_to channel_shuffle clone expand_as fill flip index_select item lift_fresh linspace
meshgrid movedim new_full new_ones numel one_hot ones_like pad pixel_shuffle pixel_unshuffle rand rand_like randn
randn_like reflection_pad1d reflection_pad2d repeat repeat_interleave replication_pad2d reshape_as result_type scatter
swapaxes take tensor tensor_split tile tril triu unflatten unfold view_as zero Bool Float is_floating_point
"""
_FREE = frozenset((_ELEMENTWISE + _SUMS + _MOVES).split())
"""Operators without a multiply-add of weights or products; their names without `aten::` and `_` at the end."""


def analysis(network: torch.nn.Module, image: torch.Tensor) -> FlopCountAnalysis:
    """Returns fvcore's analysis of a network for one image `(1, c, h, w)`, with the operators that it does not know."""
    logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)
    return FlopCountAnalysis(network, image).set_op_handle(**HANDLES).unsupported_ops_warnings(False)


def not_counted(network: torch.nn.Module, image: torch.Tensor) -> dict[str, int]:
    """Returns the operators of a network that may multiply and are not counted, with how often they run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counted = analysis(network, image)
        counted.total()
        unknown = counted.unsupported_ops()
    return {
        name: count
        for name, count in sorted(unknown.items())
        if name.startswith("aten::") and name.removeprefix("aten::").rstrip("_") not in _FREE
    }
