"""What evaluators look at: one compressed network, its artifact, and what it answers."""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from evaluators.artifact import Artifact
from evaluators.data import LabelledImages
from evaluators.measurement import Measurement
from evaluators.target import Opened, Runtime, Target
from spaces.candidate import Candidate
from spaces.network import ExitNetwork


@dataclass(frozen=True)
class Answers:
    """What an artifact said to a set of images.

    Args:
        classes: the predicted class of each image.
        correct: whether it is right.
        exits: the exit that answered, 0 being the first and the last index the end.
        stages: how many stages the artifact has.
        profiles: for each way in which a batch shrinks on its way, one batch that does, as `(first image, batches)`.
    """

    classes: NDArray[np.int64]
    correct: NDArray[np.bool_]
    exits: NDArray[np.int64]
    stages: int
    profiles: tuple[tuple[int, int], ...]

    @property
    def reached(self) -> tuple[float, ...]:
        """The share of images that reaches each stage, 1 for the first."""
        return tuple(float(np.mean(self.exits >= stage)) for stage in range(self.stages))

    @property
    def leaving(self) -> tuple[float, ...]:
        """The share of images that leaves at each exit and, last, goes to the end."""
        return tuple(float(np.mean(self.exits == stage)) for stage in range(self.stages))


def ask(opened: Opened, stages: int, data: LabelledImages, batch: int) -> Answers:
    """Returns what an artifact of `stages` stages answers, in batches of the size that is deployed."""
    logits, exits = opened.answer(data.images, batch)
    classes = logits.argmax(axis=1)
    batches = [exits[start : start + batch] for start in range(0, len(exits), batch)]
    return Answers(classes, classes == data.labels, exits, stages, _profiles(batches, batch, stages))


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
        return ask(self.opened, len(self.artifact.deployed), data, self.target.batch)

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
