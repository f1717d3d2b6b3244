"""Runs networks whose inputs may leave early or pass blocks by; a bundle brings this file, which needs numpy only."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Routes = NDArray[np.int64]
"""Of each input, the exit that answered it and the blocks that it passed by, in one number."""
Network = Callable[[Floats], tuple[Floats, Routes]]

NEVER, ALWAYS = 2.0, -1.0
"""Thresholds that no confidence and every confidence reaches, for timing a path."""
EXIT_BITS = 8
"""A route's low bits are the exit that answered; each one above them is a block that was skipped."""


@dataclass(frozen=True)
class Step:
    """One step through a network whose inputs may leave early or pass a block by.

    Its file returns the features for the next step, the logits of the exit at its end, and the logit of the next step's
    gate, as far as there are such. The last one returns the network's logits.

    Args:
        stage: the file that it runs.
        exit: the confidence from which the exit at its end answers; None where there is none.
        skip: the logit from which inputs run it and do not pass it by; None where all of them run it.
        gate: the file of its gate alone, for inputs whose gate the step before did not tell; None where it always does.
        keeps: whether its file returns no features, because the next step reads what this one read.
    """

    stage: int
    exit: float | None = None
    skip: float | None = None
    gate: int | None = None
    keeps: bool = False


Steps = Sequence["float | Step"]
"""How stages are run: one after the other, told by a confidence for each exit; or step by step."""


def steps_of(plan: Steps, stages: int) -> tuple[Step, ...]:
    """Returns the steps in full.

    Raises:
        ValueError: confidences, and not one for each stage but the last.
    """
    steps = tuple(step for step in plan if isinstance(step, Step))
    if steps:
        return steps
    if stages != len(plan) + 1:
        raise ValueError(f"there is one threshold per exit, got {len(plan)} for {stages} stages")
    exits = [float(threshold) for threshold in plan if not isinstance(threshold, Step)]
    return (*(Step(index, threshold) for index, threshold in enumerate(exits)), Step(len(exits)))


def leaving_at(plan: Steps, place: int) -> Steps:
    """Returns the plan with which every input leaves at one exit, 0 being the first, whatever it is like."""
    passed, found = 0, list[float | Step]()
    for step in plan:
        ends = not isinstance(step, Step) or step.exit is not None
        threshold = NEVER if passed < place else ALWAYS
        passed += ends
        found.append(replace(step, exit=threshold if ends else None) if isinstance(step, Step) else threshold)
    return tuple(found)


def longest(plan: Steps) -> Steps:
    """Returns the plan with which no exit answers and every block is run, gates and heads computed all the same."""
    nobody = leaving_at(plan, len(plan))
    return tuple(
        replace(step, skip=-np.inf) if isinstance(step, Step) and step.skip is not None else step for step in nobody
    )


def to_json(plan: Steps) -> list[Any]:
    """Returns a plan as JSON holds it."""
    return [asdict(step) if isinstance(step, Step) else step for step in plan]


def from_json(content: Sequence[Any]) -> tuple[float | Step, ...]:
    """Returns the plan that `to_json` wrote."""
    return tuple(Step(**step) if isinstance(step, dict) else float(step) for step in content)


def exits_of(routes: Routes) -> Routes:
    """Returns the exit that answered each input, 0 being the first and the last index the end, `(n,)`."""
    exits: Routes = routes & (1 << EXIT_BITS) - 1
    return exits


def skipped_of(routes: Routes, blocks: int) -> NDArray[np.bool_]:
    """Returns which blocks each input passed by, `(n, blocks)`; those behind its exit are not among them."""
    return (routes[:, None] >> EXIT_BITS + np.arange(blocks) & 1).astype(bool)


