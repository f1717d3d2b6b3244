"""The parts of a study file that tell of training and of gates: a table each."""

import difflib
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from search.config.references import factory_source
from spaces.dynamic.block_gates import BLOCK_GATES
from spaces.dynamic.masks import MASKS

Share = Annotated[float, Field(gt=0, lt=1)]
Dimension = Literal["channels", "precision", "exits", "skips", "masks", "patterns", "frames"]
DIMENSIONS: tuple[Dimension, ...] = get_args(Dimension)
"""What may be searched, in the order in which it is written."""
Positive = Annotated[int, Field(ge=1)]


def function(text: str) -> str:
    """Returns the name of a function of the user's, as it is spelled in full."""
    return str(factory_source(text))


def dimensions(names: object) -> object:
    """Returns the dimensions of a search that are named, in their own order, each once.

    Raises:
        ValueError: one of them does not exist, or there is none.
    """
    if not isinstance(names, list | tuple):
        return names
    unknown = [str(name) for name in names if name not in DIMENSIONS]
    if unknown or not names:
        near = difflib.get_close_matches(unknown[0], DIMENSIONS, 1) if unknown else []
        meant = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"at least one of {', '.join(DIMENSIONS)}{meant}")
    return tuple(name for name in DIMENSIONS if name in names)


class Section(BaseModel):
    """What every part is: nothing that is not named in it, and no change once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class FittingSection(Section):
    """How weights are trained: SGD with Nesterov momentum, for epochs, steps or minutes.

    `at_most_minutes` ends a training of epochs or steps that would take longer; the learning rate falls in time for it.
    Minutes are of processor time, so that a busy machine trains for longer, not for less.
    """

    epochs: Annotated[float, Field(gt=0)] = 1
    steps: Positive | None = None
    minutes: Annotated[float, Field(gt=0)] | None = None
    at_most_minutes: Annotated[float, Field(gt=0)] | None = None
    batch: Positive = 128
    learning_rate: Annotated[float, Field(gt=0)] = 0.05
    schedule: Literal["onecycle", "cosine"] = "onecycle"
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    clip: Annotated[float, Field(ge=0)] = 5.0
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    seed: int = 0


class JointSection(FittingSection):
    """How trunk and heads are trained together, from a trained trunk on: `distillation` is the end's share in what
    each exit learns.
    """

    epochs: Annotated[float, Field(gt=0)] = 5
    learning_rate: Annotated[float, Field(gt=0)] = 0.03
    distillation: Annotated[float, Field(ge=0, le=1)] = 0.5
    temperature: Annotated[float, Field(gt=0)] = 2.0


class ExitsSection(Section):
    """After which modules an exit sits, how its head is trained, and how sure it has to be.

    Where `after` is not given, exits are placed near `shares` of the network's FLOPs; `after = []` is none. Heads are
    trained on at most `images` of the training images, the trunk being frozen. `weights` are of the losses in joint
    training, one for each exit and the last for the network's end.
    """

    after: tuple[str, ...] | None = None
    shares: tuple[Share, ...] = (1 / 3, 2 / 3)
    grid: Positive = 4
    epochs: Positive = 25
    learning_rate: Annotated[float, Field(gt=0)] = 0.01
    images: Positive = 10_000
    head: Literal["linear", "conv"] = "linear"
    confidence: Literal["softmax", "margin", "entropy"] = "softmax"
    thresholds: Literal["solved", "searched"] = "solved"
    training: Literal["frozen", "joint"] = "frozen"
    weights: tuple[Annotated[float, Field(gt=0)], ...] = ()
    joint: JointSection = JointSection()


class SkipsSection(FittingSection):
    """Which blocks an input may pass by, and how the network is trained once more, with their gates.

    `blocks` is "all" that have an identity shortcut, or their paths. A gate is trained towards running its block for
    the share `rate` of the images: `weight` is how much that counts. `temperature` is that of the gates' noise;
    `distillation` is the share of the network as it was in the loss. The last 15% of a training leave the gates alone.
    """

    blocks: Literal["all"] | tuple[str, ...] = ()
    gate: Annotated[str, AfterValidator(BLOCK_GATES.check)] = "aig"
    rate: Share = 0.6
    weight: Annotated[float, Field(ge=0)] = 10.0
    temperature: Annotated[float, Field(gt=0)] = 1.0
    distillation: Annotated[float, Field(ge=0, le=1)] = 0.5
    epochs: Annotated[float, Field(gt=0)] = 5
    learning_rate: Annotated[float, Field(gt=0)] = 0.05


class MasksSection(FittingSection):
    """Which method decides, for each image, what of a block is computed, and how the network is trained with it.

    `blocks` is "all" residual ones, or their paths. Gates are trained towards `keep` of the network's FLOPs, their own
    included: `weight` is how much that counts, and `bounds` how much each gate is held to the same share at first.
    `distillation` is the share of the network as it was in the loss. The last 15% of a training leave the gates alone.
    """

    method: Annotated[str, AfterValidator(MASKS.check)] | None = None
    blocks: Literal["all"] | tuple[str, ...] = "all"
    keep: Share = 0.55
    weight: Annotated[float, Field(ge=0)] = 20.0
    bounds: Annotated[float, Field(ge=0)] = 1.0
    distillation: Annotated[float, Field(ge=0, le=1)] = 0.5
    epochs: Annotated[float, Field(gt=0)] = 10
    learning_rate: Annotated[float, Field(gt=0)] = 0.05


class FramesSection(Section):
    """That inputs are the frames of a stream; one that hardly differs from the last key frame may get its answer.

    `source` is a function that takes `validation` or `test` and returns frames, labels, and the first frame of each
    clip. Where it is not given, crops move over the images of the split, until there are so many `frames`.
    """

    source: Annotated[str, AfterValidator(function)] | None = None
    frames: Positive = 4_000
    seed: Annotated[int, Field(ge=0)] = 0
    highest_threshold: Annotated[float, Field(gt=0)] = 0.5
    threshold_step: Annotated[float, Field(gt=0)] = 0.05
    max_age: Annotated[int, Field(ge=2)] = 30
