"""A candidate's artifact loaded on the target's runtime, and its predictions."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Protocol, Self

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

MAX_TIMED_PATHS = 24
"""Up to this many paths through the blocks are timed one by one; of more, this many batches are timed as a sample."""
_KEY_FRAME_BATCH = 64
"""How many key frames are read from the stream at a time."""


@dataclass(frozen=True)
class Answers:
    """An artifact's predictions for `n` images, and the path that each image took.

    Args:
        classes: the predicted class of each image, `(n,)`.
        correct: whether the prediction is right, `(n,)`.
        exits: the exit that answered each image, `(n,)`; 0 is the first exit, the last index the end of the network.
        stages: the number of parts that the exits divide the artifact into.
        profiles: one batch to time for each path, as `(index of its first image, number of batches on that path)`. For
            a stream, key frames only.
        skipped: the blocks that each image skipped, `(n, blocks)`; False for blocks after its exit.
        path_count: the number of different paths; larger than the number of profiles where there are too many paths to
            time each one.
        same_path: for each profile, the first images of the other batches that it stands for; empty for a stream.
        key_frames: for a stream, the index of the key frame whose prediction each frame reuses, `(n,)`; for a key frame
            that is its own index.
        clips: for a stream, the clip that each frame belongs to, `(n,)`.
    """

    classes: NDArray[np.int64]
    correct: NDArray[np.bool_]
    exits: NDArray[np.int64]
    stages: int
    profiles: tuple[tuple[int, int], ...]
    skipped: NDArray[np.bool_]
    path_count: int
    same_path: tuple[tuple[int, ...], ...] = ()
    key_frames: NDArray[np.int64] | None = None
    clips: NDArray[np.int64] | None = None

    @property
    def reach_shares(self) -> tuple[float, ...]:
        """The share of images that reaches each stage: 1 for the first stage, or the share of key frames."""
        computed = self.computed
        return tuple(float(np.mean((self.exits >= stage) & computed)) for stage in range(self.stages))

    @property
    def computed(self) -> NDArray[np.bool_]:
        """Whether the network was run on each image, `(n,)`; False for frames that reuse a key frame's prediction."""
        indices = np.arange(len(self.exits))
        computed: NDArray[np.bool_] = indices == (indices if self.key_frames is None else self.key_frames)
        return computed

    @property
    def exit_shares(self) -> tuple[float, ...]:
        """The share of images that each exit answers and, last, the share that runs to the end of the network."""
        return tuple(float(np.mean(self.exits == stage)) for stage in range(self.stages))


def predict(
    session: Session, stages: int, data: LabelledImages, batch: int, reuse: Reuse | None = None, blocks: int = 0
) -> Answers:
    """Returns an artifact's predictions for some images, computed in batches of the deployed size.

    Args:
        session: the loaded artifact.
        stages: the number of parts that its exits divide it into.
        data: images, or a stream.
        batch: the batch size; 1 for a stream.
        reuse: which frames of a stream reuse an earlier prediction; None computes every frame.
        blocks: the number of blocks that may be skipped.
    """
    if isinstance(data, Stream):
        return _predict_stream(session, stages, data, reuse, blocks)
    return _answers(session.answer(data.images, batch), stages, data.labels, batch, blocks)


def _answers(
    outputs: tuple[Images, Routes], stages: int, labels: NDArray[np.int64], batch: int, blocks: int
) -> Answers:
    """Returns predictions and paths from a session's logits `(n, classes)` and routes `(n,)`."""
    logits, routes = outputs
    classes = logits.argmax(axis=1)
    exits = exits_of(routes)
    skipped = skipped_of(routes, blocks)
    paths = _batch_paths(exits, skipped, batch, stages)
    representatives = _representatives(paths, stages)
    profiles = tuple((index * batch, len(others) + 1) for index, others in representatives)
    same_path = tuple(tuple(other * batch for other in others) for _, others in representatives)
    return Answers(classes, classes == labels, exits, stages, profiles, skipped, len(set(paths)), same_path)


def _predict_stream(session: Session, stages: int, stream: Stream, reuse: Reuse | None, blocks: int) -> Answers:
    """Returns the predictions for all frames of a stream; only key frames are computed, one at a time."""
    key_frames = stream.key_frames(reuse)
    keys, key_index = np.unique(key_frames, return_inverse=True)
    starts = range(0, len(keys), _KEY_FRAME_BATCH)
    parts = [session.answer(stream.images[keys[start : start + _KEY_FRAME_BATCH]], 1) for start in starts]
    logits = np.concatenate([part for part, _ in parts])
    routes = np.concatenate([part for _, part in parts])
    classes = logits.argmax(axis=1)[key_index]
    exits = exits_of(routes)
    skipped = skipped_of(routes, blocks)
    # In reverse, so that the very first frame, which no key frame precedes, represents a path only where it must.
    paths = _batch_paths(exits, skipped, 1, stages)[::-1]
    representatives = _representatives(paths, stages)
    profiles = tuple((int(keys[-1 - index]), len(others) + 1) for index, others in representatives)
    return Answers(
        classes,
        classes == stream.labels,
        exits[key_index],
        stages,
        profiles,
        skipped[key_index],
        len(set(paths)),
        key_frames=key_frames,
        clips=stream.clips,
    )


