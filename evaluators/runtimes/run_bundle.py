"""Runs this network: python run.py [IMAGES.npz|IMAGES.npy].

Without a file it answers the bundle's own check images and compares with what was measured when the bundle was made.
A .npz holds `images` (n, c, h, w), float32, preprocessed as in training, and, to score them, `labels` (n,).
It needs onnxruntime and numpy, nothing else; a bundle with engines uses them where tensorrt runs. From Python:

    network = load("path/to/bundle")
    logits, routes = network(images)
    exits_of(routes), skipped_of(routes, blocks)
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Routes = NDArray[np.int64]
"""Of each input, the exit that answered it and the blocks that it passed by, in one number."""

ENGINES = "engines.json"


NEVER = 2.0
"""A confidence that no exit reaches."""
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


def longest(plan: Steps) -> Steps:
    """Returns the steps with which no exit answers and every block is run, gates and heads computed all the same."""
    return [
        replace(step, exit=None if step.exit is None else NEVER, skip=None if step.skip is None else -np.inf)
        if isinstance(step, Step)
        else NEVER
        for step in plan
    ]


def to_json(plan: Steps) -> list[Any]:
    """Returns the steps as JSON holds them."""
    return [asdict(step) if isinstance(step, Step) else step for step in plan]


def from_json(content: Sequence[Any]) -> Steps:
    """Returns the steps that `to_json` wrote."""
    return tuple(Step(**step) if isinstance(step, dict) else float(step) for step in content)


def exits_of(routes: Routes) -> Routes:
    """Returns the exit that answered each input, 0 being the first and the last index the end, `(n,)`."""
    return routes & (1 << EXIT_BITS) - 1


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
        self._answers: Floats | None = None
        self._left = exits

    def leave(self, logits: Floats, leaves: NDArray[np.bool_]) -> None:
        """Lets some of those that are waiting leave at the next exit, with its logits."""
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


class StagedNetwork:
    """A network whose early exits let easy inputs leave, and whose gates let inputs pass blocks by.

    Args:
        stages: its files, each a function of a batch. Without gates each gives `[features, logits]`, the last one
            `[logits]`; with gates, what their steps say.
        plan: the confidence (largest softmax probability) from which each exit answers; or steps.
    """

    def __init__(self, stages: Sequence[Callable[[Floats], Sequence[Floats]]], plan: Steps) -> None:
        self.stages = tuple(stages)
        self.steps = steps_of(plan, len(self.stages))
        self._exits = sum(step.exit is not None for step in self.steps)
        gated = [step for step in self.steps if step.skip is not None]
        self._bits = {step.stage: 1 << EXIT_BITS + index for index, step in enumerate(gated)}

    def __call__(self, images: Floats) -> tuple[Floats, Routes]:
        """Returns the logits `(n, classes)` and the routes `(n,)`: without gates the exits, 0 being the first.

        Inputs that stay go on together, in a smaller batch; so do, through a block, those that run it.
        """
        if len(self.stages) == 1:
            return self.stages[0](images)[0], np.zeros(len(images), dtype=np.int64)
        batch = _Batch(images, self._exits)
        for step in self.steps:
            if step.skip is None:
                self._run_all(step, batch)
            else:
                self._run_some(step, batch, step.skip)
            if not len(batch.waiting):
                break
        return batch.answered()

    def _run_all(self, step: Step, batch: _Batch) -> None:
        """Takes every input through a step, and lets those leave that the exit at its end is sure of."""
        given = list(self.stages[step.stage](batch.features))
        if not step.keeps:
            batch.features = given.pop(0)
        if step.exit is None:
            batch.gate = given[0][:, 0] if given else None
            return
        logits, *gate = given
        batch.gate = gate[0][:, 0] if gate else None
        batch.leave(logits, confidence(logits) >= step.exit)

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


def confidence(logits: Floats) -> Floats:
    """Returns the largest softmax probability of each row, `(n,)`."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    largest: Floats = 1.0 / shifted.sum(axis=1)
    return largest


def harmful_optimizers(model: bytes) -> list[str]:
    """Returns the optimizations of ONNX Runtime that would change the answers of an ONNX file.

    It takes a ReLU into the quantization behind it, which for fp8 drops the ReLU (seen in 1.32). What tells fp8 is the
    name that our writer gives its zero points.
    """
    return ["ReluQuantRewrite"] if b"/fp8/zero_point" in model else []


Network = Callable[[Floats], tuple[Floats, Routes]]


def load(folder: str | Path) -> Network:
    """Returns the bundle's network: its engines where it has them and TensorRT runs, else ONNX Runtime on the CPU."""
    bundle = Path(folder)
    description = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))
    engines = _load_engines(bundle, description) if (bundle / ENGINES).is_file() else None
    return engines or _load_sessions(bundle, description)


