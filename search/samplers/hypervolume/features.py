"""What surrogates look at: a few blocks of columns for each row, scaled so that every block matters alike at first."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np

from search.samplers.hypervolume.encoding import Array, Codec
from search.samplers.hypervolume.prior import Structure

_SAMPLE = 256
_BASES = (0.2, 0.35, 0.5, 0.65, 0.8, 0.9)
"""Where the share of inputs that an exit keeps may begin to rise, in thresholds."""
_STEPS = (8, 16, 32)
"""Multiples to which kernels may pad channels."""
_PLAIN = (1.0, 0.7, 1.0)
"""What the blocks of dimensions without a meaning weigh."""

Blocks = Callable[[Array], list[Array]]
"""Columns for rows, `(n, anything)` a block."""
Columns = Callable[[Array], Array]
"""Columns for rows, `(n, k)`."""


@dataclass(frozen=True)
class Features:
    """One set of columns.

    Args:
        blocks: computes them.
        scales: what each block's columns are multiplied by.
        centres: what is taken off before.
    """

    blocks: Blocks
    scales: list[Array]
    centres: list[Array]

    @classmethod
    def fit(cls, blocks: Blocks, weights: tuple[float, ...], codec: Codec, natural: tuple[int, ...]) -> "Features":
        """Returns the columns, scaled by how they vary over the space.

        Args:
            blocks: computes them.
            weights: of each block.
            codec: of the space.
            natural: blocks whose columns are in one unit, so that they keep their proportions.
        """
        sample = blocks(codec.random(_SAMPLE, np.random.default_rng(0)))
        scales, centres = [], []
        for place, (columns, weight) in enumerate(zip(sample, weights, strict=True)):
            spread = columns.std(axis=0)
            if place in natural:
                spread = np.full_like(spread, np.sqrt((spread**2).sum()))
            else:
                spread = spread * np.sqrt(max(len(spread), 1))
            scales.append(np.where(spread > 0, weight / np.maximum(spread, 1e-12), 0.0))
            centres.append(columns.mean(axis=0))
        return cls(blocks, scales, centres)

    def __call__(self, rows: Array) -> Array:
        """Returns the columns of rows, `(n, k)`."""
        parts = zip(self.blocks(rows), self.scales, self.centres, strict=True)
        return np.concatenate([(columns - centre) * scale for columns, scale, centre in parts], axis=1)


def plain(codec: Codec) -> Features:
    """Returns columns that know nothing of what dimensions mean: position, its square, and one for each choice."""
    return Features.fit(_plain_blocks(codec, codec.names), _PLAIN, codec, ())


def _plain_blocks(codec: Codec, names: Collection[str]) -> Blocks:
    levels, categorical = codec.levels, codec.is_categorical
    wanted = np.array([name in names for name in codec.names], dtype=bool)
    ordered, choices = np.flatnonzero(wanted & ~categorical), np.flatnonzero(wanted & categorical)

    def blocks(rows: Array) -> list[Array]:
        places = rows[:, ordered] / np.maximum(levels[ordered] - 1, 1)
        chosen = [(rows[:, [column]] == np.arange(levels[column])).astype(float) for column in choices]
        return [places, (places - 0.5) ** 2, _joined(chosen, rows)]

    return blocks


def of_latency(structure: Structure, codec: Codec) -> Features:
    """Returns columns for what a network costs: work by layer and precision, boundaries, and what exits save."""
    speeds = np.array(list(structure.speeds.values()))
    others = _plain_blocks(codec, set(codec.names) - structure.names)

    def blocks(rows: Array) -> list[Array]:
        work, precision = structure.work(codec, rows)[:, : structure.layers], structure.precisions(codec, rows)
        chosen = precision[:, :, None] == np.arange(len(speeds))
        timed = work * speeds[precision]
        boundaries = (precision[:, 1:] != precision[:, :-1]).sum(axis=1, keepdims=True)
        bases = _exit_bases(structure, codec, rows)
        behind = [timed[:, after:].sum(axis=1, keepdims=True) for after in structure.exit_after]
        saved = [base * behind[number] for number, base in enumerate(bases)]
        return [
            timed.sum(axis=1, keepdims=True),
            (work[:, :, None] * chosen).reshape(len(rows), -1),
            chosen[:, :, 1:].reshape(len(rows), -1).astype(float),
            boundaries.astype(float),
            _padded(structure, codec, rows, chosen * speeds),
            _joined(bases, rows),
            _joined(saved, rows),
            *others(rows),
        ]

    return Features.fit(blocks, (3.0, 1.0, 0.5, 0.5, 1.0, 1.0, 1.0, *_PLAIN), codec, (1, 4))


def _padded(structure: Structure, codec: Codec, rows: Array, timed: Array) -> Array:
    """Returns the time in each precision if kernels padded channels to multiples of 8, 16 or 32, `(n, 3 * precisions)`.

    Args:
        structure: of the network.
        codec: of its space.
        rows: to look at.
        timed: for each layer and precision its speed where the layer has it, else 0, `(n, L, precisions)`.
    """
    kept, columns = structure.kept(codec, rows), []
    for step in _STEPS:
        gone = structure.full - np.minimum(np.ceil(kept / step) * step, structure.full)
        work = structure.flops * (1 - gone @ structure.inputs.T) * (1 - gone @ structure.outputs.T)
        columns.append((work[:, : structure.layers, None] * timed).sum(axis=1))
    return np.concatenate(columns, axis=1)


def of_damage(structure: Structure, codec: Codec) -> Features:
    """Returns columns for what a network loses: lost channels and precision by layer, and what was estimated."""
    kinds = len(structure.speeds)
    others = _plain_blocks(codec, set(codec.names) - structure.names)
    outputs = structure.outputs[: structure.layers]

    def blocks(rows: Array) -> list[Array]:
        lost = 1 - structure.kept(codec, rows) / structure.full
        precision = structure.precisions(codec, rows)
        chosen = (precision[:, :, None] == np.arange(1, kinds)).astype(float)
        narrow = (structure.full - structure.kept(codec, rows)) @ outputs.T
        guessed = structure.estimated_damage(codec, rows)
        bases = [1 - base for base in _exit_bases(structure, codec, rows)]
        return [
            np.concatenate([lost, lost**2, lost**4], axis=1),
            chosen.reshape(len(rows), -1),
            (chosen * narrow[:, :, None]).reshape(len(rows), -1),
            guessed,
            guessed.sum(axis=1, keepdims=True),
            _joined(bases, rows),
            *others(rows),
        ]

    return Features.fit(blocks, (1.0, 1.0, 0.4, 1.5, 1.0, 1.0, *_PLAIN), codec, (3,))


def _exit_bases(structure: Structure, codec: Codec, rows: Array) -> list[Array]:
    """Returns, for each exit, rising curves over its threshold, `(n, curves)`."""
    thresholds = [codec.numbers(rows, name)[:, None] for name in structure.exits]
    return [1 / (1 + np.exp(-(each - np.array(_BASES)) * 10)) for each in thresholds]


def _joined(parts: list[Array], rows: Array) -> Array:
    return np.concatenate([np.zeros((len(rows), 0)), *parts], axis=1)
