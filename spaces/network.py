"""A network and its early exits, as one torch module."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from spaces.errors import StructureError

_TRUNK = "trunk."


def layer_name(path: str) -> str:
    """Returns the name users know a module by: its path in the network that they gave.

    layer_name("trunk.stage1.0.conv1")    # "stage1.0.conv1"
    layer_name("exits.exit1.classifier")  # "exits.exit1.classifier"
    """
    return path.removeprefix(_TRUNK)


class ExitHead(nn.Module):
    """Average pooling to a small grid and one linear layer.

    The grid keeps some of the spatial layout, which a shallow layer's features need.
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

    A shallow layer's features say more about a class once they have been combined.
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
"""Every kind of head, by the name that a study gives it; each begins by what its `pool` does."""


class ExitNetwork(nn.Module):
    """A trained network (the trunk) with a classifier head after each of some of its modules.

    Args:
        trunk: maps images `(n, c, h, w)` to logits `(n, classes)`.
        cut_points: paths of the trunk's modules, in the order in which they run, after which an exit sits.
        heads: one head for each cut point.
    """

    def __init__(self, trunk: nn.Module, cut_points: Sequence[str], heads: Sequence[nn.Module]) -> None:
        super().__init__()
        self.trunk = trunk
        self.cut_points = tuple(cut_points)
        self.exit_names = tuple(f"exit{index + 1}" for index in range(len(self.cut_points)))
        self.exits = nn.ModuleDict(dict(zip(self.exit_names, heads, strict=True)))

    def run_trunk(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Returns the features at each cut point and the trunk's logits."""
        features: list[Tensor] = []
        hooks = [
            self.trunk.get_submodule(path).register_forward_hook(lambda _module, _args, out: features.append(out))
            for path in self.cut_points
        ]
        try:
            logits = self.trunk(images)
        finally:
            for hook in hooks:
                hook.remove()
        return features, logits

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Returns the logits of each exit and, last, of the trunk: each `(n, classes)`."""
        features, logits = self.run_trunk(images)
        return (*(head(feature) for head, feature in zip(self.exits.values(), features, strict=True)), logits)


def feature_channels(trunk: nn.Module, cut_points: Sequence[str], image: Tensor) -> list[int]:
    """Returns how many channels the output of each cut point has, for one image `(1, c, h, w)`.

    Raises:
        StructureError: a cut point is not a module of the trunk, or its output is no feature map.
    """
    known = dict(trunk.named_modules())
    for path in cut_points:
        if path not in known:
            raise StructureError(f"an exit sits after a module of the network, got {path!r}; see named_modules()")
    with torch.no_grad():
        features, _ = ExitNetwork(trunk, cut_points, [nn.Identity()] * len(cut_points)).run_trunk(image)
    for path, feature in zip(cut_points, features, strict=True):
        if feature.ndim != 4:
            shape = tuple(feature.shape)
            raise StructureError(f"an exit reads a feature map (n, c, h, w), got shape {shape} at {path!r}")
    return [feature.shape[1] for feature in features]
