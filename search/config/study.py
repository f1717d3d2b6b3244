"""The study file: one question, in TOML."""

import hashlib
import json
import re
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationError,
    ValidationInfo,
    field_serializer,
    field_validator,
)
from pydantic_core import PydanticKnownError

from evaluators.quantization.calibration import CALIBRATORS
from search.config.budget import Budget
from search.config.errors import StudyError, plain
from search.config.references import absolute, absolute_path, data_source, factory_source, model_source
from search.config.registries import QUANTIZERS, RECOVERIES, SAMPLERS
from search.config.sections import (
    DIMENSIONS,
    Dimension,
    ExitsSection,
    FittingSection,
    FramesSection,
    MasksSection,
    Positive,
    Section,
    Share,
    SkipsSection,
    dimensions,
    function,
)
from spaces.pruning.criteria import CRITERIA

__all__ = [
    "DataSection",
    "ExitsSection",
    "FittingSection",
    "FramesSection",
    "ModelSection",
    "SkipsSection",
    "Study",
    "StudyError",
    "load_study",
    "study_names",
]


def _named(text: str) -> str:
    if not text or not text.replace("-", "").replace("_", "").isalnum() or not text.isascii():
        raise ValueError("letters, digits, - and _")
    return text


def _model(text: str) -> str:
    return str(model_source(text))


def _data(text: str) -> str:
    return str(data_source(text))


class ModelSection(Section):
    """Where the network comes from, and the file with its weights."""

    source: Annotated[str, AfterValidator(_model)]
    weights: str | None = None


class DataSection(Section):
    """Where the images come from, how they become input, and how many are used at most.

    `size` is the input's height and width, `resize` what the shorter side becomes before the middle is cut out. The
    number of values in `mean` and `std` is that of the channels.
    """

    source: Annotated[str, AfterValidator(_data)]
    augment: Annotated[str, AfterValidator(function)] | None = None
    size: Positive | None = None
    resize: Positive | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    train: Positive = 50_000
    calibration: Positive = 200
    validation: Positive = 2_000
    test: Positive = 10_000
    seed: Annotated[int, Field(ge=0)] = 0


class TrainingSection(FittingSection):
    """How the dense network is trained."""

    epochs: Annotated[float, Field(gt=0)]
    batch: Positive = 64
    learning_rate: Annotated[float, Field(gt=0)] = 0.1
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0


class SpaceSection(Section):
    """What may vary: `only` these dimensions, and all else stays as the dense network has it.

    Layers have one `precision` where it is given; where it is not searched and not given, that is the target's first.
    """

    only: Annotated[tuple[Dimension, ...], BeforeValidator(dimensions)] = DIMENSIONS
    precision: Literal["searched", "fp32", "fp16", "fp8", "int8"] = "searched"
    criterion: Annotated[str, AfterValidator(CRITERIA.check)] = "l2"
    keep_at_least: Annotated[float, Field(gt=0, le=1)] = 0.25
    lowest_threshold: Share = 0.5
    threshold_step: Share = 0.05
    patterns: tuple[Annotated[str, Field(pattern=r"^(2:4|[1-9][0-9]?%)$")], ...] = ()
    storage: tuple[Literal["int4"], ...] = ()
    """Precisions of weights alone, for smaller files."""
    drop_slower: bool = True
    """Whether a layer loses the precisions in which it measures slower."""


class QuantizationSection(Section):
    """How int8 is made: see `evaluators.quantization.scheme.Scheme`, which has the same keys."""

    calibrator: Annotated[str, AfterValidator(CALIBRATORS.check)] = "minmax"
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.99
    weights: Literal["per-channel", "per-tensor"] = "per-channel"
    ranges: Literal["data", "batchnorm"] = "data"
    equalize: bool = False
    bias_correction: Literal["none", "batchnorm", "data"] = "none"
    rounding: Literal["nearest", "adaround"] = "nearest"
    rounding_steps: Positive = 500


