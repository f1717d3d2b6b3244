"""Builds the study of a command line: a study file with overrides, or a study from options alone."""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import ValidationError

from search.config.budget import Budget
from search.config.errors import plain
from search.config.objectives import DEFAULT as DEFAULT_OBJECTIVES
from search.config.objectives import Objectives, known_objectives, together
from search.config.references import absolute, absolute_path, data_source, model_source
from search.config.sections import Dimension, dimensions
from search.config.study import DataSection, ExitsSection, ModelSection, Study, StudyError, TargetSection, load_study

DEFAULT = "scenes"


@dataclass(frozen=True)
class Request:
    """Options of a command line that concern its study; None stands for an option that is not given.

    Args:
        study: name or file of a study.
        budget: hard limits.
        model: source of the network.
        weights: file of its weights.
        data: source of the images.
        target: name of a runtime.
        batch: batch size in deployment.
        threads: number of threads in deployment.
        thresholds: of exits: solved for each version, or searched.
        only: the dimensions that are searched.
        objectives: what the search improves.
        size: height and width of the input.
        mean: of each channel, comma-separated.
        std: of each channel, likewise.
        labels: file with the names of the classes in the network's order.
    """

    study: str | None = None
    budget: Budget | None = None
    model: str | None = None
    weights: str | None = None
    data: str | None = None
    target: str | None = None
    batch: int | None = None
    threads: int | None = None
    thresholds: Literal["solved", "searched"] | None = None
    only: tuple[Dimension, ...] | None = None
    objectives: Objectives | None = None
    size: int | None = None
    mean: str | None = None
    std: str | None = None
    labels: str | None = None

    def to_study(self) -> Study:
        """Returns the study; without a file and a budget it has no limits.

        Raises:
            StudyError: options are missing, or the study's file is wrong.
            SourceError: the model or the data is no known source.
        """
        return self._study

    @cached_property
    def _study(self) -> Study:
        """The study, read once: what is said of former keys is said once."""
        study = self._own() if self._is_own else self._changed(load_study(self.study or DEFAULT))
        target = {"runtime": self.target, "batch": self.batch, "threads": self.threads}
        exits = _updated(study.exits, {"thresholds": self.thresholds})
        data = self._data_of(study)
        study = study.model_copy(update={"target": _updated(study.target, target), "exits": exits, "data": data})
        if self.only is not None:
            study = study.model_copy(update={"space": study.space.model_copy(update={"only": self.only})})
        if self.objectives is not None:
            study = study.with_objectives(self.objectives)
        if self.budget is not None:
            study = study.model_copy(update={"budget": self.budget})
        is_other = self.model is not None or self.data is not None
        return study.model_copy(update={"question": _question(study)}) if is_other else study

    def check_budget(self) -> None:
        """Checks that there is a budget, in the study or on the command line.

        Raises:
            StudyError: there is none.
        """
        if self.budget is None and self._is_own:
            raise StudyError("a search without a study has a --budget, got none; add --budget 'latency<50%'")

    @property
    def is_demo(self) -> bool:
        """Whether neither a study nor a network or images are named, so that the demo is searched."""
        return self.study is None and not self._is_own

    def demo_line(self, ending: "Ending") -> str:
        """Returns what the demo is, how long it takes, how to stop it, and how to search a network of one's own."""
        trials = ending.of(self.to_study()).trials
        return (
            f"This is the demo, study {DEFAULT}, because no --model, --data or --study is given: a small network that"
            f" reads handwritten digits, {trials} trials, some minutes. Ctrl-C stops it at any time; the same command"
            " goes on where it was. For a network of your own: python -m search init my-study, or give --model and"
            " --data."
        )

    @property
    def _is_own(self) -> bool:
        """Whether the command line names a network or images, and no study."""
        return self.study is None and (self.model is not None or self.data is not None)

    def _data_of(self, study: Study) -> DataSection:
        """Returns a study's images with the input and the classes that the command line gives."""
        given = {"size": self.size, "mean": self.mean, "std": self.std, "labels": self.labels}
        named = [f"--{name}" for name, value in given.items() if value is not None]
        if named and data_source(study.data.source).is_factory:
            raise StudyError(
                f"the input of named images can be given, such as imagefolder:PATH, got {', '.join(named)} for"
                f" {study.data.source}, which returns its images as they are; change them there"
            )
        numbers = {name: _numbers(name, text) for name in ("mean", "std") if (text := given[name]) is not None}
        labels = {"labels": absolute_path(self.labels, Path.cwd())} if self.labels is not None else {}
        return cast(DataSection, _updated(study.data, {**given, **numbers, **labels}))

    def _own(self) -> Study:
        missing = [name for name in ("model", "data") if getattr(self, name) is None]
        if missing:
            raise StudyError(
                f"a search without a study has --model and --data, got no --{missing[0]};"
                f" add --{missing[0]}, or the --study that has it"
            )
        model, data = ModelSection(source=self.model or "", weights=self.weights), DataSection(source=self.data or "")
        budget = self.budget or Budget(())
        own = Study(name=_name(model, data), question="", budget=budget, model=model, data=data)
        return own.anchored(Path.cwd())

    def _changed(self, study: Study) -> Study:
        """Returns a study with another network, weights or images; settings that belonged to the old ones are reset."""
        here = Path.cwd()
        changes: dict[str, Any] = {}
        if self.model is not None:
            changes["model"] = ModelSection(source=absolute(model_source(self.model), here))
            changes["exits"] = _updated(study.exits, {"after": None}, clear=True)
            if study.skips.blocks:
                changes["skips"] = study.skips.model_copy(update={"blocks": "all"})
        if self.weights is not None:
            weights = {"weights": absolute_path(self.weights, here)}
            changes["model"] = _updated(changes.get("model", study.model), weights)
            changes["training"] = None  # given weights are taken as trained
        if self.data is not None:
            source = absolute(data_source(self.data), here)
            # The preprocessing belongs to the network, so it is kept with the network.
            keeps_network = self.model is None
            changes["data"] = _updated(study.data, {"source": source}) if keeps_network else DataSection(source=source)
        if "model" in changes or "data" in changes:
            changes["name"] = _name(changes.get("model", study.model), changes.get("data", study.data))
        return study.model_copy(update=changes)


