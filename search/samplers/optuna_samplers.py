"""Optuna's own samplers, with the settings that suit a search of a few hundred trials."""

import optuna
from optuna.samplers import BaseSampler

from search.samplers.base import SearchKnowledge


def tpe(seed: int, _knowledge: SearchKnowledge | None = None) -> BaseSampler:
    """Returns the tree-structured Parzen estimator over all dimensions together, Optuna's default."""
    return optuna.samplers.TPESampler(seed=seed, multivariate=True)


def nsga2(seed: int, _knowledge: SearchKnowledge | None = None) -> BaseSampler:
    """Returns NSGA-II; its population suits a search of a few hundred trials."""
    return optuna.samplers.NSGAIISampler(seed=seed, population_size=20)


def gp(seed: int, _knowledge: SearchKnowledge | None = None) -> BaseSampler:
    """Returns Gaussian processes; with 60 dimensions the hundredth proposal takes 12 s of CPU."""
    return optuna.samplers.GPSampler(seed=seed)


def uniform(seed: int, _knowledge: SearchKnowledge | None = None) -> BaseSampler:
    """Returns independent uniform draws: what every other sampler has to beat."""
    return optuna.samplers.RandomSampler(seed=seed)
