"""Rows of numbers for the parameters of a study, and back: what models and evolution work on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Codec:
    """Encodes parameters as rows `(n, d)`, one column for each dimension, and decodes them.

    A column counts the choices or steps of its dimension from 0 on; without steps it goes from 0 to 1, on a logarithmic
    scale where the dimension has one.

    Args:
        space: the distribution of every dimension by name; none of a single value.
    """

    space: Mapping[str, BaseDistribution]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The dimensions, in the order of columns."""
        return tuple(self.space)

    @cached_property
    def levels(self) -> NDArray[np.int64]:
        """How many values each dimension has, `(d,)`; 0 where it is continuous."""
        return np.array([_levels(distribution) for distribution in self.space.values()], dtype=np.int64)

    @cached_property
    def is_categorical(self) -> NDArray[np.bool_]:
        """Whether the values of each dimension have no order, `(d,)`."""
        return np.array([isinstance(dimension, CategoricalDistribution) for dimension in self.space.values()])

    @property
    def size(self) -> float:
        """The number of different rows; infinite where a dimension is continuous."""
        levels = self.levels.astype(float)
        return float(np.prod(np.where(levels > 0, levels, np.inf)))

    def encode(self, parameters: Sequence[Mapping[str, Any]]) -> Array:
        """Returns a row for each set of parameters, `(n, d)`; a value outside of its dimension is clipped."""
        rows = [[_encoded(space, values[name]) for name, space in self.space.items()] for values in parameters]
        return np.array(rows, dtype=np.float64).reshape(len(parameters), len(self.space))

    def decode(self, row: Array) -> dict[str, Any]:
        """Returns the parameters of one row `(d,)`, in the types that Optuna takes."""
        return {
            name: _decoded(space, float(number)) for (name, space), number in zip(self.space.items(), row, strict=True)
        }

    def random(self, count: int, rng: np.random.Generator) -> Array:
        """Returns uniform rows, `(count, d)`."""
        draws = rng.random((count, len(self.space)))
        return np.where(self.levels > 0, np.floor(draws * np.maximum(self.levels, 1)), draws)

    def numbers(self, rows: Array, name: str) -> Array:
        """Returns the values of a numerical dimension, or the indices of a categorical one's choices, `(n,)`.

        Args:
            rows: `(n, d)`.
            name: of the dimension.
        """
        distribution = self.space[name]
        column = rows[:, self.names.index(name)]
        if isinstance(distribution, CategoricalDistribution):
            return column
        assert isinstance(distribution, IntDistribution | FloatDistribution)
        low, high = distribution.low, distribution.high
        if distribution.log:
            return np.asarray(low * (high / low) ** column)
        return np.asarray(low + column * (distribution.step if distribution.step is not None else high - low))


def _levels(distribution: BaseDistribution) -> int:
    if isinstance(distribution, CategoricalDistribution):
        return len(distribution.choices)
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    if distribution.log or distribution.step is None:
        return 0
    return round((distribution.high - distribution.low) / distribution.step) + 1


def _encoded(distribution: BaseDistribution, value: Any) -> float:
    if isinstance(distribution, CategoricalDistribution):
        return float(distribution.to_internal_repr(value))
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    low, high = distribution.low, distribution.high
    clipped = min(max(float(value), low), high)
    if distribution.log:
        return float(np.log(clipped / low) / np.log(high / low))
    if distribution.step is None:
        return (clipped - low) / (high - low)
    return float(round((clipped - low) / distribution.step))


def _decoded(distribution: BaseDistribution, number: float) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[round(number)]
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    low, high = distribution.low, distribution.high
    if distribution.log:
        value = low * (high / low) ** number
    else:
        value = low + number * (distribution.step if distribution.step is not None else high - low)
    value = min(max(value, low), high)
    return round(value) if isinstance(distribution, IntDistribution) else float(value)