def _numbers(name: str, text: object) -> tuple[float, ...]:
    """Returns comma-separated numbers.

    Raises:
        StudyError: one of them is none.
    """
    try:
        return tuple(float(part) for part in str(text).split(","))
    except ValueError:
        raise StudyError(f"--{name} is a number for each channel, such as 0.5,0.5,0.5, got {text!r}") from None


def read_dimensions(text: str) -> tuple[Dimension, ...]:
    """Returns the dimensions in a comma-separated text.

    Raises:
        StudyError: one of them does not exist, or the text is empty.
    """
    try:
        names = dimensions(_names_in(text))
    except ValueError as error:
        raise StudyError(f"--search-only takes {error}, got {text!r}; leave it out to search all") from None
    return cast(tuple[Dimension, ...], names)


def read_objectives(text: str) -> Objectives:
    """Returns the objectives in a comma-separated text.

    Raises:
        StudyError: one of them is not measured, or accuracy or every cost is missing.
    """
    try:
        names = known_objectives(_names_in(text))
    except ValueError as error:
        usual = together(DEFAULT_OBJECTIVES)
        raise StudyError(f"--objectives takes {error}, got {text!r}; leave it out for {usual}") from None
    return cast(Objectives, names)


def _names_in(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


@dataclass(frozen=True)
class Ending:
    """When a search ends, whichever comes first.

    Args:
        trials: in all; by default the study's.
        timeout_s: seconds of this run; None for no limit.
        patience: trials in a row without improvement; by default the study's.
    """

    trials: int | None = None
    timeout_s: float | None = None
    patience: int | None = None

    def of(self, study: Study) -> "Ending":
        """Returns the ending with the study's defaults."""
        return Ending(self.trials or study.search.trials, self.timeout_s, self.patience or study.search.patience)


_Section = DataSection | ExitsSection | ModelSection | TargetSection


def _updated(section: _Section, values: dict[str, Any], clear: bool = False) -> _Section:
    changes = {name: value for name, value in values.items() if clear or value is not None}
    try:
        return type(section).model_validate(section.model_dump() | changes)
    except ValidationError as error:
        name = type(section).__name__.removesuffix("Section").lower()
        raise StudyError(f"[{name}] {plain(error, type(section))}") from None


def named_before(study: Study) -> Study:
    """Returns a study without a name of its own under the name that earlier versions made up for it; else as it is."""
    if study.name != _name(study.model, study.data):
        return study
    network, images = model_source(study.model.source), data_source(study.data.source)
    return study.model_copy(update={"name": _joined(network.short_before, images.short_before)})


def _name(model: ModelSection, data: DataSection) -> str:
    return _joined(model_source(model.source).short, data_source(data.source).short)


def _joined(network: str, images: str) -> str:
    words = f"{network}-{images}"
    return re.sub(r"[^A-Za-z0-9_-]+", "-", words).strip("-") or "search"


def _question(study: Study) -> str:
    network, images = model_source(study.model.source).short, data_source(study.data.source).short
    return (
        f"Which version of {network} for {images} keeps {study.budget} on {study.target.runtime},"
        f" {study.target.batch} at a time?"
    )