class TargetSection(Section):
    """Where the network will run."""

    runtime: str = "onnxruntime"
    batch: Positive = 1
    threads: Positive = 1
    tf32: bool = False
    """Whether fp32 layers run in TF32, on a GPU that has it."""
    bf16: bool = False
    """Whether fp32 layers run in bfloat16, on a CPU that multiplies it."""

    @field_validator("bf16")
    @classmethod
    def _one_type(cls, bf16: bool, info: ValidationInfo) -> bool:
        if bf16 and info.data.get("tf32"):
            raise ValueError("false where tf32 is true, because fp32 layers run in one type")
        return bf16

    @property
    def fp32_in(self) -> Literal["fp32", "tf32", "bf16"]:
        """What all fp32 layers run in."""
        return "tf32" if self.tf32 else "bf16" if self.bf16 else "fp32"


class FinetuneSection(FittingSection):
    """How one candidate is fine-tuned: `distillation` is the dense network's share in the loss."""

    distillation: Annotated[float, Field(ge=0, le=1)] = 0.7
    temperature: Annotated[float, Field(gt=0)] = 2.0
    pruning: Literal["one-shot", "gradual"] = "one-shot"


class FinalSection(FinetuneSection):
    """How the most promising versions are fine-tuned after the search, and how many at most."""

    versions: Positive = 8


class ElasticSection(FittingSection):
    """How the weights that all candidates share are trained."""

    epochs: Annotated[float, Field(gt=0)] = 20
    at_most_minutes: Annotated[float, Field(gt=0)] | None = 30
    learning_rate: Annotated[float, Field(gt=0)] = 0.03
    distillation: Annotated[float, Field(ge=0, le=1)] = 1.0
    temperature: Annotated[float, Field(gt=0)] = 2.0
    random_candidates: Positive = 1


class QatSection(FittingSection):
    """How trainings feel int8: how long a version is trained so once its channels are recovered, and by which method.

    `distillation` is the dense network's share in the loss. Shared weights feel it for as long as they are trained.
    """

    learning_rate: Annotated[float, Field(gt=0)] = 0.002
    distillation: Annotated[float, Field(ge=0, le=1)] = 0.7
    temperature: Annotated[float, Field(gt=0)] = 2.0
    quantizer: Annotated[str, AfterValidator(QUANTIZERS.check)] = "lsq"


class RecoverySection(Section):
    """How accuracy is won back after pruning: the same way for every candidate, then more for the front's."""

    level: Annotated[str, AfterValidator(RECOVERIES.check)] = "elastic"
    images: Positive = 256
    finetune: FinetuneSection = FinetuneSection()
    elastic: ElasticSection = ElasticSection()
    final: FinalSection | None = None
    qat: QatSection | None = None
    """Whether trainings feel int8; those of versions without int8 layers never do."""


class SearchSection(Section):
    """How long to search and what proposes when the command does not say, whether a sensitivity profile gives it a
    start, and whether hopeless versions are ended after some of the images.
    """

    trials: Positive = 100
    patience: Positive | None = None
    """So many trials in a row that win nothing end a search."""
    sampler: Annotated[str, AfterValidator(SAMPLERS.check)] = "front"
    profile: bool = False
    early: bool = True


