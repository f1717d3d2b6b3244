"""What models look at: a few blocks of features for each row, scaled so that every block matters alike at first."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np

from search.samplers.hypervolume.encoding import Array, Codec
from search.samplers.hypervolume.prior import NetworkStructure

_SAMPLE = 256
"""So many random rows tell how much features vary."""
_RISES_AT = (0.2, 0.35, 0.5, 0.65, 0.8, 0.9)
"""Where the share of inputs that an exit keeps may begin to rise, in thresholds."""
_PADDING_STEPS = (8, 16, 32)
"""Multiples to which kernels may pad channels."""
_GENERIC_WEIGHTS = (1.0, 0.7, 1.0)
"""Of the blocks of dimensions of which nothing is known: position, its square, choices."""

ComputesBlocks = Callable[[Array], list[Array]]
"""Returns blocks of features of rows `(n, d)`, `(n, any)` each."""
FeatureMap = Callable[[Array], Array]
"""Returns the features of rows `(n, d)`, `(n, k)`."""


@dataclass(frozen=True)
class ScaledFeatures:
    """Features of rows in blocks, each centred and scaled.

    Args:
        blocks: computes them.
        scales: what each block's columns are multiplied by.
        centres: what is taken off before.
    """

    blocks: ComputesBlocks
    scales: list[Array]
    centres: list[Array]

    @classmethod
    def fit(
        cls, blocks: ComputesBlocks, weights: tuple[float, ...], codec: Codec, one_unit: tuple[int, ...]
    ) -> "ScaledFeatures":
        """Returns the features, scaled by how they vary over the space.

        Args:
            blocks: computes them.
            weights: of each block.
            codec: of the space.
            one_unit: indices of blocks whose columns are in one unit, so that they keep their proportions.
        """
        sample = blocks(codec.random(_SAMPLE, np.random.default_rng(0)))
        scales, centres = [], []
        for index, (columns, weight) in enumerate(zip(sample, weights, strict=True)):
            stds = columns.std(axis=0)
            together = np.full_like(stds, np.sqrt((stds**2).sum()))
            std = together if index in one_unit else stds * np.sqrt(max(len(stds), 1))
            scales.append(np.where(std > 0, weight / np.maximum(std, 1e-12), 0.0))
            centres.append(columns.mean(axis=0))
        return cls(blocks, scales, centres)

    def __call__(self, rows: Array) -> Array:
        """Returns the features of rows `(n, d)`, `(n, k)`."""
        parts = zip(self.blocks(rows), self.scales, self.centres, strict=True)
        return np.concatenate([(columns - centre) * scale for columns, scale, centre in parts], axis=1)


def generic_features(codec: Codec) -> ScaledFeatures:
    """Returns features that know nothing of the dimensions: position, its square, and one for each choice."""
    return ScaledFeatures.fit(_generic_blocks(codec, codec.names), _GENERIC_WEIGHTS, codec, ())


def _generic_blocks(codec: Codec, names: Collection[str]) -> ComputesBlocks:
    levels, is_categorical = codec.levels, codec.is_categorical
    is_named = np.array([name in names for name in codec.names], dtype=bool)
    ordered = np.flatnonzero(is_named & ~is_categorical)
    categorical = np.flatnonzero(is_named & is_categorical)

    def blocks(rows: Array) -> list[Array]:
        positions = rows[:, ordered] / np.maximum(levels[ordered] - 1, 1)
        one_hot = [(rows[:, [column]] == np.arange(levels[column])).astype(float) for column in categorical]
        return [positions, (positions - 0.5) ** 2, _concatenated(one_hot, rows)]

    return blocks


def latency_features(structure: NetworkStructure, codec: Codec) -> ScaledFeatures:
    """Returns features of what a network costs: work by layer and precision, boundaries, and what exits save."""
    speeds = np.array(list(structure.speeds.values()))
    others = _generic_blocks(codec, set(codec.names) - structure.names)

    def blocks(rows: Array) -> list[Array]:
        work = structure.work(codec, rows)[:, : structure.layers]
        precision = structure.precisions(codec, rows)
        runs = structure.runs(codec, rows)[:, : structure.layers, None]
        one_hot = (precision[:, :, None] == np.arange(len(speeds))) * runs
        time = work * speeds[precision]
        boundaries = (precision[:, 1:] != precision[:, :-1]).sum(axis=1, keepdims=True)
        curves = _exit_curves(structure, codec, rows)
        behind = [time[:, after:].sum(axis=1, keepdims=True) for after in structure.exit_after]
        saved = [curve * behind[number] for number, curve in enumerate(curves)]
        return [
            time.sum(axis=1, keepdims=True),
            (work[:, :, None] * one_hot).reshape(len(rows), -1),
            np.concatenate([one_hot[:, :, 1:].reshape(len(rows), -1), structure.kept_blocks(codec, rows)], axis=1),
            boundaries.astype(float),
            _padded_time(structure, codec, rows, one_hot * speeds),
            _concatenated(curves, rows),
            _concatenated(saved, rows),
            *others(rows),
        ]

    return ScaledFeatures.fit(blocks, (3.0, 1.0, 0.5, 0.5, 1.0, 1.0, 1.0, *_GENERIC_WEIGHTS), codec, (1, 4))


def _padded_time(structure: NetworkStructure, codec: Codec, rows: Array, speeds: Array) -> Array:
    """Returns the time in each precision if kernels padded channels to multiples of 8, 16 or 32, `(n, 3 * precisions)`.

    Args:
        structure: of the network.
        codec: of its space.
        rows: to look at, `(n, d)`.
        speeds: for each layer and precision its speed where the layer has it, else 0, `(n, L, precisions)`.
    """
    kept, columns = structure.kept(codec, rows), []
    for step in _PADDING_STEPS:
        removed = structure.full - np.minimum(np.ceil(kept / step) * step, structure.full)
        work = structure.flops * (1 - removed @ structure.inputs.T) * (1 - removed @ structure.outputs.T)
        work *= structure.runs(codec, rows) * structure.pixels(codec, rows)[:, None]
        columns.append((work[:, : structure.layers, None] * speeds).sum(axis=1))
    return np.concatenate(columns, axis=1)


def damage_features(structure: NetworkStructure, codec: Codec) -> ScaledFeatures:
    """Returns features of what a network loses: lost channels and precision by layer, and what was estimated."""
    precisions = len(structure.speeds)
    others = _generic_blocks(codec, set(codec.names) - structure.names)
    outputs = structure.outputs[: structure.layers]

    def blocks(rows: Array) -> list[Array]:
        kept = structure.kept(codec, rows)
        lost = 1 - kept / structure.full
        gone = 1 - structure.kept_blocks(codec, rows)
        runs = structure.runs(codec, rows)[:, : structure.layers, None]
        precision = structure.precisions(codec, rows)
        one_hot = (precision[:, :, None] == np.arange(1, precisions)) * runs
        narrowness = (structure.full - kept) @ outputs.T
        estimated = structure.estimated_damage(codec, rows)
        curves = [1 - curve for curve in _exit_curves(structure, codec, rows)]
        return [
            np.concatenate([lost, lost**2, lost**4], axis=1),
            np.concatenate([gone, gone**2, gone**4], axis=1),
            _concatenated(_smaller(structure, codec, rows), rows),
            one_hot.reshape(len(rows), -1),
            (one_hot * narrowness[:, :, None]).reshape(len(rows), -1),
            estimated,
            estimated.sum(axis=1, keepdims=True),
            _concatenated(curves, rows),
            *others(rows),
        ]

    return ScaledFeatures.fit(blocks, (1.0, 1.0, 1.0, 1.0, 0.4, 1.5, 1.0, 1.0, *_GENERIC_WEIGHTS), codec, (5,))


def _smaller(structure: NetworkStructure, codec: Codec, rows: Array) -> list[Array]:
    """Returns the share of the pixels that inputs lack, and its square, `(n, 1)` each; nothing where none may lack."""
    if structure.size is None:
        return []
    gone = 1 - structure.pixels(codec, rows)[:, None]
    return [gone, gone**2]


def _exit_curves(structure: NetworkStructure, codec: Codec, rows: Array) -> list[Array]:
    """Returns, for each exit, sigmoids of its threshold, `(n, curves)`."""
    thresholds = [codec.numbers(rows, name)[:, None] for name in structure.exits]
    return [1 / (1 + np.exp(-(threshold - np.array(_RISES_AT)) * 10)) for threshold in thresholds]


def _concatenated(blocks: list[Array], rows: Array) -> Array:
    return np.concatenate([np.zeros((len(rows), 0)), *blocks], axis=1)
