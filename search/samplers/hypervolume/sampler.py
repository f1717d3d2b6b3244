"""Expected hypervolume improvement for searches of a few hundred expensive trials."""

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.search_space import IntersectionSearchSpace
from optuna.trial import FrozenTrial

from search.samplers.base import SearchKnowledge
from search.samplers.hypervolume.batch_planner import BatchPlanner
from search.samplers.hypervolume.encoding import Array, Codec
from search.samplers.hypervolume.gaussian_process import HeldOutErrors
from search.samplers.hypervolume.knapsack import SHARES, knapsacks
from search.samplers.hypervolume.models import ModelKey, Posteriors, fit_models
from search.samplers.hypervolume.nsga2 import best_first, offspring
from search.samplers.hypervolume.observations import (
    Observations,
    ObservesTrials,
    observe_values,
    read_observations,
)
from search.samplers.hypervolume.prediction_errors import (
    predicted_and_measured,
    prediction_errors,
    recent_bias_and_std,
)
from search.samplers.hypervolume.prior import ProblemPrior
from search.samplers.hypervolume.proposals import (
    EVOLUTION_ALONE,
    EXPLORATION,
    RANDOM,
    Proposal,
    keep_proposal,
    origins,
    untried_or_last,
)
from search.samplers.hypervolume.reference_box import ReferenceBox

STARTUP = 10
"""So many trials are drawn at random where no others came before."""
_EXITS_SAVE = 1.25
"""Where thresholds are solved, a network that takes so much longer than the limit may keep it yet."""
_PARENTS = 100
"""Evolution on models begins with so many of the best rows that were measured, and as many mutated ones."""


