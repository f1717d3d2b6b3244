"""What evaluators look at: one compressed network, its artifact, and what it answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from evaluators.artifact import Artifact
from evaluators.data import LabelledImages
from evaluators.inference.frame_reuse import Reuse
from evaluators.inference.staged import Routes, exits_of, skipped_of
from evaluators.measurement import Measurement
from evaluators.runtimes.base import Images, Runtime, Session, Target
from evaluators.streams import Stream
from spaces.candidate import Candidate
from spaces.dynamic.exit_network import ExitNetwork

MOST_WAYS = 24
"""So many ways through blocks are timed each; where there are more, so many batches stand for all."""
_AT_ONCE = 64
"""So many key frames are gathered at a time."""


@dataclass(frozen=True)
class Answers:
    """What an artifact said to a set of images.

    Args:
        classes: the predicted class of each image.
        correct: whether it is right.
        exits: the exit that answered, 0 being the first and the last index the end.
        stages: how many parts the exits divide the artifact into.
        profiles: for each way in which a batch shrinks on its way, one batch that does, as `(first image, batches)`;
            of a stream, the key frames' only.
        passed: the blocks that each image passed by, `(n, blocks)`; none behind its exit.
        ways: how many ways there are: more than profiles where there were too many to time each.
        alike: for each profile, the first images of further batches that it stands for; none of a stream.
        answering: of a stream, the key frame whose answer each frame was given, `(n,)`; a key frame its own.
        clips: of a stream, the clip that each frame belongs to, `(n,)`.
    """

    classes: NDArray[np.int64]
    correct: NDArray[np.bool_]
    exits: NDArray[np.int64]
    stages: int
    profiles: tuple[tuple[int, int], ...]
    passed: NDArray[np.bool_]
    ways: int
    alike: tuple[tuple[int, ...], ...] = ()
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


def ask(
    opened: Session, stages: int, data: LabelledImages, batch: int, reuse: Reuse | None = None, blocks: int = 0
) -> Answers:
    """Returns what an artifact answers, in batches of the size that is deployed.

    Args:
        opened: the artifact.
        stages: the parts that its exits divide it into.
        data: images, or a stream.
        batch: how many are computed at once; of a stream, one.
        reuse: which frames of a stream are computed; all of them where not given.
        blocks: how many of its blocks may be skipped.
    """
    if isinstance(data, Stream):
        return _ask_stream(opened, stages, data, reuse, blocks)
    return _answers(opened.answer(data.images, batch), stages, data.labels, batch, blocks)


def _answers(said: tuple[Images, Routes], stages: int, labels: NDArray[np.int64], batch: int, blocks: int) -> Answers:
    """Returns what logits and routes to some images come to."""
    logits, routes = said
    classes = logits.argmax(axis=1)
    exits = exits_of(routes)
    passed = skipped_of(routes, blocks)
    ways = _ways(exits, passed, batch, stages)
    standing = _standing(ways, stages)
    profiles = tuple((stands * batch, len(others) + 1) for stands, others in standing)
    alike = tuple(tuple(at * batch for at in others) for _, others in standing)
    return Answers(classes, classes == labels, exits, stages, profiles, passed, len(set(ways)), alike)


def _ask_stream(opened: Session, stages: int, stream: Stream, reuse: Reuse | None, blocks: int) -> Answers:
    """Returns what is answered to each frame; only key frames are computed, one at a time."""
    answering = stream.key_frames(reuse)
    keys, given = np.unique(answering, return_inverse=True)
    parts = [opened.answer(stream.images[keys[at : at + _AT_ONCE]], 1) for at in range(0, len(keys), _AT_ONCE)]
    logits = np.concatenate([part for part, _ in parts])
    routes = np.concatenate([part for _, part in parts])
    classes = logits.argmax(axis=1)[given]
    exits = exits_of(routes)
    passed = skipped_of(routes, blocks)
    # From behind, because the first frame of all has no key frame before it.
    ways = _ways(exits, passed, 1, stages)[::-1]
    kinds = tuple((int(keys[-1 - stands]), len(others) + 1) for stands, others in _standing(ways, stages))
    correct, number = classes == stream.labels, len(set(ways))
    return Answers(classes, correct, exits[given], stages, kinds, passed[given], number, (), answering, stream.clips)


def _ways(exits: NDArray[np.int64], passed: NDArray[np.bool_], batch: int, stages: int) -> list[tuple[int, ...]]:
    """Returns, for each full batch, how many images reach each stage and how many pass each block by.

    On a dense runtime, only these counts decide what a batch costs.
    """
    starts = range(0, max(len(exits) - batch, 0) + 1, batch)
    reached = [[int((exits[at : at + batch] >= stage).sum()) for stage in range(stages)] for at in starts]
    left_out = [passed[at : at + batch].sum(axis=0).tolist() for at in starts]
    return [tuple(some + more) for some, more in zip(reached, left_out, strict=True)]


def _standing(ways: Sequence[tuple[int, ...]], stages: int) -> list[tuple[int, tuple[int, ...]]]:
    """Returns batches that stand for all, and the others that each stands for: of every way, or of equal shares.

    The latter are the middle ones, by how much they leave out: the more, the fewer images reach their stages and,
    then, the more pass their blocks by. Without blocks every way is timed.
    """
    found: dict[tuple[int, ...], list[int]] = {}
    for index, way in enumerate(ways):
        found.setdefault(way, []).append(index)
    if len(found) <= MOST_WAYS or len(ways[0]) == stages:
        return [(first, tuple(others)) for first, *others in found.values()]
    order = sorted(range(len(ways)), key=lambda index: (sum(ways[index][:stages]), -sum(ways[index][stages:])))
    parts = [part.tolist() for part in np.array_split(order, MOST_WAYS)]
    return [(part.pop(len(part) // 2), tuple(part)) for part in parts]


class LoadedArtifact:
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
        self._begun: list[tuple[Images, Routes]] = []

    @cached_property
    def session(self) -> Session:
        """The artifact, loaded into the runtime."""
        made = self.artifact
        return self._runtime.open(made.deployed, made.plan, self.target.threads, made.confidence)

    def answers_to(self, data: LabelledImages) -> Answers:
        """Returns what the artifact says to some images."""
        made = self.artifact
        return ask(self.session, len(made.exits) + 1, data, self.target.batch, made.reuse, len(made.blocks))

    def first_answers(self, count: int) -> Answers:
        """Returns what the artifact says to the first validation images; `answers` goes on from there.

        Args:
            count: how many, in whole batches; of images that come alone, not of a stream.
        """
        self._begun = [self._said(0, count)]
        return self._joined(self._begun)

    def _said(self, start: int, end: int) -> tuple[Images, Routes]:
        some = self.validation.some(np.arange(start, end))
        return self.session.answer(some.images, self.target.batch)

    def _joined(self, parts: Sequence[tuple[Images, Routes]]) -> Answers:
        logits, routes = (np.concatenate(each) for each in zip(*parts, strict=True))
        labels, made = self.validation.labels[: len(logits)], self.artifact
        return _answers((logits, routes), len(made.exits) + 1, labels, self.target.batch, len(made.blocks))

    @cached_property
    def answers(self) -> Answers:
        """What the artifact says to the validation images."""
        if not self._begun:
            return self.answers_to(self.validation)
        count = len(self._begun[0][0])
        return self._joined([*self._begun, self._said(count, len(self.validation))])


class DeployedCandidate(LoadedArtifact):
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

    def measure(self, subject: DeployedCandidate) -> Measurement:
        """Returns the measured value, in SI units, and how it came to be."""
        ...
