"""Searches on disk: a folder each, with Optuna's journal as the single source of truth."""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Self, cast

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from evaluators.latency.channel_widths import WidthTimes
from evaluators.latency.slow_layers import SlowLayers
from evaluators.measurement import METRICS
from search.config.budget import Budget
from search.config.objectives import BEFORE, DEFAULT, Objectives
from search.config.registries import SAMPLERS
from search.config.study import Study
from search.results.evaluation import Evaluation
from search.results.folders import BEGUN, JOURNAL, StoreError, known_search
from search.results.pareto import Version
from search.results.rounds import Round, rounds_of
from search.results.simple_versions import GivenMeasurements, SimpleVersion

PROCESSOR_SECONDS = "processor_seconds"
"""Attribute of a trial: the processor time that it took here; that of a board is not in it."""
REPORT = "sampler"
"""Journal attribute of the sampler's report: quality of its surrogates, and sources of its proposals."""
REMARKS = "remarks"
"""Key of the same in words, in the sampler's report."""
_RECOVERED = "recovered."
_SAMPLER = "sampler."
_GIVEN = "given"
_WIDTHS = "widths"
_OBJECTIVES = "objectives"


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
        """The journal, which holds every trial."""
        return self.path / JOURNAL

    @property
    def has_baseline(self) -> bool:
        """Whether the dense network was measured, so that trials may be there."""
        return self.journal.is_file() and BEGUN in self.journal.read_bytes()

    def open(self) -> optuna.Study:
        """Returns the stored search.

        Raises:
            StoreError: there is no search, or its journal is corrupt; nothing is written.
        """
        known_search(self.path.parent, self.name)
        check_journal(self.journal)
        return self._load()

    def _load(self) -> optuna.Study:
        try:
            storage = JournalStorage(JournalFileBackend(str(self.journal)))
            names = optuna.get_all_study_names(storage)
            # A folder that was renamed still has its search.
            name = names[0] if len(names) == 1 else self.name
            return optuna.load_study(study_name=name, storage=storage)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise StoreError(f"{self.journal} is not a journal of search {self.name!r} ({reason})") from error

    def objectives(self, asked: Objectives | None) -> Objectives:
        """Returns the objectives that the search goes on with, or those that a new one has.

        Args:
            asked: for; None for those of the search, which in a new one are accuracy and latency.

        Raises:
            StoreError: the search has others, or its journal is corrupt.
        """
        if not self.journal.is_file():
            return asked or DEFAULT
        known = objectives_of(self.open())
        if asked not in (None, known):
            raise StoreError(
                f"a search goes on with the objectives that it began with, got {', '.join(asked or ())} for"
                f" {self.path}, which has {', '.join(known)}; give another --search, or ask for no others"
            )
        return known

    def create(self, objectives: Objectives = DEFAULT) -> optuna.Study:
        """Returns a new search, or the existing one, ready to be written to; `lock` must be held.

        Args:
            objectives: of a new one.

        Raises:
            StoreError: its journal is corrupt; nothing is written.
        """
        torn_offset = check_journal(self.journal) if self.journal.is_file() else None
        if torn_offset is not None:
            os.truncate(self.journal, torn_offset)
        if self.journal.is_file() and self.journal.stat().st_size:
            # The folder's lock is held, so a lock file of Optuna is a leftover of a killed process.
            for leftover in self.path.glob(JOURNAL + ".lock*"):
                leftover.unlink(missing_ok=True)
            return self._load()
        storage = JournalStorage(JournalFileBackend(str(self.journal)))
        directions: list[Literal["minimize", "maximize"]] = [
            "minimize" if METRICS[metric].sign > 0 else "maximize" for metric in objectives
        ]
        journal = optuna.create_study(study_name=self.name, storage=storage, directions=directions)
        journal.set_user_attr(_OBJECTIVES, objectives)
        return journal

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Locks the folder for this process, creating it if needed; one that got no journal is removed afterwards.

        Raises:
            StoreError: another process searches in it, or it cannot be written.
        """
        new = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
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
            try:
                yield
            finally:
                if new and not self.journal.is_file():
                    _remove(self.path / "lock", new)

    @property
    def is_locked(self) -> bool:
        """Whether a process searches in it."""
        try:
            with (self.path / "lock").open() as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # there is no lock, or it belongs to another user
            return False
        return False


def _remove(file: Path, folders: Sequence[Path]) -> None:
    """Removes a file, and folders as far as nothing else is in them, the innermost first."""
    file.unlink(missing_ok=True)
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def objectives_of(journal: optuna.Study) -> Objectives:
    """Returns the objectives of a search, in the order of its trials' values; an earlier version wrote no names."""
    by_count = BEFORE if len(journal.directions) == len(BEFORE) else DEFAULT
    return cast(Objectives, tuple(journal.user_attrs.get(_OBJECTIVES, by_count)))


