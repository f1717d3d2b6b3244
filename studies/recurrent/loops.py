"""Runs recurrent networks step by step, where a step need not be taken; it needs numpy only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from evaluators.inference.staged import Floats

File = Callable[..., Sequence["Floats"]]
"""A file of a network: from its inputs, in their order, to its outputs."""


class Read(NamedTuple):
    """What a loop has to say of one sequence.

    Args:
        logits: `(classes,)`.
        updates: at which steps the state was updated, `(t,)`.
    """

    logits: Floats
    updates: NDArray[np.bool_]


Loop = Callable[["Floats"], Read]
"""Reads a sequence `(t, 1, features)`."""


class EveryStep:
    """The loop that skips nothing.

    Args:
        step: gives the state `(1, 1, hidden)` that inputs `(1, 1, features)` and a state lead to.
        head: gives the logits of a state.
        hidden: values of the state.
    """

    def __init__(self, step: File, head: File, hidden: int) -> None:
        self._step, self._head = step, head
        self._first = np.zeros((1, 1, hidden), np.float32)

    def __call__(self, sequence: Floats) -> Read:
        """Returns what is said of a sequence `(t, 1, features)`."""
        state = self._first
        for index in range(len(sequence)):
            state = self._step(sequence[index : index + 1], state)[0]
        return Read(self._head(state)[0].reshape(-1), np.ones(len(sequence), np.bool_))


class SkipLoop:
    """The loop of a Skip RNN: each update tells how many steps are to be passed over, of which nothing is then read.

    Args:
        step: gives the state and the increment `(1, 1, 1)` of the probability of an update.
        head: gives the logits of a state.
        hidden: values of the state.
    """

    def __init__(self, step: File, head: File, hidden: int) -> None:
        self._step, self._head = step, head
        self._first = np.zeros((1, 1, hidden), np.float32)

    def __call__(self, sequence: Floats) -> Read:
        """Returns what is said of a sequence `(t, 1, features)`."""
        state = self._first
        index = 0
        length = len(sequence)
        updates = np.zeros(length, np.bool_)
        while index < length:
            state, increment = self._step(sequence[index : index + 1], state)
            updates[index] = True
            index += 1 + steps_to_skip(increment.item(), length)
        return Read(self._head(state)[0].reshape(-1), updates)


class PredictedLoop:
    """The loop of a network beside a predictor, which is asked at every step.

    Args:
        step: gives the state that inputs and a state lead to.
        head: gives the logits of a state.
        predictor: gives the probability `(1, 1, 1)` that an update can be skipped, from inputs and a state.
        hidden: values of the state.
        threshold: the probability above which it is.
    """

    def __init__(self, step: File, head: File, predictor: File, hidden: int, threshold: float) -> None:
        self._step = step
        self._head = head
        self._predictor = predictor
        self._threshold = threshold
        self._first = np.zeros((1, 1, hidden), np.float32)

    def __call__(self, sequence: Floats) -> Read:
        """Returns what is said of a sequence `(t, 1, features)`."""
        state, updates = self._first, np.zeros(len(sequence), np.bool_)
        for index in range(len(sequence)):
            inputs = sequence[index : index + 1]
            if self._predictor(inputs, state)[0].item() <= self._threshold:
                state = self._step(inputs, state)[0]
                updates[index] = True
        return Read(self._head(state)[0].reshape(-1), updates)


def steps_to_skip(increment: float, most: int) -> int:
    """Returns how many steps come between an update and the next one, at most `most`.

    It is how often the increment has to be added up until the sum rounds to 1, without the last time. That is summed in
    single precision, as the network was trained, for where the sum is a half its rounding decides.

    Args:
        increment: of the probability, 0 to 1.
        most: steps that are left.
    """
    step = np.float32(increment)
    total = np.float32(increment)
    count = 0
    while total <= 0.5 and count < most:
        total, count = total + step, count + 1
    return count
