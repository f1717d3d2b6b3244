"""Dimensions of a search space, independent of the library that searches."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

Value = int | float | str


@dataclass(frozen=True)
class Integer:
    """Whole numbers from `low` to `high`, `step` apart, both ends included."""

    low: int
    high: int
    step: int = 1


@dataclass(frozen=True)
class Real:
    """Numbers from `low` to `high`, `step` apart, both ends included."""

    low: float
    high: float
    step: float


@dataclass(frozen=True)
class Choice:
    """One of several names."""

    choices: tuple[str, ...]


Dimension = Integer | Real | Choice


class Space(Protocol):
    """One kind of choices: its dimensions, and how their values become a part of a candidate."""

    def dimensions(self) -> dict[str, Dimension]:
        """Returns the dimensions by parameter name, without those that have only one value."""
        ...

    def read(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """Returns this space's part of a candidate, unprefixed, from a value for each dimension.

        Raises:
            KeyError: `values` lacks a dimension.
        """
        ...
