"""Finds the groups of channels that can be pruned, by pruning each and comparing the outputs."""

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from spaces.dynamic.exit_network import ExitNetwork, is_of_gate, layer_name
from spaces.pruning.dependency_graph import dependency_groups
from spaces.pruning.groups import ChannelGroup, Groups, WholeGroup, dropped_positions
from spaces.pruning.slicing import sliced

Refusal = tuple[str, str]
"""Why channels cannot be pruned: the reason and its details."""
Proof = Callable[[ExitNetwork], Refusal | None]
"""Returns why a sliced network cannot be used; None if it can."""

_OF_THE_EFFECT, _OF_THE_SCALE = 1e-3, 1e-5
"""Tolerances of the comparison, relative to the effect of the pruning and to the largest output."""


def find_groups(network: ExitNetwork, image: Tensor, proof: Proof | None = None) -> Groups:
    """Returns the groups of `network` that can be pruned, in the order in which it runs, and those that stay whole.

    Each group that can be pruned has been cut to half: the sliced network ran, and its outputs were those of the dense
    network in which nothing reads the dropped channels. All groups are tried together first, then divided where that
    fails. Groups of a classifier's classes, of the image's channels, or inside a gate are left out.

    Args:
        network: the dense network, in evaluation mode.
        image: one input, `(1, c, h, w)`.
        proof: a further test of the sliced network, such as whether its ONNX file has the same outputs.
    """
    found = _without_gates(dependency_groups(network, image))
    with torch.no_grad():
        cuts = _Cuts(network, image)
        free, whole = cuts.divide(found.free, cuts.refuse)
        if proof is not None:
            free, more = cuts.divide(free, lambda groups: proof(sliced(network, groups, halves(groups))))
            whole += more
    order = [group.name for group in found.free]
    return Groups(tuple(free), (*found.whole, *sorted(whole, key=lambda group: order.index(group.name))))


def _without_gates(found: Groups) -> Groups:
    free = tuple(group for group in found.free if not is_of_gate(group.name))
    return Groups(free, tuple(group for group in found.whole if not is_of_gate(group.name)))


def halves(groups: Sequence[ChannelGroup], seed: int = 0) -> dict[str, NDArray[np.int64]]:
    """Returns half of each group's channels, rounded down, chosen at random, ascending."""
    rng = np.random.default_rng(seed)
    return {
        group.name: np.sort(rng.permutation(group.channels)[: group.channels // 2])
        for group in groups
        if group.channels > 1
    }


class _Cuts:
    """Trial cuts of a network, compared with the dense network in which nothing reads the dropped channels."""

    def __init__(self, network: ExitNetwork, image: Tensor) -> None:
        self._network = network
        generator = torch.Generator().manual_seed(0)
        # With a uniform image alone, mixed-up channels could go unnoticed.
        self._images = torch.cat([image, torch.randn(image.shape, generator=generator)])
        self._dense = network(self._images)

    def divide(
        self, groups: Sequence[ChannelGroup], refuse: Callable[[Sequence[ChannelGroup]], Refusal | None]
    ) -> tuple[list[ChannelGroup], list[WholeGroup]]:
        """Returns the groups that can be pruned together, and the others with the reason."""
        refusal = refuse(groups) if groups else None
        if refusal is None:
            return list(groups), []
        if len(groups) == 1:
            return [], [WholeGroup(groups[0].name, groups[0].channels, *refusal)]
        middle = len(groups) // 2
        (first, gone), (second, more) = self.divide(groups[:middle], refuse), self.divide(groups[middle:], refuse)
        refusal = refuse([*first, *second]) if first and second else None
        if refusal is None:
            return [*first, *second], [*gone, *more]
        return first, [*gone, *more, *(WholeGroup(group.name, group.channels, *refusal) for group in second)]

    def refuse(self, groups: Sequence[ChannelGroup]) -> Refusal | None:
        """Returns why the network with these groups cut to half does not work; None if it does."""
        kept = halves(groups)
        smaller = sliced(self._network, groups, kept)
        try:
            answers = smaller(self._images)
        except Exception as error:
            return "its width is written into the network's forward", _place(smaller, self._images, error)
        for answer, expected, dense in zip(answers, self._unread(groups, kept)(self._images), self._dense, strict=True):
            if answer.shape != expected.shape:
                return "it holds the network's answers", ""
            allowed = _OF_THE_EFFECT * (expected - dense).abs().max() + _OF_THE_SCALE * expected.abs().max()
            if not (answer - expected).abs().max() <= allowed:
                return "the network pads, splits or reorders its channels by fixed numbers", ""
        return None

    def _unread(self, groups: Sequence[ChannelGroup], kept: dict[str, NDArray[np.int64]]) -> nn.Module:
        """Returns the dense network with zero weights for the dropped input channels of each layer."""
        masked = copy.deepcopy(self._network)
        modules = dict(masked.named_modules())
        for path, axes in dropped_positions(groups, kept).items():
            weight = modules[path].weight
            if "in" in axes and isinstance(weight, Tensor):
                weight[:, torch.from_numpy(axes["in"])] = 0.0
        return masked


def _place(network: nn.Module, images: Tensor, error: Exception) -> str:
    """Returns the innermost module whose forward fails, and its error message."""
    running: list[str] = []
    hooks = []
    for path, module in network.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda _module, _args, path=path: running.append(path)))
        hooks.append(module.register_forward_hook(lambda _module, _args, _out: running.pop() and None))
    try:
        network(images)
    except Exception as again:
        error = again
    for hook in hooks:
        hook.remove()
    return f"{layer_name(running[-1]) if running else 'the network'}: {str(error).splitlines()[0]}"
