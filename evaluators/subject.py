"""What evaluators look at: one compressed network, its artifact, and what it answers."""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from evaluators.artifact import Artifact
from evaluators.data import LabelledImages
from evaluators.frames import Reuse, Stream
from evaluators.measurement import Measurement
from evaluators.target import Opened, Runtime, Target
from spaces.candidate import Candidate
from spaces.network import ExitNetwork

_AT_ONCE = 64
"""So many key frames are gathered at a time."""


@dataclass(frozen=True)
class Answers:
    """What an artifact said to a set of images.

    Args:
        classes: the predicted class of each image.
        correct: whether it is right.
        exits: the exit that answered, 0 being the first and the last index the end.
        stages: how many stages the artifact has.
        profiles: for each way in which a batch shrinks on its way, one batch that does, as `(first image, batches)`;
            of a stream, the key frames' only.
        answering: of a stream, the key frame whose answer each frame was given, `(n,)`; a key frame its own.
        clips: of a stream, the clip that each frame belongs to, `(n,)`.
    """

    classes: NDArray[np.int64]
    correct: NDArray[np.bool_]
    exits: NDArray[np.int64]
    stages: int
    profiles: tuple[tuple[int, int], ...]
    answering: NDArray[np.int64] | None = None
    clips: NDArray[np.int64] | None = None

    @property
    def reached(self) -> tuple[float, ...]:
        """The share of images that reaches each stage: 1 for the first, or the share of key frames."""
        computed = self.computed
        return tuple(float(np.mean((self.exits >= stage) & computed)) for stage in range(self.stages))

    @property
    def computed(self) -> NDArray[np.bool_]:
        """Whether the network looked at an image, `(n,)`; at a frame that is no key frame it did not."""
        own = np.arange(len(self.exits))
        computed: NDArray[np.bool_] = own == (own if self.answering is None else self.answering)
        return computed

    @property
    def leaving(self) -> tuple[float, ...]:
        """The share of images that leaves at each exit and, last, goes to the end."""
        return tuple(float(np.mean(self.exits == stage)) for stage in range(self.stages))


def ask(opened: Opened, stages: int, data: LabelledImages, batch: int, reuse: Reuse | None = None) -> Answers:
    """Returns what an artifact of `stages` stages answers, in batches of the size that is deployed.

    Args:
        opened: the artifact.
        stages: how many it has.
        data: images, or a stream.
        batch: how many are computed at once; of a stream, one.
        reuse: which frames of a stream are computed; all of them where not given.
    """
    if isinstance(data, Stream):
        return _ask_stream(opened, stages, data, reuse)
    logits, exits = opened.answer(data.images, batch)
    classes = logits.argmax(axis=1)
    batches = [exits[start : start + batch] for start in range(0, len(exits), batch)]
    return Answers(classes, classes == data.labels, exits, stages, _profiles(batches, batch, stages))


def _ask_stream(opened: Opened, stages: int, stream: Stream, reuse: Reuse | None) -> Answers:
    """Returns what is answered to each frame; only key frames are computed, one at a time."""
    answering = stream.key_frames(reuse)
    keys, given = np.unique(answering, return_inverse=True)
    parts = [opened.answer(stream.images[keys[at : at + _AT_ONCE]], 1) for at in range(0, len(keys), _AT_ONCE)]
    logits = np.concatenate([part for part, _ in parts])
    exits = np.concatenate([part for _, part in parts])
    classes = logits.argmax(axis=1)[given]
    # The last of each kind, because the first frame of all has no key frame before it.
    kinds = [(int(keys[exits == left][-1]), int((exits == left).sum())) for left in np.unique(exits)]
    correct = classes == stream.labels
    return Answers(classes, correct, exits[given], stages, tuple(kinds), answering, stream.clips)


def _profiles(exits: list[NDArray[np.int64]], batch: int, stages: int) -> tuple[tuple[int, int], ...]:
    """Returns batches that shrink differently: on a dense runtime, only how many go on decides what a batch costs."""
    full = [left for left in exits if len(left) == batch] or exits
    shrinking = [tuple(int((left >= stage).sum()) for stage in range(stages)) for left in full]
    counts = Counter(shrinking)
    return tuple((shrinking.index(profile) * batch, counts[profile]) for profile in counts)


class Deployed:
    """One candidate as it would run on the target.

    The artifact is loaded, and asked about the validation images, when an evaluator first needs it.

    Args:
        candidate: the version.
        artifact: what would be deployed.
        validation: what it is scored on.
        runtime: what runs it.
        target: batch size and threads.
    """

    def __init__(
        self,
        candidate: Candidate,
        artifact: Artifact,
        validation: LabelledImages,
        runtime: Runtime,
        target: Target,
    ) -> None:
        self.candidate = candidate
        self.artifact = artifact
        self.validation = validation
        self.target = target
        self._runtime = runtime

    @cached_property
    def opened(self) -> Opened:
        """The artifact, loaded into the runtime."""
        made = self.artifact
        return self._runtime.open(made.deployed, made.thresholds, self.target.threads, made.confidence)

    def answers_to(self, data: LabelledImages) -> Answers:
        """Returns what the artifact says to some images."""
        return ask(self.opened, len(self.artifact.deployed), data, self.target.batch, self.artifact.reuse)

    @cached_property
    def answers(self) -> Answers:
        """What the artifact says to the validation images."""
        return self.answers_to(self.validation)


class Subject(Deployed):
    """One candidate, in torch too.

    Args:
        network: compressed and recovered.
        candidate: the version.
        artifact: what would be deployed.
        validation: what it is scored on.
        runtime: what runs it.
        target: batch size and threads.
    """

    def __init__(
        self,
        network: ExitNetwork,
        candidate: Candidate,
        artifact: Artifact,
        validation: LabelledImages,
        runtime: Runtime,
        target: Target,
    ) -> None:
        super().__init__(candidate, artifact, validation, runtime, target)
        self.network = network


class Evaluator(Protocol):
    """Measures one metric of a subject."""

    metric: str

    def measure(self, subject: Subject) -> Measurement:
        """Returns the measured value, in SI units, and how it came to be."""
        ...
