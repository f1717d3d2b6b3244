"""Where searches live: a folder each, with Optuna's journal as the truth."""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Self

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from evaluators.latency.slow_layers import SlowLayers
from search.config.budget import Budget
from search.config.registries import SAMPLERS
from search.config.study import Study
from search.results.evaluation import Evaluation
from search.results.pareto import Version
from search.results.simple_versions import GivenMeasurements, SimpleVersion
from spaces.errors import UserError

DIRECTIONS: list[Literal["minimize", "maximize"]] = ["maximize", "minimize", "minimize"]
"""Accuracy, latency, FLOPs."""
JOURNAL = "journal.log"
REPORT = "sampler"
"""The study's attribute in which a sampler says how its surrogates did and where its proposals came from."""
_BEGUN = b'"baseline"'
"""What a journal holds once the dense network was measured."""
_RECOVERED = "recovered."
_SAMPLER = "sampler."
_GIVEN = "given"


class StoreError(UserError):
    """A run directory that cannot be used."""


@dataclass(frozen=True)
class SearchFolder:
    """One search on disk."""

    path: Path

    @property
    def name(self) -> str:
        """The search's name."""
        return self.path.name

    @property
    def journal(self) -> Path:
        """The file that holds every trial."""
        return self.path / JOURNAL

    def open(self) -> optuna.Study:
        """Returns the stored search.

        Raises:
            StoreError: there is none, or its journal is corrupt; nothing is written.
        """
        if not self.journal.is_file():
            raise StoreError(
                f"a search is a folder with a {JOURNAL}, got {self.path}; see the names in {self.path.parent}"
            )
        check_journal(self.journal)
        return self._load()

    def _load(self) -> optuna.Study:
        try:
            storage = JournalStorage(JournalFileBackend(str(self.journal)))
            return optuna.load_study(study_name=self.name, storage=storage)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise StoreError(f"{self.journal} is not a journal of search {self.name!r} ({reason})") from error

    def create(self) -> optuna.Study:
        """Returns a new search, or the one that is there, ready to be written to; `lock` must be held.

        Raises:
            StoreError: its journal is corrupt; nothing is written.
        """
        torn = check_journal(self.journal) if self.journal.is_file() else None
        if torn is not None:
            os.truncate(self.journal, torn)
        if self.journal.is_file() and self.journal.stat().st_size:
            # We hold the folder's lock, so a lock of Optuna's own is one that a killed process left behind.
            for leftover in self.path.glob(JOURNAL + ".lock*"):
                leftover.unlink(missing_ok=True)
            return self._load()
        storage = JournalStorage(JournalFileBackend(str(self.journal)))
        return optuna.create_study(study_name=self.name, storage=storage, directions=DIRECTIONS)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the folder, made if need be, for one process.

        Raises:
            StoreError: another process searches in it, or it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / "lock").open("a")
        except OSError as error:
            raise StoreError(f"a run directory is writable, got {self.path}: {error.strerror}") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StoreError(f"one process searches at a time, got another one in {self.path}") from None
            yield


def check_journal(journal: Path) -> int | None:
    """Returns where a last line that a crash tore off begins; None where the journal is whole.

    Raises:
        StoreError: another line is no JSON.
    """
    offset = 0
    with journal.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            whole = line.endswith(b"\n")
            if not _is_json(line):
                if not whole:
                    return offset
                raise StoreError(
                    f"a journal is one JSON object a line, got something else in line {number} of {journal};"
                    " restore the file, or start over with another --search"
                )
            if not whole:
                return offset
            offset += len(line)
    return None


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def find_search(runs: Path, name: str | None) -> SearchFolder:
    """Returns the search called `name`, or the one in `runs` that was written last and has got to its trials.

    Raises:
        StoreError: there is none.
    """
    if name is not None:
        return SearchFolder(runs / name)
    journals = sorted(runs.glob(f"*/{JOURNAL}"), key=lambda journal: journal.stat().st_mtime)
    if not journals:
        raise StoreError(f"no search in {runs} yet; start one with: python -m search --budget 'latency<5ms'")
    latest = reversed(journals)  # one that is still training must not hide another that has something to show
    return SearchFolder(next((each for each in latest if _BEGUN in each.read_bytes()), journals[-1]).parent)


