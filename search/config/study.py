"""The study file: one question, in TOML."""

import hashlib
import json
import logging
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
    field_serializer,
    field_validator,
)
from pydantic_core import PydanticKnownError

from evaluators.quantization.calibration import CALIBRATORS
from search.config.budget import Budget
from search.config.errors import StudyError, plain
from search.config.objectives import DEFAULT, Objective, Objectives, known_objectives
from search.config.recovery_sections import (
    DEFAULT_FINAL,
    ElasticSection,
    FinalSection,
    FinetuneSection,
    QatSection,
    RecoverySection,
)
from search.config.references import absolute, absolute_path, data_source, factory_source, model_source
from search.config.registries import QUANTIZERS, RECOVERIES, SAMPLERS
from search.config.renamed import with_earlier_dimensions, with_present_names
from search.config.sections import (
    BEFORE_DEPTH,
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
    image_sizes,
)
from spaces.dynamic.block_gates import BLOCK_GATES
from spaces.dynamic.masks import MASKS
from spaces.pruning.criteria import CRITERIA
from spaces.registry import Registry

__all__ = [
    "DataSection",
    "ElasticSection",
    "ExitsSection",
    "FinalSection",
    "FinetuneSection",
    "FittingSection",
    "FramesSection",
    "ModelSection",
    "QatSection",
    "RecoverySection",
    "SkipsSection",
    "Study",
    "StudyError",
    "load_study",
    "study_names",
]


logger = logging.getLogger(__name__)


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
    """`torchvision:NAME[@WEIGHTS]`, `package.module:function` or `path/file.py:function`."""
    weights: str | None = None
    """File with a state dict; relative paths begin at the study file."""


class DataSection(Section):
    """Where the images come from, how they become input, and how many are used at most."""

    source: Annotated[str, AfterValidator(_data)]
    """`imagefolder:PATH`, `cifar10:PATH`, `cifar100:PATH`, `fashion-mnist:PATH`, `imagenet:PATH`, or a function that
    returns `evaluators.data.Splits`."""
    augment: Annotated[str, AfterValidator(function)] | None = None
    """Function of training images and a `torch.Generator`, named like a function in `source`."""
    size: Positive | None = None
    """Height and width of the input; the weights' own where not given, else what is usual for the data."""
    resize: Positive | None = None
    """Length of the shorter side before the middle is cut out; `size` where not given."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel, of values from 0 to 1: one value for grey, three for RGB."""
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    """Standard deviation of each channel, likewise."""
    labels: str | None = None
    """File with the names of the classes in the network's order, one a line; their own order where not given."""
    train: Positive = 50_000
    """Training images, at most."""
    calibration: Positive = 200
    """Training images from which activation ranges are read, at most."""
    validation: Positive = 2_000
    """Validation images, on which versions are scored, at most."""
    test: Positive = 10_000
    """Test images, which only `pick` sees, at most."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the split."""


class TrainingSection(FittingSection):
    """How the dense network is trained."""

    epochs: Annotated[float, Field(gt=0)]
    """Passes over the training images."""
    batch: Positive = 64
    """Images per step."""
    learning_rate: Annotated[float, Field(gt=0)] = 0.1
    """Peak learning rate of SGD with Nesterov momentum."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each label that is spread over all classes."""


