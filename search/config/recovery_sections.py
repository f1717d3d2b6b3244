"""The parts of a study file on recovery: how accuracy is won back."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SerializerFunctionWrapHandler, model_serializer

from search.config.registries import QUANTIZERS, RECOVERIES
from search.config.sections import FittingSection, Positive, Section

_CAME_LATER = ("rounds", "of_search")
"""Keys of fine-tunings that earlier versions did not have."""


class FinetuneSection(FittingSection):
    """How one version is fine-tuned."""

    distillation: Annotated[float, Field(ge=0, le=1)] = 0.7
    """Share of the dense network's answers in the loss; the rest is the labels."""
    temperature: Annotated[float, Field(gt=0)] = 2.0
    """Softmax temperature of the distillation."""
    pruning: Literal["one-shot", "gradual"] = "one-shot"
    """`one-shot`: channels go before the training; `gradual`: along a cubic ramp over its first half."""
    rounds: Positive = 1
    """Trainings one after the other, each twice as long as the one before, with a learning rate that rises and falls
    anew."""

    @model_serializer(mode="wrap")
    def _without_silent_keys(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Returns the keys; one that came later only where it says something, so that earlier trainings are found."""
        content: dict[str, Any] = dump(self)
        silent = {key for key in _CAME_LATER if key in content and content[key] == type(self).model_fields[key].default}
        return {key: value for key, value in content.items() if key not in silent}

    def each_round(self) -> Iterator["FinetuneSection"]:
        """Yields the settings of each of the trainings."""
        for number in range(self.rounds):
            lengths = {key: getattr(self, key) for key in ("epochs", "steps", "minutes", "at_most_minutes")}
            longer = {key: length * 2**number for key, length in lengths.items() if length is not None}
            once = {"pruning": "one-shot"} if number else {}  # the channels are gone after the first one
            yield self.model_copy(update={**longer, **once, "rounds": 1})


class FinalSection(FinetuneSection):
    """How the most promising versions are fine-tuned after the search, and how many at most."""

    versions: Annotated[int, Field(ge=0)] = 8
    """Versions that are fine-tuned after the search, at most; 0: none."""
    of_search: Annotated[float, Field(gt=0)] | None = None
    """Processor time of all of these trainings together, as a share of the time of shared weights and trials; it goes
    where it wins most, and ends where it wins nothing more. Counts instead of any other length where given."""


class ElasticSection(FittingSection):
    """How the weights that all versions share are trained."""

    epochs: Annotated[float, Field(gt=0)] = 20
    """Passes over the training images."""
    at_most_minutes: Annotated[float, Field(gt=0)] | None = 30
    """Ends the training where its epochs would take longer, in minutes of processor time."""
    learning_rate: Annotated[float, Field(gt=0)] = 0.03
    """Peak learning rate of the shared weights."""
    distillation: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of the dense network's answers in the loss; the rest is the labels."""
    temperature: Annotated[float, Field(gt=0)] = 2.0
    """Softmax temperature of the distillation."""
    random_candidates: Positive = 2
    """Random versions per step; every other one is near the dense network."""


class QatSection(FittingSection):
    """Quantization-aware training of a version, once its channels are recovered; of shared weights, throughout."""

    learning_rate: Annotated[float, Field(gt=0)] = 0.002
    """Peak learning rate."""
    distillation: Annotated[float, Field(ge=0, le=1)] = 0.7
    """Share of the dense network's answers in the loss; the rest is the labels."""
    temperature: Annotated[float, Field(gt=0)] = 2.0
    """Softmax temperature of the distillation."""
    quantizer: Annotated[str, AfterValidator(QUANTIZERS.check)] = "lsq"
    """Method of quantization-aware training."""


DEFAULT_FINAL = FinalSection(of_search=0.5)
"""How versions are fine-tuned after a search that says nothing of it."""


def _final(given: object) -> object:
    """Returns a final fine-tuning as it was written; the default where a search of before says that it has none."""
    return DEFAULT_FINAL if given is None else given


class RecoverySection(Section):
    """How accuracy is won back after pruning: the same way for every version, then more for the front's."""

    level: Annotated[str, AfterValidator(RECOVERIES.check)] = "elastic"
    """What every version gets during the search: nothing, corrected batch statistics, fine-tuning of each, or weights
    that all share."""
    images: Positive = 256
    """Training images from which batch statistics are measured."""
    finetune: FinetuneSection = FinetuneSection()
    """Fine-tuning of each version, at level `finetune`."""
    elastic: ElasticSection = ElasticSection()
    """Training of the weights that all versions share, at level `elastic`."""
    final: Annotated[FinalSection, BeforeValidator(_final)] = DEFAULT_FINAL
    """Fine-tuning of the most promising versions after the search; without the section with `of_search = 0.5`."""
    qat: QatSection | None = None
    """Quantization-aware training of versions with int8 layers; none without the section."""
