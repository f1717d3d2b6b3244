"""The results of a search under a budget: feasible versions, the front, and the few most worth deploying."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

from search.config.budget import Budget
from search.config.objectives import Objectives
from search.report.importance import Importance, importance
from search.results.kept_answers import solved_again
from search.results.pareto import (
    Measurements,
    Version,
    beats,
    choose,
    feasible,
    front_within,
    hypervolume,
    most_promising,
    pareto,
)
from search.results.sensitivity import Profile
from search.results.store import StoredSearch

OVER = "over the budget"
WITHIN = "within the budget"
FRONT = "front"
DENSE = "dense"
"""The groups of versions in every picture."""
PROFILE = "profile.json"
"""File of the sensitivity profile in a search's folder, if one was measured."""
_SOLVED_AGAIN = 24
"""Versions, at most, whose thresholds are solved again for another budget: each takes a part of a second."""
NOTABLE = {
    "most accurate": "accuracy",
    "knee": "knee",
    "fastest": "latency",
    "fewest FLOPs": "flops",
    "fewest parameters": "params",
    "smallest": "size",
}
"""What a version may be worth deploying for, and the preference that picks it."""


@dataclass(frozen=True)
class Overview:
    """A search and its results under a budget.

    Args:
        search: read from its journal.
        budget: that of the search, or another.
        dense: the dense network, as a version.
        versions: every distinct candidate that was measured, in order of trials.
        feasible: the fully measured ones within the budget.
        front: the front, the most accurate first, simple versions included.
        simple: the baselines: the network as it is in each precision, the dense one first.
        beaten: versions that are left out of the front, see `Front.beaten`.
    """

    search: StoredSearch
    budget: Budget
    dense: Version
    versions: tuple[Version, ...]
    feasible: tuple[Version, ...]
    front: tuple[Version, ...]
    simple: tuple[Version, ...]
    beaten: tuple[Version, ...]

    @classmethod
    def of(cls, search: StoredSearch, budget: Budget | None = None) -> Self:
        """Returns the overview of a search under its own budget or another."""
        limits = budget or search.budget
        simple = search.baseline.versions_to_beat
        versions = search.versions
        dense = simple[0]
        within = feasible(versions, limits, dense.measured)
        front = front_within(versions, simple, limits, dense.measured, search.objectives)
        return cls(search, limits, dense, tuple(versions), tuple(within), front.versions, tuple(simple), front.beaten)

    @property
    def objectives(self) -> Objectives:
        """The objectives of the search."""
        return self.search.objectives

    @property
    def other_simple(self) -> list[Version]:
        """The simple versions that are not on the front, the dense network last; tables show them below the front."""
        below = [version for version in self.simple if version not in self.front]
        return sorted(below, key=lambda version: version is self.dense)

    @property
    def worse_than_simple(self) -> dict[str, list[Version]]:
        """For each simple version, the versions of the front that it beats although it breaks the budget."""
        beaten_by = {
            simple.title: [version for version in self.front if beats(simple, version)] for simple in self.simple
        }
        return {name: versions for name, versions in beaten_by.items() if versions}

    @property
    def feasible_with_simple(self) -> list[Version]:
        """The fully measured versions within the budget, simple ones included."""
        return [*feasible(self.simple, self.budget, self.dense.measured), *self.feasible]

    @property
    def complete(self) -> list[Version]:
        """The fully measured versions."""
        return [version for version in self.versions if version.is_complete]

    @property
    def not_scored(self) -> list[Version]:
        """The versions that broke a limit and were not measured further."""
        return [version for version in self.versions if not version.is_complete and not version.evaluation.ended]

    @property
    def ended_early(self) -> list[Version]:
        """The versions whose evaluation was stopped early, after some of the images."""
        return [version for version in self.versions if version.evaluation.ended]

    @property
    def undecided(self) -> list[Version]:
        """The versions that the search's own budget ended before their accuracy was known, and that may keep this one.

        One that was ended because another is as good in everything is none of them.
        """
        own = self.search.budget.accuracy_floor(self.dense.measured)
        ended = [version for version in self.ended_early if own is not None and _highest(version) < own]
        return [version for version in [*self.not_scored, *ended] if not self._breaks(version)]

    def _breaks(self, version: Version) -> bool:
        """Returns whether a version that was not fully measured breaks the budget by what was."""
        costs, floor = self.budget.without("accuracy"), self.budget.accuracy_floor(self.dense.measured)
        is_too_wrong = floor is not None and _highest(version) < floor
        return is_too_wrong or bool(costs.broken(version.measured, self.dense.measured))

    @property
    def broken(self) -> list[Version]:
        """The versions that are known to break the budget, fully measured or not; without those ended early."""
        numbers = {version.number for version in self.feasible}
        scored = [version for version in self.complete if version.number not in numbers]
        return [*scored, *(version for version in self.not_scored if self._breaks(version))]

    @property
    def solved(self) -> list[Version]:
        """The fully measured versions with exits whose thresholds were solved for the search's own budget."""
        return [
            version
            for version in self.complete
            if version.evaluation.exit_thresholds and version.evaluation.candidate.active_exits
        ]

    @cached_property
    def predicted(self) -> list[Version]:
        """The versions that would be on the front with thresholds solved for this budget, by prediction.

        None within the search's own budget, for which they are solved.
        """
        if str(self.budget) == str(self.search.budget):
            return []
        dense = self.dense.measured
        promising = most_promising(self.complete, self.objectives, _SOLVED_AGAIN)
        found = feasible(solved_again(self.search, promising, self.budget), self.budget, dense)
        front = pareto([*self.front, *found], self.objectives)
        return [version for version in front if version in found]

    @property
    def groups(self) -> dict[str, list[Version]]:
        """The fully measured versions by their group in pictures, the dense network last."""
        simple = [version for version in self.simple if version is not self.dense]
        within = [version for version in self.feasible_with_simple if version is not self.dense]
        numbers_within, numbers_on_front = ({version.number for version in each} for each in (within, self.front))
        return {
            OVER: [version for version in [*simple, *self.complete] if version.number not in numbers_within],
            WITHIN: [version for version in within if version.number not in numbers_on_front],
            FRONT: [version for version in self.front if version is not self.dense],
            DENSE: [self.dense],
        }

    @property
    def notable(self) -> list[tuple[str, Version]]:
        """The versions most worth deploying, with their roles: `most accurate`, `knee`, `fastest`."""
        return notable_versions(self.front, self.objectives)

    @property
    def by_latency(self) -> list[Version]:
        """The front, the fastest first."""
        return sorted(self.front, key=lambda version: (version.measured["latency"].value, version.number))

    @cached_property
    def hypervolume_history(self) -> list[tuple[int, float]]:
        """The hypervolume after each fully measured trial, as pairs of the trial's number and the share, 0 to 1."""
        initial = feasible(self.simple, self.budget, self.dense.measured)
        return hypervolume_history(self.complete, self.budget, self.dense.measured, self.objectives, initial)

    @property
    def hypervolume(self) -> float:
        """The share of the budget's box that the front dominates, 0 to 1."""
        return self.hypervolume_history[-1][1] if self.hypervolume_history else 0.0

    @cached_property
    def importance(self) -> Importance | None:
        """The effects of each layer on accuracy and latency; None if too few versions were measured."""
        return importance(self.versions, self.dense)

    @cached_property
    def profile(self) -> Profile | None:
        """The sensitivity profile of the network; None if none was measured."""
        return read_profile(self.search.folder.path)


