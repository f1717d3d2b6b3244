"""What skipped updates of a recurrent network's state cost in accuracy and save in time, in the deployed loop."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluators.runtimes.onnxruntime_cpu import open_session
from evaluators.runtimes.paired_timing import Clock, PairedTiming, TimingProtocol, time_pair, turns_of
from studies.recurrent.loops import File, Loop

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Skimming:
    """What a loop did with labelled sequences.

    Args:
        correct: which answers were right, `(n,)`.
        updates: where the state was updated, `(n, t)`.
    """

    correct: NDArray[np.bool_]
    updates: NDArray[np.bool_]

    @property
    def accuracy(self) -> float:
        """The share of right answers."""
        return float(self.correct.mean())

    @property
    def updated(self) -> float:
        """The share of the steps that updated the state."""
        return float(self.updates.mean())


def skimming(loop: Loop, sequences: Floats, labels: NDArray[np.int64]) -> Skimming:
    """Returns what a loop does with sequences `(n, t, 1, features)` of these classes, one after the other."""
    found = [loop(sequence) for sequence in sequences]
    classes = np.array([read.logits.argmax() for read in found])
    return Skimming(classes == labels, np.stack([read.updates for read in found]))


def time_beside(
    loop: Loop, rival: Callable[[Floats], object], sequences: Floats, protocol: TimingProtocol, threads: int = 1
) -> PairedTiming:
    """Returns how long a loop takes for a sequence beside a rival that takes equally long for each.

    One sequence is timed for each number of updates, and counts as often as that number occurs.

    Args:
        loop: skips updates.
        rival: reads a sequence as well.
        sequences: `(n, t, 1, features)`.
        protocol: when to stop.
        threads: of the sessions.
    """
    counts = np.array([loop(sequence).updates.sum() for sequence in sequences])
    _, kinds, often = np.unique(counts, return_index=True, return_counts=True)
    clock, shares = Clock.for_threads(threads), often.tolist()
    calls = [lambda sequence=sequences[kind]: loop(sequence) for kind in kinds]
    turns = turns_of(calls, lambda: rival(sequences[0]), protocol, clock, shares)
    return time_pair(turns, shares, protocol, clock.wall)


def load_file(model: bytes, threads: int) -> "File":
    """Returns a file as a function from its inputs, in their order, to its outputs."""
    session = open_session(model, threads)
    inputs, names = [given.name for given in session.get_inputs()], [output.name for output in session.get_outputs()]

    def run(*given: NDArray[np.float32]) -> Sequence[NDArray[np.float32]]:
        outputs: Sequence[NDArray[np.float32]] = session.run(names, dict(zip(inputs, given, strict=True)))
        return outputs

    return run
