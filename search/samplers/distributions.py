"""A space as Optuna sees it, and what to try first: a few versions that treat every layer alike."""

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from spaces.dimensions import Choice, Dimension, Integer, Value
from spaces.joint import JointSpace

_DEPTHS = (2 / 3, 1 / 3)
"""Shares of the blocks that first guesses keep."""


def distributions(space: JointSpace) -> dict[str, BaseDistribution]:
    """Returns Optuna's form of the space."""
    return {name: _distribution(dimension) for name, dimension in space.dimensions().items()}


def _distribution(dimension: Dimension) -> BaseDistribution:
    if isinstance(dimension, Choice):
        return CategoricalDistribution(dimension.choices)
    if isinstance(dimension, Integer):
        return IntDistribution(dimension.low, dimension.high, step=dimension.step)
    return FloatDistribution(dimension.low, dimension.high, step=dimension.step)


def first_guesses(space: JointSpace) -> list[dict[str, Value]]:
    """Returns versions that treat every layer alike, from the dense one on: they span the space's corners."""
    guesses: list[dict[str, Value]] = []
    for keep in (1.0, 0.75, 0.5):
        for threshold in (None, 0.9, 0.7):
            for precision in space.precision.precisions:
                guess = space.uniform(keep, precision, threshold)
                if guess not in guesses:
                    guesses.append(guess)
    if space.depth.dimensions():
        fast = space.precision.computed[-1]
        guesses += [space.uniform(1.0, fast, depth=depth) for depth in _DEPTHS]
    if space.input_size.dimensions():
        guesses.append(space.uniform(1.0, space.precision.computed[-1], size=0.0))
    for pattern in sorted({pattern for offered in space.patterns.patterns.values() for pattern in offered}):
        guesses.append(space.uniform(1.0, space.precision.computed[-1], None, pattern))
    return guesses