@dataclass(frozen=True)
class Baseline:
    """The dense network, measured before the first trial.

    Args:
        evaluation: by the same protocol as every candidate.
        reference_seconds: median work of each reference, by the clock that ratios are in.
        same_twice: the ratio of a reference to itself.
        environment: the machine and the versions.
        reference_wall: median wall-clock seconds of each reference, beside its work.
        examined: which layers were slower in a lower precision, and so never run in it; None where nobody looked.
        simple: the network as it is in each precision, the dense one first; empty where nobody measured them.
    """

    evaluation: Evaluation
    reference_seconds: dict[str, float]
    same_twice: float
    environment: dict[str, str]
    reference_wall: dict[str, float] = field(default_factory=dict)
    examined: SlowLayers | None = None
    simple: tuple[SimpleVersion, ...] = ()

    @property
    def dense(self) -> Version:
        """The dense network as a version."""
        return Version(-1, self.evaluation, "dense")

    @property
    def versions_to_beat(self) -> list[Version]:
        """The dense network and, as far as they were measured, the other simple versions."""
        others = [each for each in self.simple if each.evaluation != self.evaluation]
        return [self.dense, *(Version(-2 - place, each.evaluation, each.name) for place, each in enumerate(others))]

    def given_precision(self, version: Version) -> str | None:
        """Returns the precision of a version that the network as it was given makes, and the search's own does not."""
        return next((each.precision for each in self.simple if not each.is_own and each.name == version.name), None)

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready copy."""
        return {
            "evaluation": self.evaluation.to_dict(),
            "reference_seconds": self.reference_seconds,
            "same_twice": self.same_twice,
            "environment": self.environment,
            "reference_wall": self.reference_wall,
            "examined": self.examined.to_dict() if self.examined else None,
            "simple": [each.to_dict() for each in self.simple],
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Self:
        """Returns the baseline that `to_dict` described."""
        examined = SlowLayers.from_dict(content["examined"]) if content.get("examined") else None
        evaluation = Evaluation.from_dict(content["evaluation"])
        simple = tuple(SimpleVersion.from_dict(each) for each in content.get("simple", ()))
        return cls(**content | {"evaluation": evaluation, "examined": examined, "simple": simple})


@dataclass(frozen=True)
class StoredSearch:
    """What a journal says about a search."""

    folder: SearchFolder
    study: Study
    baseline: Baseline
    trials: tuple[FrozenTrial, ...]
    recovered: Mapping[int, Evaluation]
    """What versions came to that were recovered in full after the search, by their trial."""
    members: Mapping[str, str] = field(default_factory=dict)
    """The group of channels that each layer's output belongs to."""
    samplers: Mapping[int, str] = field(default_factory=dict)
    """The sampler from each of these trials on."""
    report: Mapping[str, Any] = field(default_factory=dict)
    """What the sampler said of itself at the end; empty where it is one of Optuna's."""

    @property
    def budget(self) -> Budget:
        """The budget that it was run with."""
        return self.study.budget

    @property
    def finished(self) -> int:
        """How many trials have ended: one may be under way, or was when a process was killed."""
        return sum(trial.state.is_finished() for trial in self.trials)

    @property
    def versions(self) -> list[Version]:
        """Every distinct candidate that was measured, in order of trials, with its best recovery."""
        return versions_of(self.trials, self.recovered)

    @classmethod
    def read(cls, folder: SearchFolder) -> Self:
        """Returns the search in `folder`.

        Raises:
            StoreError: there is none, its journal is corrupt, or it ended before its baseline was measured.
        """
        journal = folder.open()
        attributes = journal.user_attrs
        if "baseline" not in attributes:
            raise StoreError(f"search {folder.name!r} was stopped before its first trial; run its command again")
        study = Study.stored(attributes["study"])
        baseline = Baseline.from_dict(attributes["baseline"])
        report = attributes.get(REPORT, {})
        members = attributes.get("structure", {}).get("members", {})
        return cls(
            folder, study, baseline, tuple(journal.trials), _recovered(journal), members, _samplers(journal), report
        )

    def sampler_of(self, number: int) -> str:
        """Returns the name of the sampler that was at work at a trial; empty where nobody noted it."""
        begun = [first for first in self.samplers if first <= number]
        return self.samplers[max(begun)] if begun else ""


def versions_of(
    trials: Sequence[FrozenTrial], recovered: Mapping[int, Evaluation] = MappingProxyType({})
) -> list[Version]:
    """Returns what trials measured, each candidate once; `recovered` takes the place of what its trial found."""
    return [
        Version(trial.number, recovered.get(trial.number) or Evaluation.from_dict(trial.user_attrs["evaluation"]))
        for trial in trials
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED) and "evaluation" in trial.user_attrs
    ]


def versions_of_study(journal: optuna.Study) -> list[Version]:
    """Returns what the trials of a study measured, with what was recovered since."""
    return versions_of(journal.get_trials(deepcopy=False), _recovered(journal))


def read_given(journal: optuna.Study) -> GivenMeasurements | None:
    """Returns what was measured of the network as it was given; None where nothing was, yet."""
    content = journal.user_attrs.get(_GIVEN)
    return GivenMeasurements.from_dict(content) if content else None


def store_given(journal: optuna.Study, given: GivenMeasurements) -> None:
    """Writes what was measured of the network as it was given."""
    journal.set_user_attr(_GIVEN, given.to_dict())


def store_sampler(journal: optuna.Study, name: str) -> None:
    """Notes which sampler is at work from now on; one that was renamed is the same one."""
    samplers = _samplers(journal)
    if not samplers or samplers[max(samplers)] != SAMPLERS.renamed(name):
        journal.set_user_attr(f"{_SAMPLER}{len(journal.get_trials(deepcopy=False))}", name)


def _samplers(journal: optuna.Study) -> dict[int, str]:
    """Returns the sampler from each of some trials on, by its present name."""
    return {
        int(key.removeprefix(_SAMPLER)): SAMPLERS.renamed(name)
        for key, name in journal.user_attrs.items()
        if key.startswith(_SAMPLER)
    }


def store_recovered(journal: optuna.Study, number: int, evaluation: Evaluation) -> None:
    """Writes what the version of a finished trial came to when it was recovered in full."""
    journal.set_user_attr(f"{_RECOVERED}{number}", evaluation.to_dict())


def _recovered(journal: optuna.Study) -> dict[int, Evaluation]:
    return {
        int(name.removeprefix(_RECOVERED)): Evaluation.from_dict(content)
        for name, content in journal.user_attrs.items()
        if name.startswith(_RECOVERED)
    }
