"""Artifacts that run in this process."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from evaluators.runtimes.run_bundle import Routes, StagedNetwork, Steps, longest
from evaluators.target import Images, Proof, Spent, TimedBatch
from evaluators.timing import Call, Clock, Protocol, TakeTurn, turns_of

if TYPE_CHECKING:
    from evaluators.data import ImageStore

LoadedStage = Callable[[Images], Sequence[Images]]


class LocallyOpened:
    """An artifact whose stages are functions of this process.

    Args:
        stages: each maps a batch to what its step wants.
        plan: the confidence from which each exit answers, or the steps.
        threads: that the stages use; it decides which clock tells their work.
    """

    def __init__(self, stages: Sequence[LoadedStage], plan: Steps, threads: int) -> None:
        self._network = StagedNetwork(stages, plan)
        self._longest = StagedNetwork(stages, longest(plan))
        self._clock = Clock.for_threads(threads)

    def answer(self, images: "ImageStore", batch: int) -> tuple[Images, Routes]:
        """Returns the logits `(n, classes)` and the routes `(n,)` that led to them, from `batch` images at a time."""
        parts = [self._network(images[start : start + batch]) for start in range(0, len(images), batch)]
        return np.concatenate([logits for logits, _ in parts]), np.concatenate([routes for _, routes in parts])

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
        return turns_of(calls, lambda: reference._network(some), protocol, self._clock)

    def proof(self, images: Images, precisions: Mapping[str, str]) -> Proof:  # noqa: ARG002
        """Returns an empty proof: a CPU runtime computes in the types that the file says."""
        return Proof()

    def _call(self, images: "ImageStore", batch: TimedBatch) -> Call:
        network = self._longest if batch.longest else self._network
        chosen = images[batch.start : batch.start + batch.count]
        return lambda: network(chosen)
