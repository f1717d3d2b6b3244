"""Recurrent networks as they are deployed: one step in a file, in a loop that runs it where the state is updated."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evaluators.artifact.exporter import exported
from evaluators.runtimes.ort import load
from evaluators.timing import Clock, PairedTiming, Protocol, time_pair, turns_of
from spaces.recurrent.classifier import RecurrentClassifier
from spaces.recurrent.predictor import SkipPredictor
from spaces.recurrent.skiprnn import SkipRnn, steps_to_skip

Sequence = NDArray[np.float32]
"""`(steps, features)`."""


@dataclass(frozen=True)
class Read:
    """What reading one sequence came to.

    Args:
        logits: `(classes,)`.
        updates: how many steps updated the state.
    """

    logits: NDArray[np.float32]
    updates: int


Reader = Callable[[Sequence], Read]
"""Reads a sequence, one at a time."""


class _Step(nn.Module):
    """One update: the input and the state side by side come in, the next state and an increment go out."""

    def __init__(self, network: RecurrentClassifier, gate: nn.Linear | None) -> None:
        super().__init__()
        self.cell, self.gate, self.features = network.cell, gate, network.cell.input_size

    def forward(self, both: Tensor) -> tuple[Tensor, ...]:
        """Returns the next state `(n, d)`, and with a gate the increment `(n, 1)`."""
        state = self.cell(both[:, : self.features], both[:, self.features :])
        return (state,) if self.gate is None else (state, torch.sigmoid(self.gate(state)))


class _Whole(nn.Module):
    """The same network as one operator over all steps."""

    def __init__(self, network: RecurrentClassifier) -> None:
        super().__init__()
        cell = network.cell
        self.recurrent = nn.GRU(cell.input_size, cell.hidden_size, batch_first=True)
        own = cell.state_dict()
        self.recurrent.load_state_dict({f"{name}_l0": value for name, value in own.items()})
        self.classifier = network.classifier

    def forward(self, sequences: Tensor) -> Tensor:
        """Returns logits `(n, classes)` for sequences `(n, steps, features)`."""
        states, _ = self.recurrent(sequences)
        logits: Tensor = self.classifier(states[:, -1])
        return logits


def _file(module: nn.Module, example: Tensor, outputs: list[str]) -> bytes:
    return cast(bytes, exported(module.eval(), (example,), outputs).SerializeToString())


class StepLoop:
    """A recurrent classifier in ONNX Runtime that may leave out updates, and runs nothing where it does.

    Args:
        network: in evaluation mode.
        skips: what tells which updates are made: a Skip RNN of the network, or a predictor; all are, without.
        threshold: of the predictor: an update is made where it tells at least so much.
    """

    def __init__(
        self, network: RecurrentClassifier, skips: SkipRnn | SkipPredictor | None = None, threshold: float = 0.0
    ) -> None:
        self._hidden = network.cell.hidden_size
        both = torch.zeros(1, network.cell.input_size + self._hidden)
        gate = skips.gate if isinstance(skips, SkipRnn) else None
        self._step = load(_file(_Step(network, gate), both, ["state", "increment"][: 1 if gate is None else 2]), 1)
        self._answer = load(_file(network.classifier, torch.zeros(1, self._hidden), ["logits"]), 1)
        self._predict = None
        if isinstance(skips, SkipPredictor):
            self._predict = load(_file(skips, both, ["needed"]), 1)
        self._threshold = threshold
        self.calls = 0
        """How often the step has been run."""

    def __call__(self, sequence: Sequence) -> Read:
        """Returns the logits of a sequence, and how many updates it took."""
        state, updates, number = np.zeros(self._hidden, dtype=np.float32), 0, 0
        while number < len(sequence):
            both = np.concatenate([sequence[number], state])[None]
            number += 1
            if self._predict is not None and updates and self._predict(both)[0][0, 0] < self._threshold:
                continue
            found = self._step(both)
            state, updates = found[0][0], updates + 1
            if len(found) > 1:
                number += steps_to_skip(float(found[1][0, 0]), len(sequence) - number)
        self.calls += updates
        return Read(self._answer(state[None])[0][0], updates)


class WholeSequence:
    """The classifier as one file that reads all steps at once: what leaving out updates has to beat.

    Args:
        network: in evaluation mode.
        steps: of a sequence.
    """

    def __init__(self, network: RecurrentClassifier, steps: int) -> None:
        example = torch.zeros(1, steps, network.cell.input_size)
        self._run = load(_file(_Whole(network), example, ["logits"]), 1)

    def __call__(self, sequence: Sequence) -> Read:
        """Returns the logits of a sequence; it takes every update."""
        return Read(self._run(sequence[None])[0][0], len(sequence))


def time_readers(
    candidate: Reader, reference: Reader, sequences: NDArray[np.float32], protocol: Protocol
) -> PairedTiming:
    """Returns how long reading sequences takes beside another way to read the same ones.

    Args:
        candidate: one way.
        reference: the other.
        sequences: `(n, steps, features)`; a call reads all of them, one after the other.
        protocol: when to stop.
    """

    def all_by(reader: Reader) -> Callable[[], object]:
        return lambda: [reader(sequence) for sequence in sequences]

    clock = Clock.for_threads(1)
    turns = turns_of([all_by(candidate)], all_by(reference), protocol, clock)
    return time_pair(turns, [1.0], protocol, clock.wall)