def _load_engines(bundle: Path, description: dict[str, Any]) -> Network | None:
    """Returns the network on the GPU; None, and a line on why, where it cannot run there."""
    sys.path.insert(0, str(bundle / "runtime.pyz"))
    try:
        from evaluators.runtimes.trt import TensorRT

        reason = TensorRT.missing()
        if reason is None:
            opened = TensorRT().open_engines((bundle / ENGINES).read_bytes(), bundle, description["thresholds"])
            return lambda images: opened.answer(images, description["target"]["batch"])
    except Exception as error:  # engines run on the kind of machine that they were built on, and on no other
        reason = " ".join(str(error).split())
    sys.stderr.write(f"the engines cannot be used here: {reason}; ONNX Runtime takes over\n")
    return None


def _load_sessions(bundle: Path, description: dict[str, Any]) -> StagedNetwork:
    """Returns the network on ONNX Runtime's CPU provider, with the threads it was measured with."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = description["target"]["threads"]
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    for name in description["deployed"]:
        if not (bundle / name).is_file():
            raise FileNotFoundError(2, "no such file", str(bundle / name))
    files = [(bundle / name).read_bytes() for name in description["deployed"]]
    sessions = [
        onnxruntime.InferenceSession(
            file, options, providers=["CPUExecutionProvider"], disabled_optimizers=harmful_optimizers(file)
        )
        for file in files
    ]
    stages = [
        lambda batch, session=session: session.run(None, {session.get_inputs()[0].name: batch}) for session in sessions
    ]
    return StagedNetwork(stages, from_json(description.get("plan", description["thresholds"])))


def answer(network: Network, images: Floats, batch: int) -> tuple[Floats, Routes, float]:
    """Returns logits, routes and the median seconds per full batch."""
    logits, routes, seconds = [], [], []
    for start in range(0, len(images), batch):
        begin = time.perf_counter()
        found, left = network(images[start : start + batch])
        seconds.append(time.perf_counter() - begin)
        logits.append(found)
        routes.append(left)
    full = seconds[: max(len(images) // batch, 1)]
    return np.concatenate(logits), np.concatenate(routes), float(np.median(full))


def read(path: Path) -> tuple[Floats, NDArray[np.int64] | None]:
    """Returns images and, where the file has them, labels."""
    try:
        content: Any = np.load(path)
    except (ValueError, EOFError) as error:
        raise ValueError(f"images come as .npz or .npy, got {str(path)!r}, which is neither") from error
    if path.suffix == ".npy":
        return np.asarray(content, dtype=np.float32), None
    labels = content["labels"] if "labels" in content.files else None
    return np.asarray(content["images"], dtype=np.float32), labels


def main() -> int:
    """Returns the exit code: 0, 1 when the check images are not answered as measured, 2 when something is missing."""
    try:
        return _run()
    except Exception as error:  # whatever a library raises on a file that it cannot read
        sys.stderr.write(f"run.py: {_reason(error)}\n")
        return 2


def _reason(error: Exception) -> str:
    """Returns one line on what is wrong with the images, the bundle or this machine."""
    said = " ".join(str(error).split())
    if isinstance(error, FileNotFoundError):
        return f"a file that exists, got {error.filename!r}; give another, or copy the whole bundle again"
    if isinstance(error, KeyError):
        return f"a .npz has `images`, and a bundle all that `pick` wrote, got none of {said}"
    if isinstance(error, ImportError):
        return f"a bundle needs onnxruntime and numpy, got {said!r}; pip install onnxruntime numpy"
    return said


def _run() -> int:
    parser = argparse.ArgumentParser(description="Run this network on images, or check it against its measurement.")
    parser.add_argument("images", nargs="?", type=Path, help=".npz with `images` and perhaps `labels`, or .npy")
    parser.add_argument("--predictions", type=Path, help="write the predicted class of each image to this .npy")
    arguments = parser.parse_args()
    bundle = Path(__file__).resolve().parent
    description = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))
    images, labels = read(arguments.images or bundle / "check.npz")
    wanted = tuple(description["image_shape"])
    if images.shape[1:] != wanted or not len(images):
        raise ValueError(f"images are (n, {', '.join(map(str, wanted))}) with n above 0, got {images.shape}")
    logits, routes, seconds = answer(load(bundle), images, description["target"]["batch"])
    classes = logits.argmax(axis=1)
    if arguments.predictions:
        np.save(arguments.predictions, classes)
    print(f"{len(images)} images, {seconds * 1e3:.2f} ms per batch of {description['target']['batch']} (median here)")
    for index, name in enumerate([*description["exits"], "end"]):
        print(f"  answered at {name}: {int((exits_of(routes) == index).sum())}")
    blocks = description.get("blocks", [])
    for block, passed in zip(blocks, skipped_of(routes, len(blocks)).T, strict=True):
        print(f"  passed {block} by: {int(passed.sum())}")
    correct = None if labels is None else int((classes == labels).sum())
    if correct is not None:
        print(f"  accuracy: {correct / len(images):.4%} ({correct}/{len(images)})")
    if arguments.images is None:
        measured = description["check"]["correct"]
        print(f"  measured when the bundle was made: {measured / len(images):.4%} ({measured}/{len(images)})")
        return 0 if correct == measured else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
