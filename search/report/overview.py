"""A search sorted for the eye: what broke the budget, what kept it, the front, and the few most worth deploying."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

from search.config.budget import Budget
from search.report.importance import Importance, importance
from search.results.pareto import Measurements, Version, beats, choose, feasible, front_within, hypervolume, pareto
from search.results.sensitivity import Profile
from search.results.store import StoredSearch

OVER = "over the budget"
WITHIN = "within the budget"
FRONT = "front"
DENSE = "dense"
"""The groups that every picture tells apart."""
PROFILE = "profile.json"
"""The sensitivity profile in a search's folder, where one was measured."""
NOTABLE = {"most accurate": "accuracy", "knee": "knee", "fastest": "latency"}
"""The versions most worth deploying, each by the preference that picks it."""


@dataclass(frozen=True)
class Overview:
    """A search and what follows from a budget.

    Args:
        search: as its journal has it.
        budget: its own, or another.
        dense: the dense network, as a version.
        versions: every distinct candidate that was measured, in order of trials.
        good: those that keep the budget, fully measured.
        front: those of them that no other beats, and no simple version, the most accurate first; these among them.
        simple: the network as it is in each precision, the dense one first: what there is to beat.
        beaten: those that would be on the front for their FLOPs alone, slower and less accurate than a simple version.
    """

    search: StoredSearch
    budget: Budget
    dense: Version
    versions: tuple[Version, ...]
    good: tuple[Version, ...]
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
        good = feasible(versions, limits, dense.measured)
        front = front_within(versions, simple, limits, dense.measured)
        return cls(search, limits, dense, tuple(versions), tuple(good), front.versions, tuple(simple), front.beaten)

    @property
    def lines(self) -> list[Version]:
        """The simple versions that are not on the front, the dense network last: they stand below it."""
        below = [version for version in self.simple if version not in self.front]
        return sorted(below, key=lambda version: version is self.dense)

    @property
    def behind(self) -> dict[str, list[Version]]:
        """The versions of the front that a simple version is faster and more accurate than, by that one's name.

        It breaks a limit on something else: within the budget it would be on the front instead of them.
        """
        found = {line.title: [each for each in self.front if beats(line, each)] for line in self.simple}
        return {name: versions for name, versions in found.items() if versions}

    @property
    def complete(self) -> list[Version]:
        """The versions whose every objective was measured."""
        return [version for version in self.versions if version.is_complete]

    @property
    def given_up(self) -> list[Version]:
        """The versions that broke a limit and were not measured further."""
        return [version for version in self.versions if not version.is_complete and not version.evaluation.ended]

    @property
    def ended_early(self) -> list[Version]:
        """The versions that some of the images showed to be hopeless, so that the others were not asked."""
        return [version for version in self.versions if version.evaluation.ended]

    @property
    def groups(self) -> dict[str, list[Version]]:
        """The fully measured versions in the groups that pictures tell apart, the dense network last."""
        simple = [version for version in self.simple if version is not self.dense]
        good = [*feasible(simple, self.budget, self.dense.measured), *self.good]
        within, front = ({version.number for version in some} for some in (good, self.front))
        return {
            OVER: [version for version in [*simple, *self.complete] if version.number not in within],
            WITHIN: [version for version in good if version.number not in front],
            FRONT: [version for version in self.front if version is not self.dense],
            DENSE: [self.dense],
        }

    @property
    def notable(self) -> list[tuple[str, Version]]:
        """The versions most worth deploying, with what speaks for each: `most accurate`, `knee`, `fastest`."""
        return most_worth(self.front)

    @property
    def by_latency(self) -> list[Version]:
        """The front, the fastest first."""
        return sorted(self.front, key=lambda version: (version.measured["latency"].value, version.number))

    @cached_property
    def growth(self) -> list[tuple[int, float]]:
        """The hypervolume after each trial that was fully measured: the trial and a share, 0 to 1."""
        begin = feasible(self.simple, self.budget, self.dense.measured)
        return growth(self.complete, self.budget, self.dense.measured, begin)

    @property
    def hypervolume(self) -> float:
        """The share of the budget's box that the front dominates, 0 to 1."""
        return self.growth[-1][1] if self.growth else 0.0

    @cached_property
    def importance(self) -> Importance | None:
        """What each layer costs in accuracy and buys in latency; None where too little was measured."""
        return importance(self.versions, self.dense)

    @cached_property
    def profile(self) -> Profile | None:
        """The sensitivity profile of the network; None where none was measured."""
        return read_profile(self.search.folder.path)


def beaten_lines(overview: Overview) -> list[str]:
    """Returns, in sentences, what simple versions keep from the front, and what is on it although they are better."""
    lines = []
    if overview.beaten:
        many = len(overview.beaten)
        told = "1 version with fewer FLOPs is" if many == 1 else f"{many} versions with fewer FLOPs are"
        lines.append(f"{told} left out: slower and less accurate than the network as it is in one precision.")
    for name, versions in overview.behind.items():
        told = ", ".join(str(version.trial) for version in versions)
        lines.append(f"Careful: {name}, which breaks {overview.budget}, is faster and more accurate than {told}.")
    return lines


def most_worth(front: Sequence[Version]) -> list[tuple[str, Version]]:
    """Returns a front's most accurate version, its knee and its fastest; one that is several of them comes once."""
    found: dict[int, tuple[list[str], Version]] = {}
    for name, prefer in NOTABLE.items() if front else ():
        best = choose(front, prefer)[0]
        found.setdefault(best.number, ([], best))[0].append(name)
    return [(" and ".join(names), version) for names, version in found.values()]


def growth(
    versions: Sequence[Version], budget: Budget, dense: Measurements, begin: Sequence[Version] = ()
) -> list[tuple[int, float]]:
    """Returns the hypervolume after each of the versions, and those that were there before: a trial and a share."""
    front = pareto(begin)
    share, found = hypervolume(front, budget, dense), []
    for version in versions:
        if budget.is_met(version.measured, dense):
            before, front = front, pareto([*front, version])
            share = share if front == before else hypervolume(front, budget, dense)
        found.append((version.number, share))
    return found


def read_profile(folder: Path) -> Profile | None:
    """Returns the sensitivity profile that lies in a search's folder; None without one."""
    try:
        return Profile.from_dict(json.loads((folder / PROFILE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def write_profile(folder: Path, profile: Profile) -> None:
    """Puts a sensitivity profile into a search's folder, where every picture of the search finds it."""
    (folder / PROFILE).write_text(json.dumps(profile.to_dict()) + "\n", encoding="utf-8")
