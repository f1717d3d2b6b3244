"""Dimensions of a search space, independent of the library that searches."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

Value = int | float | str


@dataclass(frozen=True)
class Integer:
    """Whole numbers from `low` to `high`, `step` apart, both ends included."""

    low: int
    high: int
    step: int = 1

    def nearest(self, value: float) -> int:
        """Returns the nearest step to a value; beyond an end, that end."""
        nearest = self.low + round((value - self.low) / self.step) * self.step
        return min(max(nearest, self.low), self.high)


@dataclass(frozen=True)
class Real:
    """Numbers from `low` to `high`, `step` apart, both ends included."""

    low: float
    high: float
    step: float

    def nearest(self, value: float) -> float:
        """Returns the nearest step to a value, rounded to 6 decimals; beyond an end, that end."""
        nearest = self.low + round((value - self.low) / self.step) * self.step
        return round(min(max(nearest, self.low), self.high), 6)


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

    def read(self, values: Mapping[str, Value]) -> Any:
        """Returns this space's part of a candidate from a value for each dimension: values by unprefixed name, or a
        type whose `to_dict` returns them.

        Raises:
            KeyError: `values` lacks a dimension.
        """
        ...
