"""The study file: one question, in TOML."""

import hashlib
import tomllib
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from search.budget import Budget
from spaces.errors import UserError

Reference = Annotated[str, Field(pattern=r"^[\w.]+:\w+$", description="package.module:name")]
Share = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]


class StudyError(UserError):
    """A study that does not exist or says something that cannot be."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(_Section):
    """Where the network comes from."""

    factory: Reference


class DataSection(_Section):
    """Where the images come from: a function that returns `evaluators.data.Splits`."""

    factory: Reference
    augment: Reference | None = None


class TrainingSection(_Section):
    """How the dense network is trained: SGD with Nesterov momentum and a one-cycle rate."""

    epochs: Positive
    batch: Positive = 64
    learning_rate: Annotated[float, Field(gt=0)] = 0.1
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    seed: int = 0


class ExitsSection(_Section):
    """After which modules an exit sits, and how its head is trained on the frozen trunk."""

    after: tuple[str, ...] = ()
    grid: Positive = 4
    epochs: Positive = 25
    learning_rate: Annotated[float, Field(gt=0)] = 0.01


class SpaceSection(_Section):
    """What may vary."""

    keep_at_least: Share = 0.25
    lowest_threshold: Share = 0.5
    threshold_step: Share = 0.05
    drop_slower: bool = True
    """Whether a layer loses the precisions in which it measures slower."""


class TargetSection(_Section):
    """Where the network will run."""

    runtime: str = "onnxruntime"
    batch: Positive = 1
    threads: Positive = 1
    tf32: bool = False
    """Whether fp32 layers run in TF32, on a GPU that has it."""


class RecoverySection(_Section):
    """How accuracy is won back after pruning: not at all, or by recalibrating batch normalisation."""

    level: Literal["none", "bn"] = "bn"
    images: Positive = 256


class SearchSection(_Section):
    """How long to search when the command does not say."""

    trials: Positive = 100


class Study(_Section):
    """One question: model, data, space, target, budget."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
    question: str
    budget: tuple[str, ...]
    model: ModelSection
    data: DataSection
    training: TrainingSection
    exits: ExitsSection = ExitsSection()
    space: SpaceSection = SpaceSection()
    target: TargetSection = TargetSection()
    recovery: RecoverySection = RecoverySection()
    search: SearchSection = SearchSection()

    @classmethod
    def parse(cls, text: str, source: str) -> Self:
        """Returns the study that a TOML text describes.

        Raises:
            StudyError: it is no TOML, lacks something, or has something unknown; `source` is named.
            BudgetError: its budget cannot be read.
        """
        try:
            study = cls.model_validate(tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            raise StudyError(f"a study is a TOML file, got {source}: {error}") from None
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise StudyError(f"{source}: {place}: {first['msg']}, got {first['input']!r}") from None
        Budget.parse(study.budget)
        return study

    def with_budget(self, budget: Budget) -> Self:
        """Returns the same study under another budget, spelled in its one canonical way."""
        return self.model_copy(update={"budget": tuple(str(constraint) for constraint in budget.constraints)})

    @property
    def limits(self) -> Budget:
        """The budget, parsed."""
        return Budget.parse(self.budget)

    @property
    def question_key(self) -> str:
        """Eight hexadecimal digits over all that an answer depends on, so not over the number of trials."""
        content = self.model_dump_json(exclude={"search", "question"})
        return hashlib.sha256(content.encode()).hexdigest()[:8]


def load_study(name: str) -> tuple[Study, str]:
    """Returns the study called `name`, one of ours or the path of a file, and its text.

    Raises:
        StudyError: there is none, or it cannot be read.
    """
    path = Path(name)
    if path.suffix == ".toml" or "/" in name:
        if not path.is_file():
            raise StudyError(f"a study is a name or an existing study.toml, got {name!r}")
        text = path.read_text(encoding="utf-8")
        return Study.parse(text, str(path)), text
    file = resources.files("studies") / name / "study.toml"
    if not file.is_file():
        raise StudyError(f"a study is one of {', '.join(study_names())} or the path of a study.toml, got {name!r}")
    text = file.read_text(encoding="utf-8")
    return Study.parse(text, f"study {name!r}"), text


def study_names() -> list[str]:
    """Returns the names of the studies that come with the program."""
    folder = resources.files("studies")
    return sorted(entry.name for entry in folder.iterdir() if (entry / "study.toml").is_file())
