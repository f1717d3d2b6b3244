"""A sampler for searches of a few hundred dear trials: surrogates, evolution on them, and the hypervolume to be won."""

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.search_space import IntersectionSearchSpace
from optuna.trial import FrozenTrial

from search.samplers.base import MakesPrior
from search.samplers.hypervolume.acquisition import Forecast, choose_by_hypervolume, likely, open_points
from search.samplers.hypervolume.calibration_error import PROPOSAL, foresight, foretold, key_of, missed_by, origins
from search.samplers.hypervolume.encoding import Array, Codec
from search.samplers.hypervolume.gaussian_process import HeldOut
from search.samplers.hypervolume.knapsack import SHARES, knapsacks
from search.samplers.hypervolume.models import Beliefs, Functions, Scale, believe
from search.samplers.hypervolume.nsga2 import evolve, mutated, non_dominated, offspring, ranked
from search.samplers.hypervolume.observations import Observed, observe
from search.samplers.hypervolume.prior import Meaning

STARTUP = 10
"""So many trials are drawn at random where no others came before."""
ALONE = "evolution"
"""Proposes where surrogates tell too little."""
_EXITS_SAVE = 1.25
"""Where thresholds are solved, a network that takes so much longer than the limit may keep it yet."""
_SAFE = 0.9
"""What is proposed keeps the constraints with this probability, where there is such a row: a version that breaks one is
a trial that is nearly lost."""
_KNOWN = 100
"""Evolution on surrogates begins with so many of the best rows that were measured, and as many changed ones."""


@dataclass(frozen=True)
class _Proposal:
    """A row, what proposes it, and the cost that is expected of each objective; none without surrogates."""

    row: Array
    origin: str
    costs: tuple[float, ...] = ()


