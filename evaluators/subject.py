"""What evaluators look at: one compressed network, its artifact, and what it answers."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from evaluators.artifact import Artifact
from evaluators.data import LabelledImages
from evaluators.measurement import Measurement
from evaluators.runtimes.staged import exits_of, skipped_of
from evaluators.target import Opened, Runtime, Target
from spaces.candidate import Candidate
from spaces.network import ExitNetwork

MOST_WAYS = 24
"""So many ways through blocks are timed each; where there are more, so many batches stand for all."""


@dataclass(frozen=True)
class Answers:
    """What an artifact said to a set of images.

    Args:
        classes: the predicted class of each image.
        correct: whether it is right.
        exits: the exit that answered, 0 being the first and the last index the end.
        stages: how many parts the exits divide the artifact into.
        profiles: for each way in which a batch shrinks on its way, one batch that does, as `(first image, batches)`.
        passed: the blocks that each image passed by, `(n, blocks)`; none behind its exit.
        ways: how many ways there are: more than profiles where there were too many to time each.
    """

    classes: NDArray[np.int64]
    correct: NDArray[np.bool_]
    exits: NDArray[np.int64]
    stages: int
    profiles: tuple[tuple[int, int], ...]
    passed: NDArray[np.bool_]
    ways: int

    @property
    def reached(self) -> tuple[float, ...]:
        """The share of images that reaches each stage, 1 for the first."""
        return tuple(float(np.mean(self.exits >= stage)) for stage in range(self.stages))

    @property
    def leaving(self) -> tuple[float, ...]:
        """The share of images that leaves at each exit and, last, goes to the end."""
        return tuple(float(np.mean(self.exits == stage)) for stage in range(self.stages))


def ask(opened: Opened, stages: int, data: LabelledImages, batch: int, blocks: int = 0) -> Answers:
    """Returns what an artifact answers, in batches of the size that is deployed.

    Args:
        opened: the artifact.
        stages: the parts that its exits divide it into.
        data: what it is asked.
        batch: images at a time.
        blocks: how many of its blocks may be skipped.
    """
    logits, routes = opened.answer(data.images, batch)
    classes, exits, passed = logits.argmax(axis=1), exits_of(routes), skipped_of(routes, blocks)
    ways = _ways(exits, passed, batch, stages)
    profiles = _profiles(ways, batch) if not blocks or len(set(ways)) <= MOST_WAYS else _strata(ways, batch, stages)
    return Answers(classes, classes == data.labels, exits, stages, profiles, passed, len(set(ways)))


def _ways(exits: NDArray[np.int64], passed: NDArray[np.bool_], batch: int, stages: int) -> list[tuple[int, ...]]:
    """Returns, for each full batch, how many images reach each stage and how many pass each block by.

    On a dense runtime, only these counts decide what a batch costs.
    """
    starts = range(0, max(len(exits) - batch, 0) + 1, batch)
    reached = [[int((exits[at : at + batch] >= stage).sum()) for stage in range(stages)] for at in starts]
    left_out = [passed[at : at + batch].sum(axis=0).tolist() for at in starts]
    return [tuple(some + more) for some, more in zip(reached, left_out, strict=True)]


def _profiles(ways: Sequence[tuple[int, ...]], batch: int) -> tuple[tuple[int, int], ...]:
    """Returns a batch of every way, and how often it occurs."""
    counts = Counter(ways)
    return tuple((ways.index(way) * batch, counts[way]) for way in counts)


def _strata(ways: Sequence[tuple[int, ...]], batch: int, stages: int) -> tuple[tuple[int, int], ...]:
    """Returns `MOST_WAYS` batches for equal shares of all: the middle ones, by how much they leave out.

    A batch leaves out the more, the fewer images reach its stages and, then, the more pass its blocks by.
    """
    order = sorted(range(len(ways)), key=lambda index: (sum(ways[index][:stages]), -sum(ways[index][stages:])))
    return tuple((int(part[len(part) // 2]) * batch, len(part)) for part in np.array_split(order, MOST_WAYS))


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
        return self._runtime.open(made.deployed, made.plan, self.target.threads, made.confidence)

    def answers_to(self, data: LabelledImages) -> Answers:
        """Returns what the artifact says to some images."""
        artifact = self.artifact
        return ask(self.opened, len(artifact.exits) + 1, data, self.target.batch, len(artifact.blocks))

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
