"""Rows of numbers for the parameters of a study, and back: what surrogates and evolution work on."""

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
    """The way between parameters and rows `(n, d)`, one column for each dimension.

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
        """How many values each dimension has, `(d,)`; 0 where there is no end of them."""
        return np.array([_levels(distribution) for distribution in self.space.values()], dtype=np.int64)

    @cached_property
    def is_categorical(self) -> NDArray[np.bool_]:
        """Whether the values of each dimension have no order, `(d,)`."""
        return np.array([isinstance(each, CategoricalDistribution) for each in self.space.values()])

    @property
    def size(self) -> float:
        """The number of different rows; infinite where a dimension is continuous."""
        levels = self.levels.astype(float)
        return float(np.prod(np.where(levels > 0, levels, np.inf)))

    def encode(self, parameters: Sequence[Mapping[str, Any]]) -> Array:
        """Returns a row for each set of parameters; what lies outside its dimension goes to the nearest end."""
        rows = [[_encoded(space, each[name]) for name, space in self.space.items()] for each in parameters]
        return np.array(rows, dtype=np.float64).reshape(len(parameters), len(self.space))

    def decode(self, row: Array) -> dict[str, Any]:
        """Returns the parameters of one row, in the types that Optuna wants."""
        return {
            name: _decoded(space, float(place)) for (name, space), place in zip(self.space.items(), row, strict=True)
        }

    def random(self, count: int, rng: np.random.Generator) -> Array:
        """Returns uniform rows."""
        draws = rng.random((count, len(self.space)))
        return np.where(self.levels > 0, np.floor(draws * np.maximum(self.levels, 1)), draws)

    def numbers(self, rows: Array, name: str) -> Array:
        """Returns the values of a numerical dimension, or the places of a categorical one's choices, `(n,)`."""
        distribution, places = self.space[name], rows[:, self.names.index(name)]
        if isinstance(distribution, CategoricalDistribution):
            return places
        assert isinstance(distribution, IntDistribution | FloatDistribution)
        low, high = distribution.low, distribution.high
        if distribution.log:
            return np.asarray(low * (high / low) ** places)
        return np.asarray(low + places * (distribution.step if distribution.step is not None else high - low))


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


def _decoded(distribution: BaseDistribution, place: float) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[round(place)]
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    low, high = distribution.low, distribution.high
    if distribution.log:
        value = low * (high / low) ** place
    else:
        value = low + place * (distribution.step if distribution.step is not None else high - low)
    value = min(max(value, low), high)
    return round(value) if isinstance(distribution, IntDistribution) else float(value)
