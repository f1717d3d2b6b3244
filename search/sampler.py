"""What to try next: Optuna's samplers, after a few versions that treat every layer alike."""

import difflib
from collections.abc import Mapping

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler

from search.objects import resolve
from spaces.candidate import NEVER_EXIT
from spaces.errors import UserError
from spaces.joint import JointSpace
from spaces.space import Choice, Dimension, Integer, Value

SAMPLERS: Mapping[str, str] = {
    "tpe": "search.sampler:tpe",
    "nsga2": "search.sampler:nsga2",
    "gp": "search.sampler:gp",
    "random": "search.sampler:uniform",
}
"""Every sampler, by the name that `--sampler` takes."""


class SamplerError(UserError):
    """A sampler that does not exist."""


def check_sampler(name: str) -> None:
    """Checks that there is such a sampler.

    Raises:
        SamplerError: there is none.
    """
    if name not in SAMPLERS:
        near = difflib.get_close_matches(name, SAMPLERS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(SAMPLERS)}"
        raise SamplerError(f"a sampler is one that Optuna has, got {name!r}; {hint}")


def sampler(name: str, seed: int) -> BaseSampler:
    """Returns the sampler called `name`.

    Raises:
        SamplerError: there is none.
    """
    check_sampler(name)
    made: BaseSampler = resolve(SAMPLERS[name])(seed)
    return made


def tpe(seed: int) -> BaseSampler:
    """Returns the tree-structured Parzen estimator over all dimensions together, Optuna's default."""
    return optuna.samplers.TPESampler(seed=seed, multivariate=True)


def nsga2(seed: int) -> BaseSampler:
    """Returns NSGA-II; its population suits a search of a few hundred trials."""
    return optuna.samplers.NSGAIISampler(seed=seed, population_size=20)


def gp(seed: int) -> BaseSampler:
    """Returns Gaussian processes; its proposals take seconds from the hundredth trial on."""
    return optuna.samplers.GPSampler(seed=seed)


def uniform(seed: int) -> BaseSampler:
    """Returns independent uniform draws: what every other sampler has to beat."""
    return optuna.samplers.RandomSampler(seed=seed)


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
        for threshold in (NEVER_EXIT, 0.9, 0.7):
            for precision in space.precision.precisions:
                guess = space.uniform(keep, precision, threshold)
                if guess not in guesses:
                    guesses.append(guess)
    for pattern in sorted({pattern for offered in space.patterns.patterns.values() for pattern in offered}):
        guesses.append(space.uniform(1.0, space.precision.computed[-1], NEVER_EXIT, pattern))
    return guesses