def _batch_paths(
    exits: NDArray[np.int64], skipped: NDArray[np.bool_], batch: int, stages: int
) -> list[tuple[int, ...]]:
    """Returns, for each full batch, how many images reach each stage, then how many skip each block.

    On a dense runtime only these counts decide how long a batch takes.
    """
    starts = range(0, max(len(exits) - batch, 0) + 1, batch)
    reached = [[int((exits[start : start + batch] >= stage).sum()) for stage in range(stages)] for start in starts]
    skips = [skipped[start : start + batch].sum(axis=0).tolist() for start in starts]
    return [tuple(counts + more) for counts, more in zip(reached, skips, strict=True)]


def _representatives(paths: Sequence[tuple[int, ...]], stages: int) -> list[tuple[int, tuple[int, ...]]]:
    """Returns the batches to time, each with the other batches that it stands for.

    Up to `MAX_TIMED_PATHS` paths, or without skippable blocks, it is one batch for each path. Of more paths, batches
    are sorted by how much they leave out (images that reach a stage, then skipped blocks) and divided into equal
    shares; the middle batch represents each share.
    """
    batches_by_path: dict[tuple[int, ...], list[int]] = {}
    for index, path in enumerate(paths):
        batches_by_path.setdefault(path, []).append(index)
    if len(batches_by_path) <= MAX_TIMED_PATHS or len(paths[0]) == stages:
        return [(first, tuple(others)) for first, *others in batches_by_path.values()]
    order = sorted(range(len(paths)), key=lambda index: (sum(paths[index][:stages]), -sum(paths[index][stages:])))
    shares = [share.tolist() for share in np.array_split(order, MAX_TIMED_PATHS)]
    return [(share.pop(len(share) // 2), tuple(share)) for share in shares]


class LoadedArtifact:
    """One candidate's artifact, as it would run on the target.

    The artifact is loaded, and run on the validation images, when an evaluator first needs it.

    Args:
        candidate: the version.
        artifact: the files that would be deployed.
        validation: the images that accuracy is measured on.
        runtime: the library that runs the artifact.
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
        self._first_outputs: list[tuple[Images, Routes]] = []

    @cached_property
    def session(self) -> Session:
        """The artifact, loaded into the runtime."""
        artifact = self.artifact
        opened = partial(self._runtime.open, artifact.deployed, artifact.plan, self.target.threads, artifact.confidence)
        # A runtime of the user's own may come from before there were input sizes.
        return opened() if artifact.input_size is None else opened(input_size=artifact.input_size)

    def answers_to(self, data: LabelledImages) -> Answers:
        """Returns the artifact's predictions for some images."""
        artifact = self.artifact
        stages, blocks = len(artifact.exits) + 1, len(artifact.blocks)
        return predict(self.session, stages, data, self.target.batch, artifact.reuse, blocks)

    def first_answers(self, count: int) -> Answers:
        """Returns the predictions for the first validation images; `answers` computes only the rest after that.

        Args:
            count: the number of images, a multiple of the batch size. Not for streams.
        """
        self._first_outputs = [self._outputs(0, count)]
        return self._joined(self._first_outputs)

    def known(self, outputs: tuple[Images, Routes]) -> Self:
        """Returns the artifact with its logits and routes for all validation images, which are then not computed."""
        self._first_outputs = [outputs]
        return self

    def _outputs(self, start: int, end: int) -> tuple[Images, Routes]:
        """Returns logits and routes of the validation images from `start` to `end`."""
        images = self.validation.some(np.arange(start, end)).images
        return self.session.answer(images, self.target.batch)

    def _joined(self, parts: Sequence[tuple[Images, Routes]]) -> Answers:
        logits, routes = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        labels = self.validation.labels[: len(logits)]
        stages, blocks = len(self.artifact.exits) + 1, len(self.artifact.blocks)
        return _answers((logits, routes), stages, labels, self.target.batch, blocks)

    @cached_property
    def answers(self) -> Answers:
        """The artifact's predictions for the validation images."""
        if not self._first_outputs:
            return self.answers_to(self.validation)
        known, count = len(self._first_outputs[0][0]), len(self.validation)
        rest = [self._outputs(known, count)] if known < count else []
        return self._joined([*self._first_outputs, *rest])


class DeployedCandidate(LoadedArtifact):
    """One candidate with both its artifact and its torch network.

    Args:
        network: the torch network, compressed and recovered.
        candidate: the version.
        artifact: the files that would be deployed.
        validation: the images that accuracy is measured on.
        runtime: the library that runs the artifact.
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
    """Measures one metric of a deployed candidate."""

    metric: str

    def measure(self, subject: DeployedCandidate) -> Measurement:
        """Returns the measured value, in SI units, with the protocol of the measurement."""
        ...
