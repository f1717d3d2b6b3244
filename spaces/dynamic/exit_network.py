"""A network with early exits and gates around blocks, as one torch module."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spaces.dynamic.masks.base import NAME
from spaces.errors import StructureError

_TRUNK = "trunk."

Decide = Callable[[str, Tensor], Tensor]
"""Maps a block's path and its gate's logits `(n, 1)` to 1 where the block is run and 0 where it is skipped."""


def decided(_block: str, logits: Tensor) -> Tensor:
    """Returns the decisions of gates at the threshold of their training: a block is run from a logit of 0 on."""
    return (logits.detach() >= 0).to(logits.dtype)


NO_GATES: Mapping[str, nn.Module] = MappingProxyType({})
"""Every block is run."""


def layer_name(path: str) -> str:
    """Returns the name of a module for users: its path in their network.

    layer_name("trunk.stage1.0.conv1")    # "stage1.0.conv1"
    layer_name("exits.exit1.classifier")  # "exits.exit1.classifier"
    """
    return path.removeprefix(_TRUNK)


class ExitHead(nn.Module):
    """Average pooling to a small grid and one linear layer.

    The grid keeps some of the spatial layout, which helps with the features of shallow layers.
    Source: Kaya et al., Shallow-Deep Networks, 2019.
    """

    def __init__(self, channels: int, classes: int, grid: int) -> None:
        super().__init__()
        self.grid = grid
        self.pool = nn.AdaptiveAvgPool2d(grid)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(channels * grid * grid, classes)

    def forward(self, features: Tensor) -> Tensor:
        """Returns logits `(n, classes)` for features `(n, channels, h, w)`."""
        logits: Tensor = self.classifier(self.flatten(self.pool(features)))
        return logits


class ConvolutionalExitHead(nn.Module):
    """Average pooling to twice the grid, one convolution, pooling to the grid and one linear layer.

    The convolution combines the features of shallow layers, which say little about a class one by one.
    """

    def __init__(self, channels: int, classes: int, grid: int) -> None:
        super().__init__()
        width = max(2 * channels, 64)
        self.grid = 2 * grid
        self.pool = nn.AdaptiveAvgPool2d(self.grid)
        self.conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.shrink = nn.AdaptiveAvgPool2d(grid)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(width * grid * grid, classes)

    def forward(self, features: Tensor) -> Tensor:
        """Returns logits `(n, classes)` for features `(n, channels, h, w)`."""
        hidden = self.relu(self.bn(self.conv(self.pool(features))))
        logits: Tensor = self.classifier(self.flatten(self.shrink(hidden)))
        return logits


HEADS: Mapping[str, type[ExitHead] | type[ConvolutionalExitHead]] = {
    "linear": ExitHead,
    "conv": ConvolutionalExitHead,
}
"""Every kind of exit head, by its name in a study; each begins with its `pool`."""


class ExitNetwork(nn.Module):
    """A trained network (the trunk) with a classifier head after some of its modules and a gate around some blocks.

    Args:
        trunk: maps images `(n, c, h, w)` to logits `(n, classes)`.
        cut_points: paths of the trunk's modules, in the order in which they run, after which an exit sits.
        heads: one head for each cut point.
        gates: the gate of each skippable block by the block's path, in the order in which they run.
    """

    def __init__(
        self,
        trunk: nn.Module,
        cut_points: Sequence[str],
        heads: Sequence[nn.Module],
        gates: Mapping[str, nn.Module] = NO_GATES,
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.cut_points = tuple(cut_points)
        self.exit_names = tuple(f"exit{index + 1}" for index in range(len(self.cut_points)))
        self.exits = nn.ModuleDict(dict(zip(self.exit_names, heads, strict=True)))
        self.skip_blocks = tuple(gates)
        self.skips = _tree(gates)
        self.removed_blocks: tuple[str, ...] = ()
        """Paths of the trunk's residual blocks that are left out: there is an identity in their place."""
        self.input_size: int | None = None
        """Height and width that images are resized to before the trunk; None for their own."""

    @property
    def gates(self) -> dict[str, nn.Module]:
        """The gates, by their blocks' paths."""
        return {block: self.gate(block) for block in self.skip_blocks}

    def gate(self, block: str) -> nn.Module:
        """Returns the gate of a block."""
        return self.skips.get_submodule(block)

    def run_trunk(self, images: Tensor, decide: Decide = decided) -> tuple[list[Tensor], Tensor]:
        """Returns the features at each cut point and the trunk's logits, with blocks skipped by the gates.

        Args:
            images: `(n, c, h, w)`.
            decide: turns the gates' logits into decisions.
        """

        def gated(block: str, source: Tensor, result: Tensor) -> Tensor:
            runs = decide(block, self.gate(block)(source))[:, :, None, None].to(result.dtype)
            return runs * result + (1 - runs) * source

        blocks = {block: self._gate_hook(block, gated) for block in self.skip_blocks}
        return self._run(images, blocks)

    def observe(self, images: Tensor) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]], Tensor]:
        """Returns the features at each cut point, each gated block's input and output, and the trunk's logits.

        Every block is run.
        """
        ends: list[tuple[Tensor, Tensor]] = []
        hook: _Hook = lambda _module, args, out: ends.append((args[0], out))  # noqa: E731
        features, logits = self._run(images, dict.fromkeys(self.skip_blocks, hook))
        return features, ends, logits

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Returns the logits of each exit, each gate, and, last, the trunk `(n, classes)`; every block is run."""
        features, blocks, logits = self.observe(images)
        exits = [head(feature) for head, feature in zip(self.exits.values(), features, strict=True)]
        gates = [self.gate(block)(source) for block, (source, _) in zip(self.skip_blocks, blocks, strict=True)]
        return (*exits, *gates, logits)

    def answers(self, images: Tensor) -> tuple[Tensor, ...]:
        """Returns the logits of each exit and, last, of the trunk, each `(n, classes)`; every block is run."""
        logits = self(images)
        return (*logits[: len(self.exit_names)], logits[-1])

    @staticmethod
    def _gate_hook(block: str, gated: Callable[[str, Tensor, Tensor], Tensor]) -> "_Hook":
        return lambda _module, args, out: gated(block, args[0], out)

    def _run(self, images: Tensor, blocks: Mapping[str, "_Hook"]) -> tuple[list[Tensor], Tensor]:
        """Returns the features at each cut point, after the hooks around blocks, and the logits."""
        features: list[Tensor] = []
        hooks = [self.trunk.get_submodule(path).register_forward_hook(hook) for path, hook in blocks.items()]
        hooks += [
            self.trunk.get_submodule(path).register_forward_hook(lambda _module, _args, out: features.append(out))
            for path in self.cut_points
        ]
        try:
            logits = self.trunk(resized(images, self.input_size))
        finally:
            for hook in hooks:
                hook.remove()
        return features, logits


def resized(images: Tensor, size: int | None) -> Tensor:
    """Returns images `(n, c, h, w)` at another size, `(n, c, size, size)`: bilinear, with antialiasing.

    Args:
        images: of any size.
        size: height and width; None for their own.
    """
    if size is None or images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)


_Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]


def _tree(gates: Mapping[str, nn.Module]) -> nn.Module:
    """Returns a module tree in which each gate has its block's path, because a module's name may not have a dot."""
    root = nn.Module()
    for path, gate in gates.items():
        parent = root
        *folders, name = path.split(".")
        for folder in folders:
            if folder not in dict(parent.named_children()):
                parent.add_module(folder, nn.Module())
            parent = parent.get_submodule(folder)
        parent.add_module(name, gate)
    return root


def feature_channels(trunk: nn.Module, cut_points: Sequence[str], image: Tensor) -> list[int]:
    """Returns the number of channels of each cut point's output, for one image `(1, c, h, w)`.

    Raises:
        StructureError: a cut point is not a module of the trunk that runs once, or its output is no feature map, or
            they are not in the order in which they run.
    """
    known = dict(trunk.named_modules())
    for path in cut_points:
        if path not in known:
            raise StructureError(f"an exit sits after a module of the network, got {path!r}; see named_modules()")
    calls = _outputs(trunk, cut_points, image)
    channels = [_map_channels(path, [out for name, out in calls if name == path]) for path in cut_points]
    order = [path for path, _ in calls]
    if order != list(cut_points):
        raise StructureError(
            f"exits are named once each, in the order in which they run, got {', '.join(map(repr, cut_points))};"
            f" that is {', '.join(map(repr, order))}"
        )
    return channels


def _outputs(trunk: nn.Module, paths: Sequence[str], image: Tensor) -> list[tuple[str, object]]:
    """Returns what modules give, with their paths, call by call."""
    calls: list[tuple[str, object]] = []
    hooks = [
        trunk.get_submodule(path).register_forward_hook(
            lambda _module, _args, out, path=path: calls.append((path, out))
        )
        for path in dict.fromkeys(paths)
    ]
    try:
        with torch.no_grad():
            trunk(image)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _map_channels(path: str, outputs: Sequence[object]) -> int:
    """Returns the channels of the feature map that a module gives; `outputs` are those of all its calls.

    Raises:
        StructureError: it runs twice, or never, or gives no feature map.
    """
    if len(outputs) != 1:
        times = f"runs {len(outputs)} times" if outputs else "does not run"
        raise StructureError(
            f"an exit sits after a module that runs once, got {path!r}, which {times}; name the module before it, or"
            " the block around it"
        )
    (output,) = outputs
    if not isinstance(output, Tensor) or output.ndim != 4:
        what = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise StructureError(f"an exit reads a feature map (n, c, h, w), got {what} at {path!r}")
    return output.shape[1]


def is_of_gate(name: str) -> bool:
    """Returns whether a layer, or a group of channels, is part of a block's gate or of a mask."""
    return name.startswith("skips.") or f".{NAME}." in name
