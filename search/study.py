"""The study file: one question, in TOML."""

import hashlib
import re
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


class FittingSection(_Section):
    """How weights are trained: SGD with Nesterov momentum, for epochs, steps or minutes."""

    epochs: Annotated[float, Field(gt=0)] = 1
    steps: Positive | None = None
    minutes: Annotated[float, Field(gt=0)] | None = None
    batch: Positive = 128
    learning_rate: Annotated[float, Field(gt=0)] = 0.05
    schedule: Literal["onecycle", "cosine"] = "onecycle"
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    clip: Annotated[float, Field(ge=0)] = 5.0
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    seed: int = 0


class TrainingSection(FittingSection):
    """How the dense network is trained."""

    epochs: Annotated[float, Field(gt=0)]
    batch: Positive = 64
    learning_rate: Annotated[float, Field(gt=0)] = 0.1
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0


class ExitsSection(_Section):
    """After which modules an exit sits, and how its head is trained on the frozen trunk."""

    after: tuple[str, ...] = ()
    grid: Positive = 4
    epochs: Positive = 25
    learning_rate: Annotated[float, Field(gt=0)] = 0.01


class SpaceSection(_Section):
    """What may vary."""

    criterion: str = "l2"
    keep_at_least: Share = 0.25
    lowest_threshold: Share = 0.5
    threshold_step: Share = 0.05
    patterns: tuple[Annotated[str, Field(pattern=r"^(2:4|[1-9][0-9]?%)$")], ...] = ()


class TargetSection(_Section):
    """Where the network will run."""

    runtime: str = "onnxruntime"
    batch: Positive = 1
    threads: Positive = 1


class FinetuneSection(FittingSection):
    """How one candidate is fine-tuned: `distillation` is the dense network's share in the loss."""

    distillation: Annotated[float, Field(ge=0, le=1)] = 0.7
    temperature: Annotated[float, Field(gt=0)] = 2.0
    pruning: Literal["one-shot", "gradual"] = "one-shot"


class ElasticSection(FittingSection):
    """How the weights that all candidates share are trained."""

    epochs: Annotated[float, Field(gt=0)] = 5
    learning_rate: Annotated[float, Field(gt=0)] = 0.03
    distillation: Annotated[float, Field(ge=0, le=1)] = 1.0
    temperature: Annotated[float, Field(gt=0)] = 2.0
    random_candidates: Positive = 1


class RecoverySection(_Section):
    """How accuracy is won back after pruning: the same way for every candidate, then more for the front's."""

    level: Literal["none", "bn", "finetune", "elastic"] = "bn"
    images: Positive = 256
    finetune: FinetuneSection = FinetuneSection()
    elastic: ElasticSection = ElasticSection()
    final: FinetuneSection | None = None


class SearchSection(_Section):
    """How long to search when the command does not say, and whether a sensitivity profile gives it a start."""

    trials: Positive = 100
    profile: bool = False


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


def finetuning(length: str, settings: FinetuneSection | None) -> FinetuneSection:
    """Returns fine-tuning for so long: `10epochs`, `500steps` or `20min`.

    Args:
        length: a number and its unit.
        settings: all else; the defaults where not given.

    Raises:
        StudyError: it is no such length.
    """
    units = {"epoch": "epochs", "epochs": "epochs", "step": "steps", "steps": "steps", "min": "minutes"}
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", length)
    if not found or found[2] not in units or float(found[1]) <= 0 or (units[found[2]] == "steps" and "." in found[1]):
        raise StudyError(f"a fine-tuning lasts for 10epochs, 500steps or 20min, got {length!r}")
    base = (settings or FinetuneSection()).model_dump() | {"steps": None, "minutes": None}
    number = int(found[1]) if units[found[2]] == "steps" else float(found[1])
    return FinetuneSection.model_validate(base | {units[found[2]]: number})


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
