"""Runs networks whose inputs may leave early or skip blocks; copied into bundles, so it needs numpy only."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Routes = NDArray[np.int64]
"""For each input, the exit that answered it and the blocks that it skipped, encoded in one integer, `(n,)`."""
Network = Callable[[Floats], tuple[Floats, Routes]]

NEVER, ALWAYS = 2.0, -1.0
"""Thresholds that no confidence and that every confidence reaches, to force an exit path."""
EXIT_BITS = 8
"""The low bits of a route are the index of the exit that answered; each higher bit is one skipped block."""


@dataclass(frozen=True)
class Step:
    """One step through a network whose inputs may leave early or skip blocks.

    Its file returns the features for the next step, the logits of the exit at its end, and the logit of the next step's
    gate, in this order, as far as they exist. The file of the last step returns the network's logits.

    Args:
        stage: the index of the file that it runs.
        exit: the confidence from which the exit at its end answers; None without an exit.
        skip: the gate's logit from which an input runs this step instead of skipping it; None if all inputs run it.
        gate: the index of a file with the gate alone, for inputs whose gate logit the step before did not return; None
            if that step always returns it.
        keeps: whether its file returns no features, because the next step reads the same features as this one.
    """

    stage: int
    exit: float | None = None
    skip: float | None = None
    gate: int | None = None
    keeps: bool = False


Steps = Sequence["float | Step"]
"""How stages are run: the confidence threshold of each exit, if they run one after the other; or steps."""


def steps_of(plan: Steps, stages: int) -> tuple[Step, ...]:
    """Returns a plan as steps.

    Raises:
        ValueError: the number of thresholds is not the number of stages less one.
    """
    steps = tuple(step for step in plan if isinstance(step, Step))
    if steps:
        return steps
    if stages != len(plan) + 1:
        raise ValueError(f"there is one threshold per exit, got {len(plan)} for {stages} stages")
    exits = [float(threshold) for threshold in plan if not isinstance(threshold, Step)]
    return (*(Step(index, threshold) for index, threshold in enumerate(exits)), Step(len(exits)))


def leaving_at(plan: Steps, index: int) -> Steps:
    """Returns the plan with which every input leaves at the exit of an index, 0 being the first exit."""
    exits_before = 0
    forced: list[float | Step] = []
    for step in plan:
        has_exit = not isinstance(step, Step) or step.exit is not None
        threshold = NEVER if exits_before < index else ALWAYS
        exits_before += has_exit
        forced.append(replace(step, exit=threshold if has_exit else None) if isinstance(step, Step) else threshold)
    return tuple(forced)


def longest(plan: Steps) -> Steps:
    """Returns the plan of the longest path: no exit answers, every block is run, gates and heads are computed."""
    without_exits = leaving_at(plan, len(plan))
    return tuple(
        replace(step, skip=-np.inf) if isinstance(step, Step) and step.skip is not None else step
        for step in without_exits
    )


def to_json(plan: Steps) -> list[Any]:
    """Returns a plan, JSON-ready."""
    return [asdict(step) if isinstance(step, Step) else step for step in plan]


def from_json(content: Sequence[Any]) -> tuple[float | Step, ...]:
    """Returns the plan that `to_json` wrote."""
    return tuple(Step(**step) if isinstance(step, dict) else float(step) for step in content)


def exits_of(routes: Routes) -> Routes:
    """Returns the index of the exit that answered each input, `(n,)`; the last index is the end of the network."""
    exits: Routes = routes & (1 << EXIT_BITS) - 1
    return exits


def skipped_of(routes: Routes, blocks: int) -> NDArray[np.bool_]:
    """Returns which blocks each input skipped, `(n, blocks)`; False for blocks after its exit."""
    return (routes[:, None] >> EXIT_BITS + np.arange(blocks) & 1).astype(bool)


class _Batch:
    """The state of a batch between two steps.

    Args:
        images: the inputs.
        exits: the number of exits.
    """

    def __init__(self, images: Floats, exits: int) -> None:
        self.features = images
        self.gate: Floats | None = None  # the next gate's logits, nan where unknown
        self.remaining = np.arange(len(images))  # the indices of inputs that have not left
        self.routes = np.full(len(images), exits, dtype=np.int64)
        self.exit_logits: list[Floats] = []  # of each exit, for the inputs that reached it
        self._answers: Floats | None = None  # the logits of inputs that have left
        self._exits_ahead = exits

    def leave(self, logits: Floats, leaves: NDArray[np.bool_]) -> None:
        """Removes the inputs that leave at the next exit, and keeps its logits as their answers."""
        self.exit_logits.append(logits)
        self._answers = logits if self._answers is None else self._answers
        gone, stay = self.remaining[leaves], ~leaves
        self._answers[gone] = logits[leaves]
        self.routes[gone] -= self._exits_ahead  # from the index of the end to that of this exit
        self._exits_ahead -= 1
        self.remaining, self.features = self.remaining[stay], self.features[stay]
        self.gate = None if self.gate is None else self.gate[stay]

    def answered(self) -> tuple[Floats, Routes]:
        """Returns the logits of all inputs and their routes, after the last step, whose output is the last logits."""
        if self._answers is None:
            return self.features, self.routes
        if len(self.remaining):
            self._answers[self.remaining] = self.features
        return self._answers, self.routes


_FEW_CLASSES = 64
"""Up to this number of logits, the confidence of one input is computed faster with Python floats than with arrays."""


class StagedNetwork:
    """A network with early exits and gates that skip blocks.

    Args:
        stages: its files, each a function of a batch. Without gates each returns `[features, logits]`, the last one
            `[logits]`; with gates see `Step`.
        plan: the confidence threshold of each exit; or steps.
        confidence: the measure of confidence, a name in `CONFIDENCES`.
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
        """Returns the logits `(n, classes)` and the routes `(n,)`; without gates a route is the index of the exit.

        Inputs that stay are computed together in a smaller batch, and so are those that run a block.
        """
        if len(self.stages) == 1:
            return self.stages[0](images)[0], np.zeros(len(images), dtype=np.int64)
        if len(images) == 1:
            return self._answer_one(images)
        return self._run_steps(_Batch(images, self._exits)).answered()

    def _answer_one(self, image: Floats) -> tuple[Floats, Routes]:
        """Returns the same as `__call__` for a single input, without indexing into arrays.

        The indexing took a tenth of a ResNet-20's time for each exit.
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
            outputs = self.stages[step.stage](features)
            position = 0 if step.keeps else 1
            features = features if step.keeps else outputs[0]
            if step.exit is not None:
                if self._confidence_of_input(outputs[position]) >= step.exit:
                    return outputs[position], np.array([route])
                position += 1
                route += 1
            gate = outputs[position] if len(outputs) > position else None
        return features, np.array([route])

    def _confidence_of_input(self, logits: Floats) -> float:
        """Returns an exit's confidence for a single input, from logits `(1, classes)`."""
        few = logits.shape[1] <= _FEW_CLASSES
        return self._confidence_of_one(logits[0].tolist()) if few else float(self._confidence(logits)[0])

    def all_logits(self, images: Floats) -> Floats:
        """Returns the logits of every exit and, last, of the end, `(n, exits + 1, classes)`: no input leaves early.

        Gates skip blocks as usual.
        """
        without_exits = StagedNetwork(self.stages, leaving_at(self.plan, len(self.plan)))
        batch = without_exits._run_steps(_Batch(images, self._exits))
        return np.stack([*batch.exit_logits, batch.features], axis=1)

    def _run_steps(self, batch: _Batch) -> _Batch:
        """Returns the batch after its last step, or once all inputs have left."""
        for step in self.steps:
            if step.skip is None:
                self._run_all(step, batch)
            else:
                self._run_some(step, batch, step.skip)
            if not len(batch.remaining):
                break
        return batch

    def _run_all(self, step: Step, batch: _Batch) -> None:
        """Runs a step on every input, and removes those that its exit answers."""
        outputs = list(self.stages[step.stage](batch.features))
        if not step.keeps:
            batch.features = outputs.pop(0)
        gate = outputs[0 if step.exit is None else 1 :]
        batch.gate = gate[0][:, 0] if gate else None
        if step.exit is not None:
            batch.leave(outputs[0], self._confidence(outputs[0]) >= step.exit)

    def _run_some(self, step: Step, batch: _Batch, threshold: float) -> None:
        """Runs a block on the inputs whose gate logit reaches the threshold; the features of the others stay."""
        runs = self._gate_logits(step, batch) >= threshold
        batch.routes[batch.remaining[~runs]] |= self._bits[step.stage]
        batch.gate = None
        if runs.all():
            batch.features, *gate = self.stages[step.stage](batch.features)
            batch.gate = gate[0][:, 0] if gate else None
        elif runs.any():
            block_features, *gate = self.stages[step.stage](batch.features[runs])
            batch.features = batch.features.copy()
            batch.features[runs] = block_features
            if gate:
                batch.gate = np.full(len(runs), np.nan, dtype=np.float32)
                batch.gate[runs] = gate[0][:, 0]

    def _gate_logits(self, step: Step, batch: _Batch) -> Floats:
        """Returns the gate's logit of each input, `(n,)`: from the step before, or from the file of the gate alone."""
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
    difference: Floats = (1.0 - second) / shifted.sum(axis=1)
    return difference


def certainty(logits: Floats) -> Floats:
    """Returns 1 minus the normalised entropy of each row's softmax, 0 to 1, `(n,)`.

    Source: Teerapittayanon et al., BranchyNet, 2016, which compares the entropy itself with a threshold.
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
"""Every measure of an exit's confidence, 0 to 1, from logits `(n, classes)`, by its name in studies and bundles."""


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
"""The same for the logits of one input, as a list; they differ by rounding, for which thresholds have a margin."""