class SpaceSection(Section):
    """What may vary; all else stays as the dense network has it."""

    only: Annotated[tuple[Dimension, ...], BeforeValidator(dimensions)] = DIMENSIONS
    """Dimensions that are searched; all others stay as in the dense network."""
    precision: Literal["searched", "fp32", "fp16", "fp8", "int8"] = "searched"
    """Precision of every layer; `searched`: chosen per layer. Where it is neither searched nor given, it is the
    target's first."""
    criterion: Annotated[str, AfterValidator(CRITERIA.check)] = "l2"
    """Importance criterion that ranks the channels to be cut."""
    keep_at_least: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Smallest share of its channels that a group keeps; 1 cuts none."""
    channel_step: Positive | None = None
    """Multiple in which groups keep channels; where not given, what suits the target: it is measured."""
    keep_blocks_at_least: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Smallest share of its residual blocks that a stage keeps, rounded down: a quarter of three is none. 1 leaves none
    out."""
    sizes: Annotated[Literal["auto"] | tuple[Positive, ...], BeforeValidator(image_sizes)] = ()
    """Heights and widths that square images may be resized to before the network, besides their own; `auto`: about a
    half and three quarters of it."""
    lowest_threshold: Share = 0.5
    """Lowest confidence threshold of an exit that is searched."""
    threshold_step: Share = 0.05
    """Step of the exits' thresholds that are searched."""
    patterns: tuple[Annotated[str, Field(pattern=r"^(2:4|[1-9][0-9]?%)$")], ...] = ()
    """Patterns of zeros inside layers: `2:4` where the target has sparse kernels, or the share of zeros, such as
    `50%`."""
    storage: tuple[Literal["int4"], ...] = ()
    """Precisions in which weights may be stored, for smaller files: `int4`, or none."""
    drop_slower: bool = True
    """Whether a layer loses the precisions in which it measures slower."""


class QuantizationSection(Section):
    """How int8 is made."""

    calibrator: Annotated[str, AfterValidator(CALIBRATORS.check)] = "minmax"
    """How an activation's range follows from the calibration images."""
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.99
    """Percentage of the magnitudes that lies inside the range, for the calibrator `percentile`."""
    weights: Literal["per-channel", "per-tensor"] = "per-channel"
    """One scale per output channel, or one per tensor."""
    ranges: Literal["data", "batchnorm"] = "data"
    """Where activation ranges come from: calibration images, or batch statistics without any image."""
    equalize: bool = False
    """Whether the ranges of channels are equalized between layers."""
    bias_correction: Literal["none", "batchnorm", "data"] = "none"
    """Whether biases make up for the rounding of weights, and from what their shift is estimated."""
    rounding: Literal["nearest", "adaround"] = "nearest"
    """To the nearest step, or by AdaRound: to the step that keeps a layer's outputs on the calibration images."""
    rounding_steps: Positive = 500
    """AdaRound's optimization steps per layer."""


class TargetSection(Section):
    """Where the network will run."""

    runtime: str = "onnxruntime"
    """`onnxruntime`, `openvino`, `tensorrt`, or `ssh://[user@]host` for a board."""
    batch: Positive = 1
    """Images per call of the deployed network."""
    threads: Positive = 1
    """Threads of the deployed network."""
    fp32_in: Literal["fp32", "tf32", "bf16"] = "fp32"
    """What fp32 layers run in: TF32 on a GPU that has it, bfloat16 on a CPU that multiplies it."""


class SearchSection(Section):
    """What counts, how long to search, what proposes versions, and whether hopeless versions end early."""

    objectives: Annotated[tuple[Objective, ...], BeforeValidator(known_objectives)] | None = None
    """What the search improves: accuracy, and at least one cost. Where not given, accuracy and latency, or what a
    search that goes on began with."""
    trials: Positive = 100
    """Trials after which a search ends."""
    patience: Positive | None = None
    """Trials in a row without progress after which a search ends; never where not given."""
    sampler: Annotated[str, AfterValidator(SAMPLERS.check)] = "ehvi"
    """What proposes versions."""
    warm_start: bool = False
    """Whether the search begins with widths from a sensitivity profile."""
    early_stopping: bool = True
    """Whether hopeless versions are stopped early, after some of the images."""