def check_journal(journal: Path) -> int | None:
    """Returns the offset of an incomplete last line, left by a crash; None if the journal is complete.

    Raises:
        StoreError: any other line is not JSON.
    """
    offset = 0
    with journal.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            is_complete = line.endswith(b"\n")
            if not _is_json(line):
                if not is_complete:
                    return offset
                raise StoreError(
                    f"a journal is one JSON object a line, got something else in line {number} of {journal};"
                    " restore the file, or start over with another --search"
                )
            if not is_complete:
                return offset
            offset += len(line)
    return None


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def find_search(runs: Path, name: str | None) -> SearchFolder:
    """Returns the search called `name`, or else the one in `runs` written last that has a baseline.

    Raises:
        StoreError: there is none.
    """
    return SearchFolder(runs / known_search(runs, name))


@dataclass(frozen=True)
class Baseline:
    """The dense network, measured before the first trial.

    Args:
        evaluation: by the same protocol as every candidate.
        reference_seconds: median seconds of work per batch of each reference, by precision.
        reference_self_ratio: time ratio of a reference to itself; its distance from 1 is the noise of the machine.
        environment: machine and library versions.
        reference_wall: median wall-clock seconds per batch of each reference.
        slow_layers: layers that are slower in a lower precision, which the search leaves out; None if not measured.
        simple: the network in each precision, the dense one first; empty if not measured.
    """

    evaluation: Evaluation
    reference_seconds: dict[str, float]
    reference_self_ratio: float
    environment: dict[str, str]
    reference_wall: dict[str, float] = field(default_factory=dict)
    slow_layers: SlowLayers | None = None
    simple: tuple[SimpleVersion, ...] = ()

    @property
    def dense(self) -> Version:
        """The dense network as a version."""
        return Version(-1, self.evaluation, "dense")

    @property
    def versions_to_beat(self) -> list[Version]:
        """The dense network and the other simple versions that were measured; numbers are -1, -2, and so on."""
        others = [simple for simple in self.simple if simple.evaluation != self.evaluation]
        return [self.dense, *(Version(-2 - i, simple.evaluation, simple.name) for i, simple in enumerate(others))]

    def given_precision(self, version: Version) -> str | None:
        """Returns the precision of a simple version exported from the network as loaded; None for any other version."""
        names = {simple.name: simple.precision for simple in self.simple if not simple.is_own}
        return names.get(version.name)

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready copy, under the names that journals have."""
        return {
            "evaluation": self.evaluation.to_dict(),
            "reference_seconds": self.reference_seconds,
            "same_twice": self.reference_self_ratio,
            "environment": self.environment,
            "reference_wall": self.reference_wall,
            "examined": self.slow_layers.to_dict() if self.slow_layers else None,
            "simple": [simple.to_dict() for simple in self.simple],
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Self:
        """Returns the baseline that `to_dict` described."""
        slow_layers = content.get("examined")
        return cls(
            evaluation=Evaluation.from_dict(content["evaluation"]),
            reference_seconds=content["reference_seconds"],
            reference_self_ratio=content["same_twice"],
            environment=content["environment"],
            reference_wall=content.get("reference_wall", {}),
            slow_layers=SlowLayers.from_dict(slow_layers) if slow_layers else None,
            simple=tuple(SimpleVersion.from_dict(version) for version in content.get("simple", ())),
        )


@dataclass(frozen=True)
class StoredSearch:
    """A search as read from its journal."""

    folder: SearchFolder
    study: Study
    baseline: Baseline
    trials: tuple[FrozenTrial, ...]
    recovered: Mapping[int, Evaluation]
    """Evaluations of versions that were recovered in full after the search, by trial number."""
    members: Mapping[str, str] = field(default_factory=dict)
    """The group of channels that each layer's output belongs to."""
    samplers: Mapping[int, str] = field(default_factory=dict)
    """Names of the samplers, by the number of the first trial of each."""
    report: Mapping[str, Any] = field(default_factory=dict)
    """The sampler's own report at the end; empty for Optuna's samplers."""
    widths: Mapping[str, WidthTimes] = field(default_factory=dict)
    """The widths of layers as measured when the search began, by precision; empty where none were."""
    rounds: Mapping[int, Sequence[Round]] = field(default_factory=dict)
    """What the trainings of each version after the search came to, by trial number."""

    @property
    def budget(self) -> Budget:
        """The budget that it was run with."""
        return self.study.budget

    @property
    def objectives(self) -> Objectives:
        """The objectives that it has."""
        return self.study.objectives

    @property
    def finished(self) -> int:
        """Number of trials that have ended; one more may be running."""
        return sum(trial.state.is_finished() for trial in self.trials)

    @property
    def versions(self) -> list[Version]:
        """Every distinct candidate that was measured, in order of trials, recovered in full where that was done."""
        return versions_of(self.trials, self.recovered)

    @classmethod
    def read(cls, folder: SearchFolder) -> Self:
        """Returns the search in `folder`.

        Raises:
            StoreError: there is no search, its journal is corrupt, or it ended before its baseline was measured.
        """
        journal = folder.open()
        attributes = journal.user_attrs
        if "baseline" not in attributes:
            raise StoreError(f"search {folder.name!r} was stopped before its first trial; run its command again")
        study = Study.stored(attributes["study"]).with_objectives(objectives_of(journal))
        baseline = Baseline.from_dict(attributes["baseline"])
        report = attributes.get(REPORT, {})
        members = attributes.get("structure", {}).get("members", {})
        recovered, widths = _recovered(journal), read_widths(journal)
        trials, samplers = tuple(journal.trials), _samplers(journal)
        rounds = rounds_of(attributes)
        return cls(folder, study, baseline, trials, recovered, members, samplers, report, widths, rounds)

    def sampler_of(self, number: int) -> str:
        """Returns the name of the sampler that proposed a trial; empty if it was not noted."""
        starts = [first for first in self.samplers if first <= number]
        return self.samplers[max(starts)] if starts else ""


