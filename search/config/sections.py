"""The parts of a study file that tell of training and of gates: a table each."""

import difflib
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from search.config.references import factory_source
from spaces.dynamic.block_gates import BLOCK_GATES
from spaces.dynamic.masks import MASKS

Share = Annotated[float, Field(gt=0, lt=1)]
Dimension = Literal["channels", "depth", "precision", "exits", "skips", "masks", "patterns", "frames", "size"]
DIMENSIONS: tuple[Dimension, ...] = get_args(Dimension)
"""What may be searched, in the order in which it is written."""
BEFORE_DEPTH: tuple[Dimension, ...] = tuple(name for name in DIMENSIONS if name not in ("depth", "size"))
"""What was searched by default before depth and input size were dimensions."""
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


def image_sizes(sizes: object) -> object:
    """Returns sizes of images in ascending order, each once, or `"auto"`.

    Raises:
        ValueError: one of them is no whole number of at least 1.
    """
    if sizes == "auto":
        return sizes
    is_list = isinstance(sizes, list | tuple)
    if not is_list or any(type(size) is not int or size < 1 for size in sizes):  # type: ignore[attr-defined]
        raise ValueError("'auto' or a list of whole numbers of at least 1")
    return tuple(sorted(set(sizes)))  # type: ignore[call-overload]


class Section(BaseModel):
    """What every part is: nothing that is not named in it, and no change once it is read.

    The text under a key is its line in `docs/study-reference.md`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class FittingSection(Section):
    """How weights are trained: SGD with Nesterov momentum, for epochs, steps or minutes.

    `at_most_minutes` ends a training of epochs or steps that would take longer; the learning rate falls in time for it.
    Minutes are of processor time, so that a busy machine trains for longer, not for less.
    """

    epochs: Annotated[float, Field(gt=0)] = 1
    """Passes over the training images; fractions are allowed."""
    steps: Positive | None = None
    """Training length in steps; counts instead of `epochs` where given."""
    minutes: Annotated[float, Field(gt=0)] | None = None
    """Training length in minutes of processor time; counts instead of `epochs` where given."""
    at_most_minutes: Annotated[float, Field(gt=0)] | None = None
    """Ends a training of `epochs` or `steps` that would take longer, in minutes of processor time; the learning rate
    falls in time for it."""
    batch: Positive = 128
    """Images per step."""
    learning_rate: Annotated[float, Field(gt=0)] = 0.05
    """Peak learning rate of SGD with Nesterov momentum."""
    schedule: Literal["onecycle", "cosine"] = "onecycle"
    """How the learning rate changes: one-cycle, or cosine decay."""
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    """L2 penalty on the weights."""
    clip: Annotated[float, Field(ge=0)] = 5.0
    """Largest norm of the gradient; 0 does not clip."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of an exponential moving average of the weights, such as 0.999; 0 keeps the last weights."""
    seed: int = 0
    """Seed of the order of the images and of all other chance in this training."""


class JointSection(FittingSection):
    """How trunk and heads are trained together, from a trained trunk on."""

    epochs: Annotated[float, Field(gt=0)] = 5
    """Passes over the training images, from a trained trunk on."""
    learning_rate: Annotated[float, Field(gt=0)] = 0.03
    """Peak learning rate of trunk and heads."""
    distillation: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the network's end in what each exit learns; the rest is the labels."""
    temperature: Annotated[float, Field(gt=0)] = 2.0
    """Softmax temperature of the distillation."""


