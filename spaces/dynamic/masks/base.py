"""The base class of masks, which decide for each image what part of a residual block is computed."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from spaces.dynamic.masks.hard_gate import OPEN, SHUT, Gate
from spaces.dynamic.masks.residual_blocks import Site

NAME = "mask"
"""The name of a mask as a submodule of its block."""


class Mask(nn.Module):
    '''The gates of one residual block.

    A subclass computes decisions in `look`, which gets the block's input, and applies them by hooks that it registers
    on the block's layers in `attach`. After each forward pass `needed` has, by the path of each convolution, the share
    of its multiply-adds that each image needs, `(n,)`, with the gradients of the decisions.

    Args:
        site: the block.
        keep: the target share of the network's FLOPs.

    Example:
        """One decision per image: the block's branch is computed or skipped."""

        from torch import nn

        from spaces.dynamic.masks.base import LogitNorm, Mask, average
        from spaces.dynamic.masks.hard_gate import Gate


        class BranchMask(Mask):
            """The mean of each channel, a 1x1 convolution and one gate."""

            def __init__(self, site, keep):
                super().__init__(site, keep)
                squeeze = [nn.AdaptiveAvgPool2d(1), nn.Conv2d(site.channels, 1, 1, bias=False), LogitNorm(1, 2.0)]
                self.decide, self.gate = nn.Sequential(*squeeze), Gate()

            def attach(self, block, layers):
                super().attach(block, layers)
                layers[self.site.convs[-1].end].register_forward_hook(self.last)

            def look(self, features):
                self.decision = self.gate(self.decide(features))
                self.needed = dict.fromkeys((conv.path for conv in self.site.convs), average(self.decision))
                self.opened["branch"] = average(self.decision)

            def last(self, _module, _args, out):  # a method, so that a copy of the network has a hook of its own
                return out * self.decision
    '''

    moves: ClassVar[bool] = True
    """Whether the threshold can be changed after training."""
    factors: ClassVar[int] = 1
    """The number of gates whose shares multiply: training holds each share to this root of the target share."""

    def __init__(self, site: Site, keep: float) -> None:
        super().__init__()
        self.site = site
        self.keep = keep
        self.needed: dict[str, Tensor] = {}
        self.opened: dict[str, Tensor] = {}
        """The share of open gates for each image, `(n,)`, by the kind of gate."""

    def attach(self, block: nn.Module, layers: Mapping[str, nn.Module]) -> None:  # noqa: ARG002  for subclasses
        """Registers the mask's hooks on its block.

        Args:
            block: the block; the mask is a submodule of it already.
            layers: the block's modules, by their paths in the trunk.
        """
        block.register_forward_pre_hook(self._before)

    def _before(self, _block: nn.Module, args: tuple[Any, ...]) -> None:
        self.needed, self.opened = {}, {}
        self.look(args[0])

    def look(self, features: Tensor) -> None:
        """Computes the decisions from the block's input `(n, c, h, w)`."""

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state for a copy, without the gradients of the last forward pass."""
        return {name: _detached(value) for name, value in self.__dict__.items()}

    @property
    def gates(self) -> list[Gate]:
        """All gates."""
        return [module for module in self.modules() if isinstance(module, Gate)]

    def move(self, threshold: float) -> None:
        """Sets the logit from which gates are open."""
        for gate in self.gates:
            gate.threshold.fill_(threshold)

    def open(self) -> None:
        """Opens all gates: the block computes the same as without the mask."""
        self.move(OPEN)

    def close(self) -> None:
        """Closes all gates."""
        self.move(SHUT)

    def go_on(self, done: float) -> None:
        """Called during training with the share of it that is done, 0 to 1."""


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if type(value) is list:
        return [_detached(each) for each in value]
    return {name: _detached(each) for name, each in value.items()} if type(value) is dict and _holds(value) else value


def _holds(value: dict[Any, Any]) -> bool:
    """Returns whether a dictionary holds tensors from a forward pass, and no parameters or modules."""
    return any(isinstance(each, Tensor) and each.grad_fn is not None for each in value.values())


def insert_masks(trunk: nn.Module, sites: Sequence[Site], kind: type[Mask], keep: float) -> nn.Module:
    """Puts an untrained mask into each of some blocks, in place, and returns the trunk.

    Args:
        trunk: the network.
        sites: its blocks.
        kind: the class of the masks.
        keep: the target share of the network's FLOPs.
    """
    for site in sites:
        block = trunk.get_submodule(site.block)
        mask = kind(site, keep)
        block.add_module(NAME, mask)
        mask.attach(
            block, {path: module for path, module in trunk.named_modules() if path.startswith(f"{site.block}.")}
        )
    return trunk.eval()


def move_masks(network: nn.Module, thresholds: Mapping[str, float | None]) -> None:
    """Sets the thresholds of masks by their blocks' paths, in place; at None all gates are open."""
    for mask in masks_of(network):
        if mask.site.block in thresholds:
            threshold = thresholds[mask.site.block]
            mask.move(OPEN if threshold is None else threshold)


def masks_of(network: nn.Module) -> list[Mask]:
    """Returns the masks of a network, in the order of its modules."""
    return [module for module in network.modules() if isinstance(module, Mask)]


def needed(masks: Sequence[Mask]) -> dict[str, Tensor]:
    """Returns the share of each masked convolution's multiply-adds that each image needed in the last forward pass."""
    return {path: share for mask in masks for path, share in mask.needed.items()}


def each_opened(masks: Sequence[Mask]) -> Iterator[tuple[Mask, str, Tensor]]:
    """Yields each mask, kind of gate and share of open gates `(n,)` of the last forward pass."""
    for mask in masks:
        for kind, share in mask.opened.items():
            yield mask, kind, share


class LogitNorm(nn.BatchNorm2d):
    """Normalises the logits `(n, gates, h, w)` of gates; their mean is initially `bias`.

    If logits differed little between images, a gate would close for all images almost at once. With a standard
    deviation of 1 it closes for some images first.
    """

    def __init__(self, gates: int, bias: float) -> None:
        super().__init__(gates)
        nn.init.constant_(self.bias, bias)


def grid_of(size: tuple[int, int]) -> int:
    """Returns the side of a tile for feature maps of a size, so that there are about eight tiles per row.

    The last feature maps of small images have four, as in DGNet (4, 2, 2 for 32, 16 and 8 pixels; 8, 4,
    2, 1 for 56 to 7).
    """
    side = max(size)
    return max(round(side / 8), 2 if side == 8 else 1)


def spread(tiles: Tensor, size: tuple[int, int]) -> Tensor:
    """Returns decisions on tiles `(n, 1, a, b)` upsampled to positions, `(n, 1, *size)`."""
    return nn.functional.interpolate(tiles, size=size, mode="nearest")


def average(features: Tensor) -> Tensor:
    """Returns the mean over all axes except the first, `(n,)`."""
    return features.flatten(1).mean(dim=1)


def constant(value: float, like: Tensor) -> Tensor:
    """Returns the same share for every image of a batch, `(n,)`."""
    return torch.full((like.shape[0],), value)