def versions_of(
    trials: Sequence[FrozenTrial], recovered: Mapping[int, Evaluation] = MappingProxyType({})
) -> list[Version]:
    """Returns the measured versions, each candidate once; evaluations in `recovered` replace those of their trials."""
    return [
        Version(trial.number, recovered.get(trial.number) or Evaluation.from_dict(trial.user_attrs["evaluation"]))
        for trial in trials
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED) and "evaluation" in trial.user_attrs
    ]


def versions_of_study(journal: optuna.Study) -> list[Version]:
    """Returns the measured versions of a journal, recovered in full where that was done."""
    return versions_of(journal.get_trials(deepcopy=False), _recovered(journal))


def read_given(journal: optuna.Study) -> GivenMeasurements | None:
    """Returns the stored measurements of the network as loaded; None if there are none yet."""
    content = journal.user_attrs.get(_GIVEN)
    return GivenMeasurements.from_dict(content) if content else None


def store_given(journal: optuna.Study, given: GivenMeasurements) -> None:
    """Stores the measurements of the network as loaded."""
    journal.set_user_attr(_GIVEN, given.to_dict())


def read_widths(journal: optuna.Study) -> dict[str, WidthTimes]:
    """Returns the widths of layers as measured when the search began, by precision; empty where none were."""
    tables = journal.user_attrs.get(_WIDTHS, {})
    return {precision: WidthTimes.from_dict(content) for precision, content in tables.items()}


def store_widths(journal: optuna.Study, widths: Mapping[str, WidthTimes]) -> None:
    """Stores the widths of layers as measured, so that the space stays as it is when the search goes on."""
    journal.set_user_attr(_WIDTHS, {precision: times.to_dict() for precision, times in widths.items()})


def store_sampler(journal: optuna.Study, name: str) -> None:
    """Notes the sampler of the trials from now on, unless it is the same as before (renamed ones included)."""
    samplers = _samplers(journal)
    if not samplers or samplers[max(samplers)] != SAMPLERS.renamed(name):
        journal.set_user_attr(f"{_SAMPLER}{len(journal.get_trials(deepcopy=False))}", name)


def _samplers(journal: optuna.Study) -> dict[int, str]:
    """Returns the samplers by the number of their first trial, under their present names."""
    return {
        int(key.removeprefix(_SAMPLER)): SAMPLERS.renamed(name)
        for key, name in journal.user_attrs.items()
        if key.startswith(_SAMPLER)
    }


def store_recovered(journal: optuna.Study, number: int, evaluation: Evaluation) -> None:
    """Stores the evaluation of a finished trial's version after full recovery."""
    journal.set_user_attr(f"{_RECOVERED}{number}", evaluation.to_dict())


def _recovered(journal: optuna.Study) -> dict[int, Evaluation]:
    return {
        int(name.removeprefix(_RECOVERED)): Evaluation.from_dict(content)
        for name, content in journal.user_attrs.items()
        if name.startswith(_RECOVERED)
    }