class ExitsSection(Section):
    """After which modules an exit sits, how its head is trained, and how sure it has to be."""

    after: tuple[str, ...] | None = None
    """Modules behind which an exit sits; `[]` for no exits; placed automatically where not given."""
    shares: tuple[Share, ...] = (1 / 3, 2 / 3)
    """Where automatic exits are placed, as shares of the network's FLOPs."""
    grid: Positive = 4
    """Each head pools its features to `grid` x `grid`."""
    epochs: Positive = 25
    """Passes over the training images, for heads on a frozen trunk."""
    learning_rate: Annotated[float, Field(gt=0)] = 0.01
    """Learning rate of the heads."""
    images: Positive = 10_000
    """Heads are trained on at most so many of the training images."""
    head: Literal["linear", "conv"] = "linear"
    """One linear layer, or a small convolution before it."""
    confidence: Literal["softmax", "margin", "entropy"] = "softmax"
    """What is compared with a threshold: the largest softmax probability, the margin between the two largest, or the
    entropy."""
    thresholds: Literal["solved", "searched"] = "solved"
    """`solved`: the best thresholds are computed for each version, on the validation images of `choose_on`; `searched`:
    the sampler proposes them."""
    choose_on: Positive | None = None
    """Solved thresholds are chosen on so many of the validation images; half of them where not given, and at most. The
    others score. Fewer make a trial shorter."""
    training: Literal["frozen", "joint"] = "frozen"
    """`frozen`: heads on the trained trunk; `joint`: trunk and heads together, as `[exits.joint]` says."""
    weights: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """Weights of the losses in joint training, one for each exit and the last for the network's end; 1 each where not
    given."""
    joint: JointSection = JointSection()
    """How trunk and heads are trained together."""


class SkipsSection(FittingSection):
    """Which residual blocks an image may skip, and how the network is trained once more with their gates."""

    blocks: Literal["all"] | tuple[str, ...] = ()
    """Blocks that get a gate: `all` with an identity shortcut, or a list of their module paths; `[]` for none."""
    gate: Annotated[str, AfterValidator(BLOCK_GATES.check)] = "aig"
    """The gate's design: ConvNet-AIG's, from channel means, or SkipNet's, a convolution."""
    rate: Share = 0.6
    """Share of the images for which a gate learns to run its block."""
    weight: Annotated[float, Field(ge=0)] = 10.0
    """Weight of that share in the loss."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Temperature of the gates' noise in training."""
    distillation: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share in the loss of the network as it was before its gates."""
    epochs: Annotated[float, Field(gt=0)] = 5
    """Passes over the training images; the last 15% leave the gates alone."""
    learning_rate: Annotated[float, Field(gt=0)] = 0.05
    """Peak learning rate of network and gates."""


class MasksSection(FittingSection):
    """Which method decides, for each image, what of a block is computed, and how the network is trained with it."""

    method: Annotated[str, AfterValidator(MASKS.check)] | None = None
    """Which method decides what of a block is computed for an image; no masks where not given."""
    blocks: Literal["all"] | tuple[str, ...] = "all"
    """Residual blocks that get masks: `all`, or a list of their module paths."""
    keep: Share = 0.55
    """Share of the network's FLOPs that training aims at, those of the gates included."""
    weight: Annotated[float, Field(ge=0)] = 20.0
    """Weight of that share in the loss."""
    bounds: Annotated[float, Field(ge=0)] = 1.0
    """How strongly each gate is held to the same share at first."""
    distillation: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share in the loss of the network as it was before its masks."""
    epochs: Annotated[float, Field(gt=0)] = 10
    """Passes over the training images; the last 15% leave the gates alone."""
    learning_rate: Annotated[float, Field(gt=0)] = 0.05
    """Peak learning rate of network and gates."""


class FramesSection(Section):
    """Inputs are the frames of a stream; one that hardly differs from the last key frame may get its answer."""

    source: Annotated[str, AfterValidator(function)] | None = None
    """Function that takes `validation` or `test` and returns frames, labels and the first frame of each clip; moving
    crops of the split's images where not given."""
    frames: Positive = 4_000
    """Number of frames of a stream of moving crops."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the moving crops."""
    highest_threshold: Annotated[float, Field(gt=0)] = 0.5
    """Largest threshold that is searched: mean absolute difference of 8x8 grey thumbnails, in units of the input; at 0
    every frame is computed."""
    threshold_step: Annotated[float, Field(gt=0)] = 0.05
    """Step of the thresholds that are searched."""
    max_age: Annotated[int, Field(ge=2)] = 30
    """So many frames after a key frame the next one is computed in any case."""