class _Batch:
    """Inputs on their way through the steps.

    Args:
        images: the inputs.
        exits: how many exits there are.
    """

    def __init__(self, images: Floats, exits: int) -> None:
        self.features = images
        self.gate: Floats | None = None  # the next gate's logits, as far as they are known; others are nan
        self.waiting = np.arange(len(images))
        self.routes = np.full(len(images), exits, dtype=np.int64)
        self.said: list[Floats] = []  # by each exit, to the inputs that reach it
        self._answers: Floats | None = None
        self._left = exits

    def leave(self, logits: Floats, leaves: NDArray[np.bool_]) -> None:
        """Lets some of those that are waiting leave at the next exit, with its logits."""
        self.said.append(logits)
        self._answers = logits if self._answers is None else self._answers
        gone, stay = self.waiting[leaves], ~leaves
        self._answers[gone] = logits[leaves]
        self.routes[gone] -= self._left  # they held the number of the end
        self._left -= 1
        self.waiting, self.features = self.waiting[stay], self.features[stay]
        self.gate = None if self.gate is None else self.gate[stay]

    def answered(self) -> tuple[Floats, Routes]:
        """Returns the logits, for those that are waiting the last features, and the routes."""
        if self._answers is None:
            return self.features, self.routes
        if len(self.waiting):
            self._answers[self.waiting] = self.features
        return self._answers, self.routes


_FEW_CLASSES = 64
"""Of so many logits Python's own floats tell the confidence sooner than arrays do."""


class StagedNetwork:
    """A network whose early exits let easy inputs leave, and whose gates let inputs pass blocks by.

    Args:
        stages: its files, each a function of a batch. Without gates each gives `[features, logits]`, the last one
            `[logits]`; with gates, what their steps say.
        plan: the confidence from which each exit answers; or steps.
        confidence: what tells it, a name in `CONFIDENCES`.
    """

    def __init__(
        self, stages: Sequence[Callable[[Floats], Sequence[Floats]]], plan: Steps, confidence: str = "softmax"
    ) -> None:
        self.stages = tuple(stages)
        self.plan = tuple(plan)
        self.steps = steps_of(plan, len(self.stages))
        self._confidence = CONFIDENCES[confidence]
        self._confidence_of_one = CONFIDENCES_OF_ONE[confidence]
        self._exits = sum(step.exit is not None for step in self.steps)
        gated = [step for step in self.steps if step.skip is not None]
        self._bits = {step.stage: 1 << EXIT_BITS + index for index, step in enumerate(gated)}

    def __call__(self, images: Floats) -> tuple[Floats, Routes]:
        """Returns the logits `(n, classes)` and the routes `(n,)`: without gates the exits, 0 being the first.

        Inputs that stay go on together, in a smaller batch; so do, through a block, those that run it.
        """
        if len(self.stages) == 1:
            return self.stages[0](images)[0], np.zeros(len(images), dtype=np.int64)
        if len(images) == 1:
            return self._answer_one(images)
        return self._through(_Batch(images, self._exits)).answered()

    def _answer_one(self, image: Floats) -> tuple[Floats, Routes]:
        """Returns what `__call__` does for a single input, without taking anything out of arrays or putting it back.

        That took as long as a tenth of a ResNet-20 for each exit.
        """
        features, route = image, 0
        gate: Floats | None = None
        for step in self.steps:
            if step.skip is not None:
                if gate is None:
                    assert step.gate is not None
                    gate = self.stages[step.gate](features)[0]
                runs, gate = gate[0, 0] >= step.skip, None
                if not runs:
                    route |= self._bits[step.stage]
                    continue
            given = self.stages[step.stage](features)
            at = 0 if step.keeps else 1
            features = features if step.keeps else given[0]
            if step.exit is not None:
                if self._certainty(given[at]) >= step.exit:
                    return given[at], np.array([route])
                at, route = at + 1, route + 1
            gate = given[at] if len(given) > at else None
        return features, np.array([route])

    def _certainty(self, logits: Floats) -> float:
        """Returns how sure an exit is of a single input."""
        few = logits.shape[1] <= _FEW_CLASSES
        return self._confidence_of_one(logits[0].tolist()) if few else float(self._confidence(logits)[0])

    def all_logits(self, images: Floats) -> Floats:
        """Returns what every exit and, last, the end says, `(n, exits + 1, classes)`: nobody leaves.

        Gates let inputs pass blocks by as ever.
        """
        nobody = StagedNetwork(self.stages, leaving_at(self.plan, len(self.plan)))
        batch = nobody._through(_Batch(images, self._exits))
        return np.stack([*batch.said, batch.features], axis=1)

    def _through(self, batch: _Batch) -> _Batch:
        for step in self.steps:
            if step.skip is None:
                self._run_all(step, batch)
            else:
                self._run_some(step, batch, step.skip)
            if not len(batch.waiting):
                break
        return batch

    def _run_all(self, step: Step, batch: _Batch) -> None:
        """Takes every input through a step, and lets those leave that the exit at its end is sure of."""
        given = list(self.stages[step.stage](batch.features))
        if not step.keeps:
            batch.features = given.pop(0)
        gate = given[0 if step.exit is None else 1 :]
        batch.gate = gate[0][:, 0] if gate else None
        if step.exit is not None:
            batch.leave(given[0], self._confidence(given[0]) >= step.exit)

    def _run_some(self, step: Step, batch: _Batch, threshold: float) -> None:
        """Takes the inputs through a block whose gate says so; the others stay as they are."""
        runs = self._gate(step, batch) >= threshold
        batch.routes[batch.waiting[~runs]] |= self._bits[step.stage]
        batch.gate = None
        if runs.all():
            batch.features, *gate = self.stages[step.stage](batch.features)
            batch.gate = gate[0][:, 0] if gate else None
        elif runs.any():
            made, *gate = self.stages[step.stage](batch.features[runs])
            batch.features = batch.features.copy()
            batch.features[runs] = made
            if gate:
                batch.gate = np.full(len(runs), np.nan, dtype=np.float32)
                batch.gate[runs] = gate[0][:, 0]

    def _gate(self, step: Step, batch: _Batch) -> Floats:
        """Returns the gate's logit of each input, `(n,)`: as the step before told it, or from the gate alone."""
        if step.gate is None and batch.gate is not None:
            return batch.gate
        known = np.full(len(batch.features), np.nan, dtype=np.float32) if batch.gate is None else batch.gate
        unknown = np.isnan(known)
        if step.gate is not None and unknown.any():
            known[unknown] = self.stages[step.gate](batch.features[unknown])[0][:, 0]
        return known


