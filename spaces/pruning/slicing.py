"""Removes channels from torch modules."""

import copy
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from spaces.pruning.groups import Axis, ChannelGroup, dropped_positions

Network = TypeVar("Network", bound=nn.Module)


def sliced(network: Network, groups: Sequence[ChannelGroup], kept: Mapping[str, NDArray[np.int64]]) -> Network:
    """Returns a smaller copy of `network`, with slices of its weights.

    Args:
        network: the dense network, or a shortened one.
        groups: its dependency groups.
        kept: the kept channels, ascending, of each group that loses some.
    """
    modules = dict(network.named_modules())
    # A shortened network lacks the modules of the blocks that are left out.
    dropped = {path: axes for path, axes in dropped_positions(groups, kept).items() if path in modules}
    # Parameters that are about to be sliced are replaced anyway, so the copy may share them until then.
    shared = [tensor for path in dropped for tensor in modules[path].parameters(recurse=False)]
    smaller = copy.deepcopy(network, {id(tensor): tensor for tensor in shared})
    modules = dict(smaller.named_modules())
    for path, axes in dropped.items():
        cut(modules[path], axes)
    return smaller


def cut(module: nn.Module, dropped: Mapping[Axis, NDArray[np.int64]]) -> None:
    """Removes channels from a convolution, linear layer or batch norm, in place, with new tensors."""
    if isinstance(module, _BatchNorm):
        _cut_batch_norm(module, dropped["out"])
    elif isinstance(module, nn.Conv2d | nn.Linear):
        for axis in ("out", "in"):
            _cut_weight(module, 0 if axis == "out" else 1, dropped.get(axis, np.array([], dtype=np.int64)))


def _remaining(size: int, dropped: NDArray[np.int64]) -> torch.Tensor:
    return torch.from_numpy(np.setdiff1d(np.arange(size), dropped))


def _cut_batch_norm(norm: _BatchNorm, dropped: NDArray[np.int64]) -> None:
    keep = _remaining(norm.num_features, dropped)
    norm.num_features = len(keep)
    for name in ("weight", "bias"):
        parameter = getattr(norm, name)
        setattr(norm, name, None if parameter is None else _like(parameter, parameter.detach()[keep]))
    norm.running_mean = _buffer(norm.running_mean)[keep]
    norm.running_var = _buffer(norm.running_var)[keep]


def _like(parameter: torch.Tensor, values: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=parameter.requires_grad)


def _buffer(buffer: torch.Tensor | None) -> torch.Tensor:
    if buffer is None:
        raise ValueError("batch norm keeps running statistics, got track_running_stats=False; train it with them")
    return buffer


def _cut_weight(layer: nn.Conv2d | nn.Linear, axis: int, dropped: NDArray[np.int64]) -> None:
    """Removes the dropped indices along an axis; a grouped convolution loses whole groups, along its outputs."""
    keep = _remaining(layer.weight.shape[axis], dropped)
    per_group = layer.weight.shape[0] // layer.groups if isinstance(layer, nn.Conv2d) else 0
    layer.weight = _like(layer.weight, layer.weight.detach().index_select(axis, keep))
    if axis == 0 and layer.bias is not None:
        layer.bias = _like(layer.bias, layer.bias.detach()[keep])
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
        return
    if axis == 0 and layer.groups > 1:
        layer.groups = len(keep) // per_group
    layer.out_channels = layer.weight.shape[0]
    layer.in_channels = layer.weight.shape[1] * layer.groups