def _highest(version: Version) -> float:
    """Returns the upper bound of the accuracy of a version that was not fully measured."""
    accuracy = version.measured.get("accuracy")
    return accuracy.others.get("high", 1.0) if accuracy else 1.0


def beaten_lines(overview: Overview) -> list[str]:
    """Returns sentences on versions that simple versions beat: those left out of the front, and those on it."""
    lines = []
    if overview.beaten:
        count = len(overview.beaten)
        subject = "1 version with fewer FLOPs is" if count == 1 else f"{count} versions with fewer FLOPs are"
        lines.append(f"{subject} left out: slower and less accurate than the network as it is in one precision.")
    for name, versions in overview.worse_than_simple.items():
        beaten = ", ".join(str(version.trial) for version in versions)
        lines.append(f"Careful: {name}, which breaks {overview.budget}, is faster and more accurate than {beaten}.")
    return lines


def notable_versions(front: Sequence[Version], objectives: Objectives) -> list[tuple[str, Version]]:
    """Returns a front's most accurate version, its knee, and the one of the least first cost, such as the fastest.

    Each version is returned once, with all of its roles.
    """
    roles: dict[int, tuple[list[str], Version]] = {}
    preferences = ("accuracy", "knee", objectives[1])
    for name, prefer in NOTABLE.items() if front else ():
        if prefer not in preferences:
            continue
        best = choose(front, prefer, objectives)[0]
        roles.setdefault(best.number, ([], best))[0].append(name)
    return [(" and ".join(names), version) for names, version in roles.values()]


def hypervolume_history(
    versions: Sequence[Version],
    budget: Budget,
    dense: Measurements,
    objectives: Objectives,
    initial: Sequence[Version] = (),
) -> list[tuple[int, float]]:
    """Returns the hypervolume after each version, as pairs of the trial's number and the share, 0 to 1.

    Args:
        versions: in order of trials.
        budget: whose box the shares are of.
        dense: measurements of the dense network.
        objectives: of the search.
        initial: versions that are on the front before the first trial.
    """
    front = pareto(initial, objectives)
    share = hypervolume(front, budget, dense, objectives)
    shares = []
    for version in versions:
        if budget.is_met(version.measured, dense):
            before, front = front, pareto([*front, version], objectives)
            share = share if front == before else hypervolume(front, budget, dense, objectives)
        shares.append((version.number, share))
    return shares


def read_profile(folder: Path) -> Profile | None:
    """Returns the sensitivity profile in a search's folder; None if there is none."""
    try:
        return Profile.from_dict(json.loads((folder / PROFILE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def write_profile(folder: Path, profile: Profile) -> None:
    """Writes a sensitivity profile into a search's folder, for its pictures."""
    (folder / PROFILE).write_text(json.dumps(profile.to_dict()) + "\n", encoding="utf-8")
