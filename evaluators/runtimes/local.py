"""Artifacts that run in this process."""

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np

from evaluators.inference.frame_reuse import FrameReuse
from evaluators.inference.staged import Network, Routes, StagedNetwork, Steps
from evaluators.runtimes.base import Follows, Images, Proof, Spent, TimedBatch
from evaluators.runtimes.paired_timing import Call, Clock, Protocol, TakeTurn, turns_of

if TYPE_CHECKING:
    from evaluators.data import ImageStore

LoadedStage = Callable[[Images], Sequence[Images]]


class LocallyOpened:
    """An artifact whose stages are functions of this process.

    Args:
        stages: each maps a batch to what its step wants.
        plan: the confidence from which each exit answers, or the steps.
        threads: that the stages use; it decides which clock tells their work.
        confidence: what the gates ask for.
        clock: to read; where not given, the one that goes with the threads.
    """

    def __init__(
        self,
        stages: Sequence[LoadedStage],
        plan: Steps,
        threads: int,
        confidence: str = "softmax",
        clock: Clock | None = None,
    ) -> None:
        self._network = StagedNetwork(stages, plan, confidence)
        self._kind = confidence
        self._clock = clock or Clock.for_threads(threads)

    def answer(self, images: "ImageStore", batch: int) -> tuple[Images, Routes]:
        """Returns the logits `(n, classes)` and the routes `(n,)` that led to them, from `batch` images at a time."""
        parts = [self._network(images[start : start + batch]) for start in range(0, len(images), batch)]
        return np.concatenate([logits for logits, _ in parts]), np.concatenate([routes for _, routes in parts])

    def all_logits(self, images: "ImageStore", batch: int) -> Images:
        """Returns what every exit and, last, the end says, `(n, exits + 1, classes)`: no image leaves early."""
        starts = range(0, len(images), batch)
        return np.concatenate([self._network.all_logits(images[start : start + batch]) for start in starts])

    def seconds(self, images: Images, calls: int) -> list[Spent]:
        """Returns what each of `calls` runs on one batch took."""
        taken = []
        for _ in range(calls):
            work, wall = self._clock.work(), self._clock.wall()
            self._network(images)
            taken.append(Spent(self._clock.work() - work, self._clock.wall() - wall))
        return taken

    def launches(self, images: Images) -> dict[str, float]:  # noqa: ARG002
        """Returns nothing: on a CPU there is one way to call."""
        return {}

    def turns(
        self,
        images: "ImageStore",
        batches: Sequence[TimedBatch],
        reference: "LocallyOpened",
        reference_batch: int,
        protocol: Protocol,
    ) -> TakeTurn:
        """Returns turns between some batches and the reference on the first `reference_batch` images, warmed up."""
        some = images[:reference_batch]
        calls = [self._call(images, batch) for batch in batches]
        shares = [batch.share for batch in batches]
        return turns_of(calls, lambda: reference._network(some), protocol, self._clock, shares)

    def proof(self, images: Images, precisions: Mapping[str, str]) -> Proof:  # noqa: ARG002
        """Returns an empty proof: a CPU runtime computes in the types that the file says."""
        return Proof()

    def _call(self, images: "ImageStore", batch: TimedBatch) -> Call:
        network = StagedNetwork(self._network.stages, batch.way(self._network.plan), self._kind)
        if batch.follows is not None:
            chosen = images[batch.start : batch.start + batch.count]
            return following(network, images[batch.follows.key : batch.follows.key + 1], chosen, batch.follows)
        starts = (batch.start, *batch.others)
        several = cycle([np.array(images[start : start + batch.count]) for start in starts])
        return lambda: network(next(several))


def following(network: Network, key: Images, frame: Images, follows: Follows) -> Call:
    """Returns a call that answers a frame as it is met in its stream, over and over.

    Args:
        network: that it is about.
        key: the last key frame, `(1, c, h, w)`.
        frame: the frame, `(1, c, h, w)`.
        follows: how long ago the key frame was, and what decides.
    """
    reuse = FrameReuse(network, follows.threshold, follows.max_age)
    last, _ = reuse.frame(key)

    def call() -> object:
        reuse.last, reuse.age = last, follows.age - 1  # the frame itself adds one
        return reuse.frame(frame)

    return call
