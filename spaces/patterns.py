"""Sparsity patterns inside layers, as dimensions: 2:4, or a share of the smallest weights."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from spaces.dimensions import Choice, Dimension, Value
from spaces.dynamic.exit_network import layer_name
from spaces.errors import UserError
from spaces.pruning.groups import ChannelGroup

PREFIX = "pattern."
DENSE = "dense"
TWO_OF_FOUR = "2:4"


class PatternError(UserError):
    """A pattern that does not exist."""


class PatternSpace:
    """The sparsity pattern of each layer.

    Args:
        patterns: the possible patterns of each layer by name, besides `dense`.
    """

    def __init__(self, patterns: Mapping[str, Sequence[str]]) -> None:
        self.patterns = {layer: tuple(offered) for layer, offered in patterns.items() if offered}

    def dimensions(self) -> dict[str, Dimension]:
        """Returns one choice per layer that may have a pattern."""
        return {PREFIX + layer: Choice((DENSE, *offered)) for layer, offered in self.patterns.items()}

    def read(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """Returns the pattern of every layer that has a choice."""
        return {layer: values[PREFIX + layer] for layer in self.patterns}


def zeros_of(pattern: str) -> float:
    """Returns the share of zeros of a pattern.

    zeros_of("2:4")  # 0.5
    zeros_of("75%")  # 0.75

    Raises:
        PatternError: there is no such pattern.
    """
    if pattern in (DENSE, TWO_OF_FOUR):
        return 0.5 if pattern == TWO_OF_FOUR else 0.0
    number = pattern.removesuffix("%")
    if not (pattern.endswith("%") and number.isdecimal() and 0 < int(number) < 100):
        raise PatternError(f"a pattern is 2:4 or the share of zeros, as in 50%, got {pattern!r}; see [space] patterns")
    return int(number) / 100


def offered_patterns(
    network: nn.Module, groups: Sequence[ChannelGroup], step: int, wanted: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """Returns which of the wanted patterns each layer of the trunk may have.

    Depthwise and grouped convolutions stay dense. 2:4 needs a number of input channels that is divisible by four,
    also after pruning.

    Args:
        network: the dense network.
        groups: its dependency groups.
        step: channels are pruned in multiples of it.
        wanted: the patterns of the study.
    """
    cut = {member.path for group in groups for member in group.members if member.axis == "in"}
    offered = {}
    for path, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and not path.startswith("exits.") and _groups(module) == 1:
            fits = module.weight.shape[1] % 4 == 0 and (path not in cut or step % 4 == 0)
            offered[layer_name(path)] = tuple(pattern for pattern in wanted if fits or pattern != TWO_OF_FOUR)
    return offered


def _groups(module: nn.Module) -> int:
    return module.groups if isinstance(module, nn.Conv2d) else 1


def mask(weight: Tensor, zeros: float, two_of_four: bool = False) -> Tensor:
    """Returns a mask of the largest weights by magnitude, ones and zeros in the shape of `weight`.

    Args:
        weight: `(out, in, ...)`.
        zeros: the share of zeros, rounded to whole weights.
        two_of_four: whether instead the two smallest of each four consecutive input channels are zero, for each output
            and kernel position.

    Raises:
        ValueError: 2:4 of a number of input channels that does not divide by four.
    """
    magnitude = weight.detach().abs()
    if two_of_four:
        if weight.shape[1] % 4:
            raise ValueError(f"2:4 needs input channels that divide by 4, got {weight.shape[1]}")
        fours = magnitude.movedim(1, -1).unflatten(-1, (-1, 4))
        kept = torch.zeros_like(fours).scatter_(-1, fours.topk(2, dim=-1).indices, 1.0)
        return kept.flatten(-2).movedim(-1, 1)
    count = round(zeros * magnitude.numel())
    kept = torch.ones(magnitude.numel(), dtype=weight.dtype)
    if count:
        kept[magnitude.flatten().topk(count, largest=False).indices] = 0.0
    return kept.view(weight.shape)


def mask_of(weight: Tensor, pattern: str) -> Tensor:
    """Returns the mask of a weight for a pattern, ones and zeros in the shape of `weight`.

    Raises:
        PatternError: there is no such pattern.
    """
    return mask(weight, zeros_of(pattern), pattern == TWO_OF_FOUR)


def apply_patterns(network: nn.Module, patterns: Mapping[str, str]) -> None:
    """Sets the smallest weights to zero by the patterns, in place."""
    weights = layer_weights(network, patterns)
    with torch.no_grad():
        for layer, path in weights.items():
            weight = network.get_parameter(path)
            weight.mul_(mask_of(weight, patterns[layer]))


def layer_weights(network: nn.Module, layers: Mapping[str, object]) -> dict[str, str]:
    """Returns the path of the weight of each layer.

    Raises:
        ValueError: the network lacks a layer.
    """
    known = {layer_name(path): path for path, module in network.named_modules() if hasattr(module, "weight")}
    missing = set(layers) - set(known)
    if missing:
        raise ValueError(f"a pattern belongs to a layer of the network, got {sorted(missing)}")
    return {layer: f"{known[layer]}.weight" for layer in layers}
