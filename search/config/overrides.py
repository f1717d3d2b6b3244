"""The study that a command line asks for: one from a file, changed here and there, or one of its own."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import ValidationError

from search.config.budget import Budget
from search.config.errors import plain
from search.config.references import absolute, absolute_path, data_source, model_source
from search.config.sections import Dimension, dimensions
from search.config.study import DataSection, ExitsSection, ModelSection, Study, StudyError, TargetSection, load_study

DEFAULT = "digits"


@dataclass(frozen=True)
class Request:
    """What a command line says about its study.

    Args:
        study: the name or file of a study; None where none is named.
        budget: hard limits; None where the study's hold, or nothing depends on any.
        model: where the network comes from.
        weights: a file.
        data: where the images come from.
        target: a runtime.
        batch: that will be deployed.
        threads: that will be deployed.
        thresholds: of exits: solved for each version, or searched.
        only: the dimensions that are searched; None where the study says it.
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

    def to_study(self) -> Study:
        """Returns the study; one without a file has the budget of the command line, or one without limits.

        Raises:
            StudyError: the command line leaves something open, or the study's file is wrong.
            SourceError: it names no network or images.
        """
        study = self._own() if self._is_own else self._changed(load_study(self.study or DEFAULT))
        target = {"runtime": self.target, "batch": self.batch, "threads": self.threads}
        exits = _updated(study.exits, {"thresholds": self.thresholds})
        study = study.model_copy(update={"target": _updated(study.target, target), "exits": exits})
        if self.only is not None:
            study = study.model_copy(update={"space": study.space.model_copy(update={"only": self.only})})
        if self.budget is not None:
            study = study.model_copy(update={"budget": self.budget})
        is_other = self.model is not None or self.data is not None
        return study.model_copy(update={"question": _question(study)}) if is_other else study

    def check_budget(self) -> None:
        """Checks that there are limits to search within: a study's, or those of the command line.

        Raises:
            StudyError: there is neither.
        """
        if self.budget is None and self._is_own:
            raise StudyError("a search without a study has a --budget, got none; add --budget 'latency<50%'")

    @property
    def _is_own(self) -> bool:
        """Whether the command line itself tells the network and the images, and names no study."""
        return self.study is None and (self.model is not None or self.data is not None)

    def _own(self) -> Study:
        lacking = [name for name in ("model", "data") if getattr(self, name) is None]
        if lacking:
            raise StudyError(
                f"a search without a study has --model and --data, got no --{lacking[0]};"
                f" add --{lacking[0]}, or the --study that has it"
            )
        model, data = ModelSection(source=self.model or "", weights=self.weights), DataSection(source=self.data or "")
        budget = self.budget or Budget(())
        own = Study(name=_name(model, data), question="", budget=budget, model=model, data=data)
        return own.anchored(Path.cwd())

    def _changed(self, study: Study) -> Study:
        """Returns a study with another network, other weights or other images; what belonged to the old goes."""
        here, changes = Path.cwd(), dict[str, Any]()
        if self.model is not None:
            changes["model"] = ModelSection(source=absolute(model_source(self.model), here))
            changes["exits"] = _updated(study.exits, {"after": None}, clear=True)
            if study.skips.blocks:
                changes["skips"] = study.skips.model_copy(update={"blocks": "all"})
        if self.weights is not None:
            weights = {"weights": absolute_path(self.weights, here)}
            changes["model"] = _updated(changes.get("model", study.model), weights)
            changes["training"] = None  # what is given is taken as trained
        if self.data is not None:
            source = absolute(data_source(self.data), here)
            # How images become input belongs to the network, so it stays where the network stays.
            same = self.model is None
            changes["data"] = _updated(study.data, {"source": source}) if same else DataSection(source=source)
        if "model" in changes or "data" in changes:
            changes["name"] = _name(changes.get("model", study.model), changes.get("data", study.data))
        return study.model_copy(update=changes)


def read_dimensions(text: str) -> tuple[Dimension, ...]:
    """Returns the dimensions that a command line names, between commas.

    Raises:
        StudyError: one of them does not exist, or there is none.
    """
    try:
        found = dimensions([name.strip() for name in text.split(",") if name.strip()])
    except ValueError as error:
        raise StudyError(f"--search-only takes {error}, got {text!r}; leave it out to search all") from None
    return cast(tuple[Dimension, ...], found)


@dataclass(frozen=True)
class Ending:
    """When a search ends, whichever comes first.

    Args:
        trials: in all; None where the study says it.
        timeout_s: seconds of this run; None for no limit.
        patience: trials in a row that win nothing; None where the study says it.
    """

    trials: int | None = None
    timeout_s: float | None = None
    patience: int | None = None

    def of(self, study: Study) -> "Ending":
        """Returns the same with what the study says where the command does not."""
        return Ending(self.trials or study.search.trials, self.timeout_s, self.patience or study.search.patience)


_Section = DataSection | ExitsSection | ModelSection | TargetSection


def _updated(section: _Section, values: dict[str, Any], clear: bool = False) -> _Section:
    changes = {name: value for name, value in values.items() if clear or value is not None}
    try:
        return type(section).model_validate(section.model_dump() | changes)
    except ValidationError as error:
        name = type(section).__name__.removesuffix("Section").lower()
        raise StudyError(f"[{name}] {plain(error, type(section))}") from None


def _name(model: ModelSection, data: DataSection) -> str:
    words = f"{model_source(model.source).short}-{data_source(data.source).short}"
    return re.sub(r"[^A-Za-z0-9_-]+", "-", words).strip("-") or "search"


def _question(study: Study) -> str:
    network, images = model_source(study.model.source).short, data_source(study.data.source).short
    return (
        f"Which version of {network} for {images} keeps {study.budget} on {study.target.runtime},"
        f" {study.target.batch} at a time?"
    )