class Study(Section):
    """One question: model, data, space, target, budget."""

    name: Annotated[str, AfterValidator(_named)]
    """Name of the study: letters, digits, `-` and `_`."""
    question: str
    """What the study asks, in a sentence."""
    budget: Budget
    """Hard limits, such as `["latency<5ms", "accuracy_drop<1%"]`."""
    model: ModelSection
    """The network."""
    data: DataSection
    """The images."""
    training: TrainingSection | None = None
    """Training of the dense network; without the section it is taken as trained."""
    exits: ExitsSection = ExitsSection()
    """Early exits."""
    skips: SkipsSection = SkipsSection()
    """Residual blocks that an image may skip."""
    masks: MasksSection = MasksSection()
    """Masks inside residual blocks."""
    space: SpaceSection = SpaceSection()
    """What may vary."""
    quantization: QuantizationSection = QuantizationSection()
    """How int8 files are made."""
    frames: FramesSection | None = None
    """Inputs are the frames of a stream; without the section they come alone."""
    target: TargetSection = TargetSection()
    """Where the network will run."""
    recovery: RecoverySection = RecoverySection()
    """How accuracy is won back."""
    search: SearchSection = SearchSection()
    """How long to search, and how."""

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
            content, renamed = with_present_names(tomllib.loads(text))
            study = cls.model_validate(content)
        except tomllib.TOMLDecodeError as error:
            raise StudyError(f"a study is a TOML file, got {source}: {error}") from None
        except ValidationError as error:
            raise StudyError(f"{source}: {plain(error, cls)}") from None
        for line in renamed:
            logger.warning("%s: %s", source, line)
        return study.anchored(folder or Path.cwd())

    @classmethod
    def stored(cls, content: Any) -> Self:
        """Returns the study that a journal holds.

        Raises:
            StudyError: it was written by a version with other keys.
        """
        try:
            return cls.model_validate(with_earlier_dimensions(with_present_names(content)[0]))
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
        if self.data.labels is not None:
            data["labels"] = absolute_path(self.data.labels, folder)
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

    def check_extensions(self) -> None:
        """Checks that what the study names as `package.module:attribute` is there, before anything is trained.

        Raises:
            UnknownNameError: it cannot be imported.
        """
        named: list[tuple[Registry[Any], str | None]] = [
            (CRITERIA, self.space.criterion),
            (CALIBRATORS, self.quantization.calibrator),
            (BLOCK_GATES, self.skips.gate),
            (MASKS, self.masks.method),
            (RECOVERIES, self.recovery.level),
            (QUANTIZERS, self.recovery.qat.quantizer if self.recovery.qat else None),
            (SAMPLERS, self.search.sampler),
        ]
        for registry, name in named:
            if name is not None:
                registry.known(name)

    @property
    def objectives(self) -> Objectives:
        """What the search improves, the accuracy first."""
        return self.search.objectives or DEFAULT

    def with_objectives(self, objectives: Objectives | None) -> Self:
        """Returns the study with other objectives; None leaves them to the search."""
        return self.model_copy(update={"search": self.search.model_copy(update={"objectives": objectives})})

    @property
    def question_key(self) -> str:
        """Eight hexadecimal digits over all that an answer depends on, so not over the number of trials."""
        # A key that came later counts where it says something, so that earlier searches keep their names.
        later = {"precision", "keep_blocks_at_least", "channel_step", "sizes"}
        silent = {key for key in later if getattr(self.space, key) == SpaceSection.model_fields[key].default}
        silent |= {"only"} if self.space.only == BEFORE_DEPTH else set()
        choose_on = {"choose_on"} if self.exits.choose_on is None else set()
        labels = {"labels"} if self.data.labels is None else set()
        content = self.model_dump_json(
            exclude={"search": True, "question": True, "space": silent, "exits": choose_on, "data": labels}
        )
        recovery = self.recovery
        if recovery.final == DEFAULT_FINAL:  # there was none by default
            content = content.replace(f'"final":{recovery.final.model_dump_json()}', '"final":null')
        # What fp32 layers run in was two keys once.
        kind = self.target.fp32_in
        before = f'"tf32":{str(kind == "tf32").lower()},"bf16":{str(kind == "bf16").lower()}'
        content = content.replace(f'"fp32_in":"{kind}"', before)
        # So do objectives; those of searches that began before there was a choice stand in their journals.
        content += "" if self.objectives == DEFAULT else json.dumps(self.objectives)
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
    no_length = {"steps": None, "minutes": None, "at_most_minutes": None, "rounds": 1}
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
            text = path.read_text(encoding="utf-8-sig")  # Windows editors put a mark before the text
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