class FrontSampler(BaseSampler):
    """Proposes what probably adds most to the hypervolume within the constraints.

    Each batch fits a surrogate to every objective and constraint, evolves rows on them from the best measured ones,
    and takes those that add most, one after the other, and a changed one for what no surrogate knows. Where surrogates
    tell nothing of what was held out, it goes on from the best measured rows without them: by evolution alone.

    Args:
        seed: of all its draws.
        meaning: of dimensions, objectives and constraints; every study can be searched without it.
        startup: trials at random before the first surrogate.
    """

    def __init__(self, seed: int | None = None, meaning: Meaning | None = None, startup: int = STARTUP) -> None:
        self._rng = np.random.default_rng(seed)
        self._independent = RandomSampler(seed=seed)
        self._meaning = meaning
        self._startup = startup
        self._space = IntersectionSearchSpace(include_pruned=True)
        self._planned: deque[_Proposal] = deque()
        self._planned_for: dict[str, BaseDistribution] = {}
        self._lock = threading.Lock()
        self.errors: dict[str, HeldOut] = {}
        self.foresight: dict[str, HeldOut] = {}
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
        found = self._space.calculate(study)
        return {name: distribution for name, distribution in found.items() if not distribution.single()}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Returns a uniform draw: for the first trials, and for dimensions that only some trials have."""
        return self._independent.sample_independent(study, trial, param_name, param_distribution)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Returns the next proposal."""
        if not search_space:
            return {}
        codec = Codec(search_space)
        with self._lock:
            if self._planned_for != search_space:
                self._planned.clear()
                self._planned_for = dict(search_space)
            if not self._planned:
                others = [each for each in study.get_trials(deepcopy=False) if each.number != trial.number]
                self._planned.extend(self._plan(others, study, codec))
            proposal = self._planned.popleft()
            self.has_proposed = True
        told: Any = {"origin": proposal.origin, "costs": list(proposal.costs)}
        study._storage.set_trial_system_attr(trial._trial_id, PROPOSAL, told)
        return codec.decode(proposal.row)

    def initial_proposals(self, distributions: Mapping[str, BaseDistribution]) -> list[dict[str, Any]]:
        """Returns configurations of least estimated damage for several shares of what the limits allow.

        Args:
            distributions: of the space.
        """
        if self._meaning is None:
            return []
        allowed = min(aim.worst / aim.dense for aim in self._meaning.aims if aim.kind != "accuracy")
        times = [share * allowed * (_EXITS_SAVE if self._meaning.is_solved else 1.0) for share in SHARES]
        return knapsacks(self._meaning.structure, Codec(distributions), times)

    def report(self, trials: Sequence[FrozenTrial]) -> dict[str, Any]:
        """Returns, JSON-ready, where proposals came from and how the last surrogates did on what was held out.

        Args:
            trials: of the study, those of earlier runs included.
        """
        return {
            "proposals": dict(origins(trials)),
            "held_out": {name: asdict(error) for name, error in self.errors.items()},
            "foresight": {name: asdict(error) for name, error in self.foresight.items()},
        }

    def remarks(self, trials: Sequence[FrozenTrial], objectives: Sequence[str]) -> list[str]:
        """Returns the same in words.

        Args:
            trials: of the study, those of earlier runs included.
            objectives: their names, in the study's order.
        """
        found = origins(trials)
        counted = ", ".join(f"{count} by {origin}" for origin, count in found.most_common())
        lines = [f"proposals of the sampler: {counted}"]
        for place, error in self.errors.items():
            name = objectives[int(place.split()[1])] if place.startswith("objective ") else place
            before = self.foresight.get(place)
            ahead = f"; {before.mape:.1%} on its {before.count} proposals before they were measured" if before else ""
            lines.append(
                f"surrogate of {name}, on {error.count} held-out measurements: R² {error.r2:.2f},"
                f" Spearman {error.spearman:.2f}, mean error {error.mape:.1%} ({error.form}){ahead}"
            )
        if alone := found[ALONE]:
            told = "1 proposal was" if alone == 1 else f"{alone} proposals were"
            lines.append(f"the surrogates told too little at times: {told} made without them, by evolution alone")
        return lines

    def _plan(self, trials: Sequence[FrozenTrial], study: optuna.Study, codec: Codec) -> list[_Proposal]:
        meaning = self._meaning if self._fits(codec) else None
        observed = _observed(trials, codec, study, meaning)
        if len(observed.rows) < self._startup:
            return [_Proposal(_fresh(codec.random(32, self._rng), observed)[0], "random")]
        explored = int(observed.is_feasible.any())  # before any version is feasible, functions that are drawn explore
        batch = max(4 if explored else 2, len(observed.rows) // 40)
        beliefs = believe(observed, codec, meaning)
        self.errors = beliefs.errors
        self.foresight = foresight(trials, observed, codec)
        parents = _best(observed, beliefs)
        are_bad = beliefs.are_bad
        missed = missed_by(foretold(trials, observed, codec), beliefs)
        wanted = 0 if are_bad else batch - explored
        chosen = self._by_surrogates(observed, beliefs, codec, meaning, parents, missed, wanted) if wanted else []
        children = (
            mutated(parents[self._rng.integers(0, min(len(parents), 20), 32)], codec, self._rng, 2.0)
            if chosen
            else offspring(parents, codec, self._rng, 32)
        )
        taken = [proposal.row for proposal in chosen]
        rest = _fresh(np.vstack([children, codec.random(8, self._rng)]), observed, taken)
        if chosen:
            allowed = _Box.around(observed, beliefs, meaning).allowed
            chances = Forecast.of(beliefs, rest).wary(missed).keeps(allowed)
            rest = rest[likely(chances, _SAFE, batch - len(chosen))]
        origin = ALONE if are_bad else "exploration"
        return chosen + [_Proposal(row, origin) for row in rest[: batch - len(chosen)]]

    def _fits(self, codec: Codec) -> bool:
        return self._meaning is not None and self._meaning.structure.names <= set(codec.names)

    def _by_surrogates(
        self,
        observed: Observed,
        beliefs: Beliefs,
        codec: Codec,
        meaning: Meaning | None,
        parents: Array,
        missed: Array,
        count: int,
    ) -> list[_Proposal]:
        """Returns the rows that add most as far as the surrogates can tell; fewer where they see nothing to win."""
        box = _Box.around(observed, beliefs, meaning)
        if not observed.is_feasible.any():
            return self._approaching(observed, beliefs, codec, parents, box, count)
        pools = [
            self._evolved(functions, codec, parents, box) for functions in (beliefs.expected, beliefs.draw(self._rng))
        ]
        pool = _fresh(np.vstack(pools), observed, at_least_one=False)
        if not len(pool):
            return []
        forecast = Forecast.of(beliefs, pool)
        safe = likely(forecast.wary(missed).keeps(box.allowed), _SAFE, 2 * count)
        pool, forecast = pool[safe], forecast.some(safe)
        return [
            _Proposal(pool[place], "surrogate", _costs(beliefs, forecast, place))
            for place in self._winning(observed, beliefs, forecast, box, count)
        ]

    def _evolved(self, functions: Functions, codec: Codec, parents: Array, box: "_Box") -> Array:
        """Returns what evolution on some functions comes to."""
        start = np.vstack([parents, mutated(parents, codec, self._rng, 3.0), codec.random(20, self._rng)])
        return evolve(start, lambda rows: box.judged(functions, rows), codec, self._rng)[0]

    def _approaching(
        self, observed: Observed, beliefs: Beliefs, codec: Codec, parents: Array, box: "_Box", count: int
    ) -> list[_Proposal]:
        """Returns rows that break the limits least, each by another function that agrees with what was measured.

        Source: Thompson, On the Likelihood that One Unknown Probability Exceeds Another, 1933.
        """
        chosen: list[_Proposal] = []
        for number in range(count):
            functions = beliefs.draw(self._rng) if number else beliefs.expected
            pool = self._evolved(functions, codec, parents, box)
            safest = np.argsort(box.worst(functions, pool), kind="stable")
            fresh = _fresh(pool[safest], observed, [each.row for each in chosen], at_least_one=False)
            if len(fresh):
                costs = _costs(beliefs, Forecast.of(beliefs, fresh[:1]), 0)
                chosen.append(_Proposal(fresh[0], "surrogate", costs))
        return chosen

    def _winning(self, observed: Observed, beliefs: Beliefs, forecast: Forecast, box: "_Box", count: int) -> list[int]:
        scales = [belief.scale for belief in beliefs.objectives]
        nearest = np.minimum((forecast.means - forecast.deviations).min(axis=0), box.front_places.min(axis=0))
        # Hopes for more than is possible would make all of that hypervolume look as if it were still to be won.
        low = np.maximum([float(scale.back(place)) for scale, place in zip(scales, nearest, strict=True)], box.least)
        points = open_points(low, box.reference, box.front, self._rng)
        if not len(points):
            return []
        places = np.stack([scale.forward(column) for scale, column in zip(scales, points.T, strict=True)], axis=1)
        pending = (
            Forecast.of(beliefs, observed.pending).beats(places)
            if len(observed.pending)
            else np.zeros((0, len(points)))
        )
        return choose_by_hypervolume(forecast.beats(places), pending, count)


def _observed(trials: Sequence[FrozenTrial], codec: Codec, study: optuna.Study, meaning: Meaning | None) -> Observed:
    if meaning is None:
        return observe(trials, codec, study.directions, {})
    return observe(trials, codec, study.directions, meaning.links, [aim.kind for aim in meaning.aims])


@dataclass(frozen=True)
class _Box:
    """Where hypervolume counts.

    Args:
        front: the feasible costs that were measured and that none beats, `(k, m)`.
        front_places: the same on the scales.
        reference: the worst costs that count.
        least: costs that nothing is below; minus infinity where nobody knows.
        limits: the highest costs that count, on the scales; infinite where there is none.
        allowed: the highest costs that keep the constraints, on the scales; infinite where there is none.
        spans: how far objectives vary, on the scales.
    """

    front: Array
    front_places: Array
    reference: Array
    least: Array
    limits: Array
    allowed: Array
    spans: Array

    @classmethod
    def around(cls, observed: Observed, beliefs: Beliefs, meaning: Meaning | None) -> "_Box":
        """Returns the box that the study's meaning says, or else one around what was measured."""
        scales = [belief.scale for belief in beliefs.objectives]
        costs = observed.costs[observed.is_feasible]
        front = costs[non_dominated(costs)]
        known = observed.costs[observed.is_whole]
        reference, least = observed.limits.copy(), np.full(len(scales), -np.inf)
        if meaning is not None:
            least = np.array([aim.least_cost for aim in meaning.aims])
            worst = [-aim.worst if aim.kind == "accuracy" else aim.worst for aim in meaning.aims]
            reference = np.minimum(reference, worst)
        spread = np.ptp(known, axis=0) if len(known) else np.ones(len(scales))
        if len(front):
            reference = np.where(np.isfinite(reference), reference, front.max(axis=0) + 0.1 * np.maximum(spread, 1e-12))
        limits = reference if meaning is not None else observed.limits
        places = np.stack([_on(scale, column) for scale, column in zip(scales, observed.costs.T, strict=True)], axis=1)
        spans = np.array([float(np.nanstd(column)) if (~np.isnan(column)).any() else 1.0 for column in places.T])
        return cls(
            front,
            np.stack([_on(scale, column) for scale, column in zip(scales, front.T, strict=True)], axis=1),
            reference,
            least,
            _each_on(scales, limits),
            _each_on(scales, observed.limits),
            np.maximum(spans, 1e-9),
        )

    def judged(self, functions: Functions, rows: Array) -> tuple[Array, Array]:
        """Returns costs on the scales, and how far they lie outside of the limits."""
        costs = np.stack([function(rows) for function in functions.objectives], axis=1)
        broken = np.maximum((costs - self.limits) / self.spans, 0.0).sum(axis=1)
        for function in functions.others:
            broken += np.maximum(function(rows), 0.0)
        return costs, np.asarray(broken)

    def worst(self, functions: Functions, rows: Array) -> Array:
        """Returns by how much rows miss the limit that they miss most; negative where they keep them all, `(n,)`."""
        costs = np.stack([function(rows) for function in functions.objectives], axis=1)
        margins = (costs - self.limits) / self.spans
        others = [function(rows) for function in functions.others]
        return np.asarray(np.column_stack([margins, *others]).max(axis=1))


def _on(scale: Scale, costs: Array) -> Array:
    """Returns places on a scale; what is infinite or unknown stays so."""
    usable = np.isfinite(costs)
    return np.asarray(np.where(usable, scale.forward(np.where(usable, costs, 1.0)), costs))


def _each_on(scales: Sequence[Scale], costs: Array) -> Array:
    """Returns the place of one cost on each scale, `(m,)`."""
    return np.array([float(_on(scale, np.array([cost]))[0]) for scale, cost in zip(scales, costs, strict=True)])


def _best(observed: Observed, beliefs: Beliefs) -> Array:
    """Returns the best rows that were measured, those that keep all limits first."""
    costs = np.stack(
        [_on(belief.scale, column) for belief, column in zip(beliefs.objectives, observed.costs.T, strict=True)], axis=1
    )
    unknown = np.isnan(costs).any(axis=1)
    broken = observed.excess + np.where(unknown, 1e-6, 0.0)
    costs = np.where(np.isnan(costs), np.nanmax(np.where(np.isfinite(costs), costs, 0.0), axis=0), costs)
    return observed.rows[ranked(costs, broken, _KNOWN)]


def _costs(beliefs: Beliefs, forecast: Forecast, place: int) -> tuple[float, ...]:
    """Returns the cost that is expected of each objective: another run's surrogates may have other scales."""
    pairs = zip(beliefs.objectives, forecast.means[place], strict=True)
    return tuple(float(belief.scale.back(np.array([mean]))[0]) for belief, mean in pairs)


def _fresh(rows: Array, observed: Observed, taken: Sequence[Array] = (), at_least_one: bool = True) -> Array:
    """Returns the rows that nobody tried, in their order; if there are none, the last one where one is needed."""
    seen = {key_of(row) for row in (*observed.spent, *taken)}
    places = []
    for place, row in enumerate(rows):
        if key_of(row) not in seen:
            seen.add(key_of(row))
            places.append(place)
    if not places and at_least_one:
        return rows[-1:]
    return rows[places]


def front(seed: int, prior: MakesPrior | None = None) -> BaseSampler:
    """Returns the sampler of expected hypervolume improvement.

    Args:
        seed: of its draws.
        prior: makes what is known of the problem without measuring.
    """
    return FrontSampler(seed, prior() if prior else None)