def largest_probability(logits: Floats) -> Floats:
    """Returns the largest softmax probability of each row, `(n,)`."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    largest: Floats = 1.0 / shifted.sum(axis=1)
    return largest


def margin(logits: Floats) -> Floats:
    """Returns by how much the largest softmax probability of each row exceeds the second, `(n,)`."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    second: Floats = np.partition(shifted, -2, axis=1)[:, -2]
    apart: Floats = (1.0 - second) / shifted.sum(axis=1)
    return apart


def certainty(logits: Floats) -> Floats:
    """Returns 1 less the entropy of each row's softmax as a share of the largest possible one, 0 to 1, `(n,)`.

    Source: Teerapittayanon et al., BranchyNet, 2016, which holds the entropy itself against a threshold.
    """
    shifted = logits - logits.max(axis=1, keepdims=True)
    weights = np.exp(shifted)
    total = weights.sum(axis=1)
    entropy = np.log(total) - (weights * shifted).sum(axis=1) / total
    certain: Floats = np.clip(1.0 - entropy / np.float32(np.log(logits.shape[1])), 0.0, 1.0)
    return certain


CONFIDENCES: dict[str, Callable[[Floats], Floats]] = {
    "softmax": largest_probability,
    "margin": margin,
    "entropy": certainty,
}
"""What tells how sure an exit is, from logits `(n, classes)`: 0 to 1, by the name that a study and a bundle give it."""


def _largest_probability_of_one(logits: Sequence[float]) -> float:
    highest = max(logits)
    return 1.0 / sum([math.exp(logit - highest) for logit in logits])


def _margin_of_one(logits: Sequence[float]) -> float:
    *_, second, highest = sorted(logits)
    return (1.0 - math.exp(second - highest)) * _largest_probability_of_one(logits)


def _certainty_of_one(logits: Sequence[float]) -> float:
    highest = max(logits)
    shifted = [logit - highest for logit in logits]
    weights = [math.exp(logit) for logit in shifted]
    total = sum(weights)
    entropy = math.log(total) - sum([weight * logit for weight, logit in zip(weights, shifted, strict=True)]) / total
    return min(max(1.0 - entropy / math.log(len(logits)), 0.0), 1.0)


CONFIDENCES_OF_ONE: dict[str, Callable[[Sequence[float]], float]] = {
    "softmax": _largest_probability_of_one,
    "margin": _margin_of_one,
    "entropy": _certainty_of_one,
}
"""The same for the logits of a single input; the two differ by rounding, which thresholds leave room for."""
