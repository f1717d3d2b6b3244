"""All dimensions of a search together."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from spaces.candidate import Candidate
from spaces.channels import SparsitySpace
from spaces.depth import ALL_BLOCKS, DepthSpace, shortened
from spaces.dimensions import Choice, Dimension, Value
from spaces.dynamic.exit_network import ExitNetwork
from spaces.dynamic.masks.base import move_masks
from spaces.input_size import OWN_SIZE, InputSizeSpace, at_size
from spaces.patterns import DENSE, PatternSpace, apply_patterns
from spaces.precision import PREFIX, PrecisionSpace, uniform
from spaces.thresholds import Thresholds, ThresholdSpace

NO_PATTERNS = PatternSpace({})
"""Every layer is dense."""


class JointSpace:
    """The search space: channels, precisions, thresholds, sparsity patterns, depth and input size."""

    def __init__(
        self,
        sparsity: SparsitySpace,
        precision: PrecisionSpace,
        thresholds: ThresholdSpace,
        patterns: PatternSpace = NO_PATTERNS,
        depth: DepthSpace = ALL_BLOCKS,
        input_size: InputSizeSpace = OWN_SIZE,
    ) -> None:
        self.sparsity = sparsity
        self.precision = precision
        self.thresholds = thresholds
        self.patterns = patterns
        self.depth = depth
        self.input_size = input_size

    def dimensions(self) -> dict[str, Dimension]:
        """Returns every dimension, by its prefixed name."""
        return {
            **self.sparsity.dimensions(),
            **self.precision.dimensions(),
            **self.thresholds.dimensions(),
            **self.patterns.dimensions(),
            **self.depth.dimensions(),
            **self.input_size.dimensions(),
        }

    def candidate(self, values: Mapping[str, Value]) -> Candidate:
        """Returns the candidate for one value of each dimension.

        Raises:
            KeyError: a dimension has no value.
        """
        thresholds = self.thresholds.read(values)
        precision = {name: str(value) for name, value in self.precision.read(values).items()}
        channels = {name: int(value) for name, value in self.sparsity.read(values).items()}
        patterns = {name: str(value) for name, value in self.patterns.read(values).items() if value != DENSE}
        removed, size = self.depth.removed(self.depth.read(values)), self.input_size.size(values)
        candidate = self._without_idle_choices(Candidate(channels, precision, thresholds, patterns, removed, size))
        return self.with_thresholds(candidate, candidate.thresholds)

    def _without_idle_choices(self, candidate: Candidate) -> Candidate:
        """Returns the candidate with the dense network's choices in blocks that are left out, so that equals are equal.

        Layers get the reference precision and no pattern, groups of channels their width, and gates and masks are off.
        """
        if not candidate.removed_blocks:
            return candidate
        groups = {group.name: group for group in self.sparsity.groups if group.is_inside(candidate.removed_blocks)}
        thresholds = candidate.thresholds
        gates, masks = (
            {block: None if candidate.lacks(block) else value for block, value in part.items()}
            for part in (thresholds.blocks, thresholds.masks)
        )
        return replace(
            candidate,
            channels={
                name: groups[name].channels if name in groups else kept for name, kept in candidate.channels.items()
            },
            precision={
                layer: self.precision.precisions[0] if candidate.lacks(layer) else precision
                for layer, precision in candidate.precision.items()
            },
            patterns={layer: name for layer, name in candidate.patterns.items() if not candidate.lacks(layer)},
            thresholds=replace(thresholds, blocks=gates, masks=masks),
        )

    def with_thresholds(self, candidate: Candidate, thresholds: Thresholds) -> Candidate:
        """Returns the candidate with other thresholds.

        The head of an exit that never answers and the gate of a block that is always run are not deployed. Their layers
        get the reference precision, so that candidates with the same deployed files are equal.
        """
        layers = [layer for layer in candidate.precision if layer.startswith(thresholds.idle_layers())]
        precision = dict(candidate.precision) | dict.fromkeys(layers, self.precision.precisions[0])
        return replace(candidate, precision=precision, thresholds=thresholds)

    def dense(self) -> Candidate:
        """Returns the dense candidate: all channels, the reference precision, no exits, skips or reuse."""
        return self.whole(self.precision.precisions[0])

    def whole(self, precision: str) -> Candidate:
        """Returns the unpruned candidate without exits, skips or reuse in one precision, whether allowed or not."""
        channels = {group.name: group.channels for group in self.sparsity.groups}
        layers = uniform(self.precision.layers, precision, self.precision.precisions[0])
        return self.with_thresholds(Candidate(channels, layers), self.thresholds.closed())

    def uniform(
        self,
        keep: float,
        precision: str,
        confidence: float | None = None,
        pattern: str = DENSE,
        depth: float = 1.0,
        size: float = 1.0,
    ) -> dict[str, Value]:
        """Returns values that are the same for all layers: a share of the channels, a precision, a pattern, a depth.

        Args:
            keep: the share of channels, rounded to the nearest step.
            precision: of all layers that may have it; others get the nearest one.
            confidence: from which all exits answer, with gates, masks and frames accordingly; None if no exit answers
                and every block is run completely.
            pattern: of all layers that may have it.
            depth: the share of its blocks that each stage keeps, rounded to the nearest block.
            size: of the input, as a share of the images' own; the nearest one is taken.
        """
        values = self.thresholds.alike(confidence)
        values |= {name: stage.nearest(depth * stage.high) for name, stage in self.depth.dimensions().items()}
        values |= dict.fromkeys(self.input_size.dimensions(), self.input_size.nearest(size))
        for name, dimension in self.dimensions().items():
            if name in values:
                continue
            if not isinstance(dimension, Choice):
                values[name] = dimension.nearest(keep * dimension.high)
            elif name.startswith(PREFIX):
                values[name] = self.precision.nearest(name.removeprefix(PREFIX), precision)
            else:
                values[name] = pattern if pattern in dimension.choices else dimension.choices[0]
        return values

    def narrowed(self, allowed: Mapping[str, Sequence[str]]) -> "JointSpace":
        """Returns the space with only these precisions allowed for each layer."""
        precision = self.precision.without(allowed)
        return JointSpace(self.sparsity, precision, self.thresholds, self.patterns, self.depth, self.input_size)

    def apply(self, network: ExitNetwork, candidate: Candidate) -> ExitNetwork:
        """Returns the compressed torch network, with the candidate's depth, channels, patterns, input size and masks.

        Precisions and the other thresholds only take effect in the artifact.

        Raises:
            ValueError: the candidate does not fit the network.
        """
        smaller = shortened(self.sparsity.apply(network, candidate.channels), candidate.removed_blocks)
        apply_patterns(smaller, candidate.patterns)
        move_masks(smaller, candidate.thresholds.masks)
        return at_size(smaller, candidate.input_size)