class Study(Section):
    """One question: model, data, space, target, budget."""

    name: Annotated[str, AfterValidator(_named)]
    question: str
    budget: Budget
    model: ModelSection
    data: DataSection
    training: TrainingSection | None = None
    exits: ExitsSection = ExitsSection()
    skips: SkipsSection = SkipsSection()
    masks: MasksSection = MasksSection()
    space: SpaceSection = SpaceSection()
    quantization: QuantizationSection = QuantizationSection()
    frames: FramesSection | None = None
    target: TargetSection = TargetSection()
    recovery: RecoverySection = RecoverySection()
    search: SearchSection = SearchSection()

    @field_validator("budget", mode="plain")
    @classmethod
    def _read_budget(cls, texts: object) -> Budget:
        if isinstance(texts, Budget):
            return texts
        if not isinstance(texts, list | tuple):
            raise PydanticKnownError("tuple_type")
        if not all(isinstance(text, str) for text in texts):
            raise PydanticKnownError("string_type")
        return Budget.parse(texts)

    @field_serializer("budget")
    def _write_budget(self, budget: Budget) -> tuple[str, ...]:
        """Returns a text for each limit, spelled in its one canonical way."""
        return tuple(str(constraint) for constraint in budget.constraints)

    @classmethod
    def parse(cls, text: str, source: str, folder: Path | None = None) -> Self:
        """Returns the study that a TOML text describes, its paths made absolute.

        Args:
            text: the TOML.
            source: where it is from, for messages.
            folder: what relative paths begin at; the working directory where not given.

        Raises:
            StudyError: it is no TOML, lacks something, or has something unknown; `source` is named.
            SourceError: it names no network or images.
            BudgetError: its budget cannot be read.
        """
        try:
            study = cls.model_validate(tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            raise StudyError(f"a study is a TOML file, got {source}: {error}") from None
        except ValidationError as error:
            raise StudyError(f"{source}: {plain(error, cls)}") from None
        return study.anchored(folder or Path.cwd())

    @classmethod
    def stored(cls, content: Any) -> Self:
        """Returns the study that a journal holds.

        Raises:
            StudyError: it was written by a version with other keys.
        """
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise StudyError(
                f"a search goes on with the version that began it, got another's study: {plain(error, cls)}"
            ) from None

    def anchored(self, folder: Path) -> Self:
        """Returns the same study with paths that mean the same from every folder; relative ones begin at `folder`."""
        model = {"source": absolute(model_source(self.model.source), folder)}
        if self.model.weights is not None:
            model["weights"] = absolute_path(self.model.weights, folder)
        data = {"source": absolute(data_source(self.data.source), folder)}
        if self.data.augment is not None:
            data["augment"] = absolute(factory_source(self.data.augment), folder)
        sections = {"model": self.model.model_copy(update=model), "data": self.data.model_copy(update=data)}
        frames = self.frames
        if frames is not None and frames.source is not None:
            source = absolute(factory_source(frames.source), folder)
            frames = frames.model_copy(update={"source": source})
        return self.model_copy(update=sections | {"frames": frames})

    def to_toml(self) -> str:
        """Returns the study as the text of a study file: every key, with the defaults written out."""
        content = self.model_dump(mode="json", exclude_none=True)
        return "\n".join(_lines(content, "")).lstrip("\n") + "\n"

    @property
    def question_key(self) -> str:
        """Eight hexadecimal digits over all that an answer depends on, so not over the number of trials."""
        # A key that came later counts where it says something, so that earlier searches keep their names.
        later = {"only", "precision"}
        silent = {key for key in later if getattr(self.space, key) == SpaceSection.model_fields[key].default}
        content = self.model_dump_json(exclude={"search": True, "question": True, "space": silent})
        return hashlib.sha256(content.encode()).hexdigest()[:8]


def _lines(content: Mapping[str, Any], section: str) -> list[str]:
    """Returns a section, its own keys first, then the sections in it."""
    lines = ["", f"[{section}]"] if section else []
    lines += [f"{key} = {_toml(value)}" for key, value in content.items() if not isinstance(value, dict)]
    for name, inner in content.items():
        if isinstance(inner, dict):
            lines += _lines(inner, f"{section}.{name}" if section else name)
    return lines


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
    known = set(FinetuneSection.model_fields)
    no_length = {"steps": None, "minutes": None, "at_most_minutes": None}
    base = (settings or FinetuneSection()).model_dump(include=known) | no_length
    number = int(found[1]) if units[found[2]] == "steps" else float(found[1])
    return FinetuneSection.model_validate(base | {units[found[2]]: number})


def load_study(name: str) -> Study:
    """Returns the study called `name`, one of ours or the path of a file.

    Raises:
        StudyError: there is none, or it cannot be read.
    """
    path = Path(name)
    if path.suffix == ".toml" or "/" in name:
        if not path.is_file():
            raise StudyError(f"a study is a name or an existing study.toml, got {name!r}")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise StudyError(f"a study is a readable text file, got {name!r}: {error}") from None
        return Study.parse(text, str(path), path.resolve().parent)
    file = resources.files("studies") / name / "study.toml"
    if not file.is_file():
        raise StudyError(f"a study is one of {', '.join(study_names())} or the path of a study.toml, got {name!r}")
    return Study.parse(file.read_text(encoding="utf-8"), f"study {name!r}")


def study_names() -> list[str]:
    """Returns the names of the studies that come with the program."""
    folder = resources.files("studies")
    return sorted(entry.name for entry in folder.iterdir() if (entry / "study.toml").is_file())


def _toml(value: Any) -> str:
    """Returns a value as TOML writes it, which for these types is as JSON does."""
    return json.dumps(value, ensure_ascii=False)
