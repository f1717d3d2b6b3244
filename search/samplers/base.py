"""What the loop of trials asks of samplers beyond what Optuna does."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from search.samplers.hypervolume.observations import ObservesTrials
from search.samplers.hypervolume.prior import ProblemPrior


@dataclass(frozen=True)
class SearchKnowledge:
    """What a search can tell a sampler beyond what Optuna's study says; samplers may ignore all of it.

    Args:
        prior: makes what is known of the problem without measuring; that takes a moment, so only who uses it calls it.
        observe: reads what was measured in trials, of versions that broke a limit as well.
    """

    prior: Callable[[], ProblemPrior]
    observe: ObservesTrials


class SamplerFactory(Protocol):
    '''Makes a sampler: a function, named by a line of `search.config.registries.SAMPLERS`.

    Example:
        """Quasi-Monte Carlo: points that fill the space more evenly than independent draws."""

        from optuna.samplers import BaseSampler, QMCSampler

        from search.samplers.base import SearchKnowledge


        def qmc(seed: int, _knowledge: SearchKnowledge | None = None) -> BaseSampler:
            """Returns a scrambled Sobol sequence; choices, which have no order, are drawn independently."""
            return QMCSampler(scramble=True, seed=seed, warn_independent_sampling=False)
    '''

    def __call__(self, seed: int, knowledge: SearchKnowledge | None = None, /) -> BaseSampler:
        """Returns a sampler.

        It is called once, when a search begins or goes on, and then asked by Optuna for one trial after the other.

        Args:
            seed: of its draws.
            knowledge: of the search; None where a sampler is tried without one.
        """
        ...


@runtime_checkable
class InformedSampler(Protocol):
    """A sampler that knows versions to begin with, and tells how it did; any other sampler does without both."""

    has_proposed: bool
    """Whether it has proposed anything since it was made."""

    def initial_proposals(self, distributions: Mapping[str, BaseDistribution]) -> list[dict[str, Any]]:
        """Returns configurations that are worth trying before anything was measured."""
        ...

    def report(self, trials: Sequence[FrozenTrial]) -> dict[str, Any]:
        """Returns, JSON-ready, how its proposals came about and how good its predictions were."""
        ...

    def remarks(self, trials: Sequence[FrozenTrial], objectives: Sequence[str]) -> list[str]:
        """Returns the same in words."""
        ...
