"""FLOPs of any number of kept channels, from one count of the dense network."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch

from evaluators.flops.evaluator import count_by_module
from spaces.dynamic.exit_network import ExitNetwork
from spaces.pruning.groups import Axis, ChannelGroup


class ScaledFlops:
    """The FLOPs of a pruned network: a layer's shrink with the share of its inputs and outputs that stay.

    Exact for every layer that has weights, so that a search over thousands of widths needs no network for any of them.
    Pooling and other layers without weights, some thousandths of the whole, are left out.

    Args:
        network: the dense network; its exits and gates are left out.
        groups: its dependency groups.
        image: one input, `(1, c, h, w)`.
    """

    def __init__(self, network: ExitNetwork, groups: Sequence[ChannelGroup], image: torch.Tensor) -> None:
        self._groups = tuple(groups)
        self._sizes = {path: axes for path, module in network.named_modules() if (axes := _axes(module))}
        counts = count_by_module(network, image)
        self._dense = {path: counts[path] for path in self._sizes if path in counts and path.startswith("trunk.")}

    def count(self, channels: Mapping[str, int]) -> float:
        """Returns the FLOPs per image of the network that keeps these channels of each group, all where not given."""
        gone: dict[str, dict[Axis, int]] = defaultdict(lambda: defaultdict(int))
        for group in self._groups:
            dropped = group.channels - channels.get(group.name, group.channels)
            for member in group.members:
                gone[member.path][member.axis] += dropped * member.positions.shape[1]
        return sum(count * self._left(path, gone.get(path, {})) for path, count in self._dense.items())

    @property
    def dense(self) -> Mapping[str, float]:
        """The FLOPs per image of each module of the dense network that has weights, by its path, in its order."""
        return dict(self._dense)

    def shares(self, path: str, axis: Axis) -> dict[str, float]:
        """Returns the share of a module's axis that goes with one channel of each group that it belongs to."""
        found: dict[str, float] = defaultdict(float)
        for group in self._groups:
            for member in group.members:
                if (member.path, member.axis) == (path, axis):
                    found[group.name] += member.positions.shape[1] / self._sizes[path][axis]
        return dict(found)

    def _left(self, path: str, gone: Mapping[Axis, int]) -> float:
        share = 1.0
        for axis, dropped in gone.items():
            share *= 1 - dropped / self._sizes[path][axis]
        return share


def _axes(module: torch.nn.Module) -> dict[Axis, int]:
    """Returns how long each of a layer's two axes is; nothing for one without weights."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return {}
    return {"out": weight.shape[0], "in": weight.shape[1] if weight.ndim > 1 else weight.shape[0]}