class HypervolumeSampler(BaseSampler):
    """Proposes rows of the most expected hypervolume improvement within the constraints, in batches.

    Each batch fits a Gaussian process to every objective and constraint, runs NSGA-II on posterior means and on one
    function drawn from each posterior, and takes of what comes out the rows of most expected hypervolume improvement,
    one after the other, and a mutated one for what no model knows. Before any row is feasible, it takes rows that break
    the limits least, by Thompson sampling. Where models are uninformative, it goes on by evolution alone.

        sampler = HypervolumeSampler(seed=0)
        study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)

    Sources: Emmerich, Giannakoglou and Naujoks, 2006, for the acquisition function (see `acquisition`); Wilson et al.,
    2020, for functions drawn from a posterior (see `gaussian_process`); Deb et al., 2002, for NSGA-II (see `nsga2`).

    Args:
        seed: of all its draws.
        prior: what is known of the problem; every study can be searched without it.
        startup: trials at random before models are fitted.
        observe: reads what was measured in trials; it may know more than their values.
    """

    def __init__(
        self,
        seed: int | None = None,
        prior: ProblemPrior | None = None,
        startup: int = STARTUP,
        observe: ObservesTrials = observe_values,
    ) -> None:
        self._rng = np.random.default_rng(seed)
        self._independent = RandomSampler(seed=seed)
        self._prior = prior
        self._startup = startup
        self._observe = observe
        self._space = IntersectionSearchSpace(include_pruned=True)
        self._planned: deque[Proposal] = deque()
        self._planned_for: dict[str, BaseDistribution] = {}
        self._lock = threading.Lock()
        self.errors: dict[ModelKey, HeldOutErrors] = {}
        self.prediction_errors: dict[int, HeldOutErrors] = {}
        self.has_proposed = False

    def reseed_rng(self) -> None:
        """Begins other draws, for a copy in another process."""
        self._rng = np.random.default_rng()
        self._independent.reseed_rng()

    def infer_relative_search_space(
        self,
        study: optuna.Study,
        trial: FrozenTrial,  # noqa: ARG002  Optuna's signature
    ) -> dict[str, BaseDistribution]:
        """Returns the dimensions that all trials have, but for those of a single value."""
        space = self._space.calculate(study)
        return {name: distribution for name, distribution in space.items() if not distribution.single()}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Returns a uniform draw: for the first trials, and for dimensions that only some trials have."""
        return self._independent.sample_independent(study, trial, param_name, param_distribution)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Returns the parameters of the next proposal."""
        if not search_space:
            return {}
        codec = Codec(search_space)
        with self._lock:
            if self._planned_for != search_space:
                self._planned.clear()
                self._planned_for = dict(search_space)
            if not self._planned:
                others = [other for other in study.get_trials(deepcopy=False) if other.number != trial.number]
                self._planned.extend(self._plan(others, study, codec))
            proposal = self._planned.popleft()
            self.has_proposed = True
        keep_proposal(study, trial, proposal)
        return codec.decode(proposal.row)

    def initial_proposals(self, distributions: Mapping[str, BaseDistribution]) -> list[dict[str, Any]]:
        """Returns configurations of least estimated damage for several shares of what the limits allow.

        Args:
            distributions: of the space.
        """
        if self._prior is None:
            return []
        timed = [target for target in self._prior.objectives if target.kind in ("latency", "flops")]
        allowed = min([self._prior.allowed, *(target.worst / target.dense for target in timed)])
        times = [share * allowed * (_EXITS_SAVE if self._prior.solves_thresholds else 1.0) for share in SHARES]
        return knapsacks(self._prior.structure, Codec(distributions), times)

    def report(self, trials: Sequence[FrozenTrial]) -> dict[str, Any]:
        """Returns, JSON-ready, where proposals came from and how the last models did on what was held out.

        Args:
            trials: of the study, those of earlier runs included.
        """
        return {  # journals and MLflow have these names
            "proposals": dict(origins(trials)),
            "held_out": {_name(key): asdict(error) for key, error in self.errors.items()},
            "foresight": {_name(key): asdict(error) for key, error in self.prediction_errors.items()},
        }

    def remarks(self, trials: Sequence[FrozenTrial], objectives: Sequence[str]) -> list[str]:
        """Returns the same in words.

        Args:
            trials: of the study, those of earlier runs included.
            objectives: their names, in the study's order.
        """
        counts = origins(trials)
        counted = ", ".join(f"{count} by {origin}" for origin, count in counts.most_common())
        lines = [f"proposals of the sampler: {counted}"]
        for key, error in self.errors.items():
            name = objectives[key] if isinstance(key, int) else key
            before = self.prediction_errors.get(key) if isinstance(key, int) else None
            ahead = f"; {before.mape:.1%} on its {before.count} proposals before they were measured" if before else ""
            lines.append(
                f"surrogate of {name}, on {error.count} held-out measurements: R² {error.r2:.2f},"
                f" Spearman {error.spearman:.2f}, mean error {error.mape:.1%} ({error.form}){ahead}"
            )
        if alone := counts[EVOLUTION_ALONE]:
            count = "1 proposal was" if alone == 1 else f"{alone} proposals were"
            lines.append(f"the surrogates told too little at times: {count} made without them, by evolution alone")
        return lines

    def _plan(self, trials: Sequence[FrozenTrial], study: optuna.Study, codec: Codec) -> list[Proposal]:
        """Returns the next batch."""
        prior = self._prior if self._prior and self._prior.structure.names <= set(codec.names) else None
        known = prior.linear_constraints if prior else {}
        observations = read_observations(trials, codec, study.directions, known, self._observe)
        if len(observations.rows) < self._startup:
            rows = codec.random(32, self._rng)
            return [Proposal(untried_or_last(rows, observations.tried)[0], RANDOM)]
        explored = int(observations.is_feasible.any())  # before any row is feasible, functions that are drawn explore
        batch = max(4 if explored else 2, len(observations.rows) // 40)
        posteriors = fit_models(observations, codec, prior)
        self.errors = posteriors.errors
        self.prediction_errors = prediction_errors(trials, observations, codec)
        parents = _best_rows(observations, posteriors)
        if posteriors.are_uninformative:
            return self._by_evolution(observations, codec, parents, batch, EVOLUTION_ALONE)
        box = ReferenceBox.of(observations, posteriors, prior)
        bias_and_std = recent_bias_and_std(predicted_and_measured(trials, observations, codec), posteriors)
        planner = BatchPlanner(observations, posteriors, codec, parents, box, bias_and_std, self._rng)
        chosen = planner.by_models(batch - explored)
        if not chosen:
            return self._by_evolution(observations, codec, parents, batch, EXPLORATION)
        return chosen + planner.explore(chosen, batch - len(chosen))

    def _by_evolution(
        self, observations: Observations, codec: Codec, parents: Array, count: int, origin: str
    ) -> list[Proposal]:
        """Returns children of the best rows that were measured, models aside."""
        children = offspring(parents, codec, self._rng, 32)
        rows = untried_or_last(np.vstack([children, codec.random(8, self._rng)]), observations.tried)
        return [Proposal(row, origin) for row in rows[:count]]


def _name(key: ModelKey) -> str:
    return f"objective {key}" if isinstance(key, int) else key


def _best_rows(observations: Observations, posteriors: Posteriors) -> Array:
    """Returns the best rows that were measured, those that keep all limits first, `(k, d)`."""
    costs = posteriors.transformed(observations.costs)
    is_unknown = np.isnan(costs)
    violations = observations.violations + np.where(is_unknown.any(axis=1), 1e-6, 0.0)
    worst = np.nanmax(np.where(np.isfinite(costs), costs, 0.0), axis=0)
    return observations.rows[best_first(np.where(is_unknown, worst, costs), violations, _PARENTS)]


def ehvi(seed: int, knowledge: SearchKnowledge | None = None) -> BaseSampler:
    """Returns the sampler of expected hypervolume improvement.

    Args:
        seed: of its draws.
        knowledge: of the search: its prior, and what was measured; without, it learns from the trials' values alone.
    """
    if knowledge is None:
        return HypervolumeSampler(seed)
    return HypervolumeSampler(seed, knowledge.prior(), observe=knowledge.observe)
