"""Runs this network: python run.py [IMAGES.npz|IMAGES.npy] [--stream FRAMES.npz].

Without a file it answers the bundle's own check images and compares with what was measured when the bundle was made.
A .npz holds `images` (n, c, h, w), float32, preprocessed as in training, and, to score them, `labels` (n,).
With --stream they are frames in their order, and those that hardly differ from the last key frame get its answer.
It needs onnxruntime and numpy, nothing else; a bundle with engines uses them where tensorrt runs. From Python:

    network = load("path/to/bundle")
    logits, exits = network(images)
    logits, exits, keys = follow("path/to/bundle")(frames)
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Network = Callable[[Floats], "tuple[Floats, NDArray[np.int64]]"]

CELLS = 8
"""A thumbnail has so many cells each way, or one a pixel where there are fewer."""
ENGINES = "engines.json"


class StagedNetwork:
    """A network whose early exits let easy inputs leave.

    Args:
        stages: each maps a batch to `[features, logits]`, the last one to `[logits]`.
        thresholds: the confidence (largest softmax probability) from which each exit answers.
    """

    def __init__(self, stages: Sequence[Callable[[Floats], Sequence[Floats]]], thresholds: Sequence[float]) -> None:
        if len(stages) != len(thresholds) + 1:
            raise ValueError(f"there is one threshold per exit, got {len(thresholds)} for {len(stages)} stages")
        self.stages = tuple(stages)
        self.thresholds = tuple(thresholds)

    def __call__(self, images: Floats) -> tuple[Floats, NDArray[np.int64]]:
        """Returns the logits `(n, classes)` and the exit `(n,)` that gave them, 0 being the first.

        Inputs that stay go on together, in a smaller batch.
        """
        if len(self.stages) == 1:
            logits = self.stages[0](images)[0]
            return logits, np.zeros(len(images), dtype=np.int64)
        answers: Floats | None = None
        exits = np.full(len(images), len(self.thresholds), dtype=np.int64)
        waiting = np.arange(len(images))
        features = images
        for index, threshold in enumerate(self.thresholds):
            features, logits = self.stages[index](features)
            answers = logits if answers is None else answers
            leaves = confidence(logits) >= threshold
            gone = waiting[leaves]
            answers[gone], exits[gone] = logits[leaves], index
            waiting, features = waiting[~leaves], features[~leaves]
            if not len(waiting):
                return answers, exits
        assert answers is not None
        answers[waiting] = self.stages[-1](features)[0]
        return answers, exits


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


class KeyFrame(NamedTuple):
    """A frame that was computed: its thumbnail, and what the network said."""

    thumbnail: Floats
    logits: Floats
    exits: NDArray[np.int64]


class FrameReuse:
    """A network for streams: a frame that hardly differs from the last key frame is answered as that was.

    Args:
        network: maps a batch of one to logits and exits.
        threshold: the `difference` from which a frame is a key frame; at 0 all are.
        max_age: so many frames after a key frame the next one is, whatever it looks like.
    """

    def __init__(self, network: Network, threshold: float, max_age: int) -> None:
        self.network = network
        self.threshold = threshold
        self.max_age = max_age
        self.last: KeyFrame | None = None
        self.age = 0

    def __call__(self, frames: Floats) -> tuple[Floats, NDArray[np.int64], NDArray[np.bool_]]:
        """Returns the logits `(n, classes)`, the exits `(n,)`, and which are key frames `(n,)`, one after another.

        The last key frame is remembered from call to call.
        """
        found = [self.frame(frames[index : index + 1]) for index in range(len(frames))]
        logits = np.concatenate([key.logits for key, _ in found])
        exits = np.concatenate([key.exits for key, _ in found])
        return logits, exits, np.array([is_new for _, is_new in found])

    def frame(self, frame: Floats) -> tuple[KeyFrame, bool]:
        """Returns the key frame that answers a frame `(1, c, h, w)`, and whether it is that frame itself."""
        self.age += 1
        small = thumbnail(frame[0])
        if self.last is None or is_key(small, self.last.thumbnail, self.age, self.threshold, self.max_age):
            self.last, self.age = KeyFrame(small, *self.network(frame)), 0
        return self.last, self.age == 0


def is_key(frame: Floats, last: Floats, age: int, threshold: float, max_age: int) -> bool:
    """Returns whether a frame is a key frame.

    Args:
        frame: its thumbnail.
        last: that of the last key frame.
        age: how many frames ago that was.
        threshold: the difference from which it is.
        max_age: the age at which it is anyway.
    """
    return age >= max_age or threshold <= 0 or difference(frame, last) >= threshold


def thumbnail(frame: Floats) -> Floats:
    """Returns a frame `(c, h, w)` in grey, as the means of at most 8x8 cells."""
    channels, height, width = frame.shape
    rows, columns, pixels = _cells(height, width)
    grey = np.add.reduce(frame, axis=0)
    small: Floats = np.add.reduceat(np.add.reduceat(grey, rows, axis=0), columns, axis=1) / (pixels * channels)
    return small


@cache
def _cells(height: int, width: int) -> tuple[NDArray[np.int64], NDArray[np.int64], Floats]:
    """Returns where the cells' rows and columns begin, and how many pixels each cell has."""
    ends = [np.linspace(0, size, min(CELLS, size) + 1).astype(np.int64) for size in (height, width)]
    rows, columns = (np.diff(end) for end in ends)
    return ends[0][:-1], ends[1][:-1], np.outer(rows, columns).astype(np.float32)


def difference(first: Floats, second: Floats) -> float:
    """Returns the mean absolute difference of two thumbnails, in units of the network's input."""
    return float(np.abs(first - second).mean())


def load(folder: str | Path) -> Network:
    """Returns the bundle's network: its engines where it has them and TensorRT runs, else ONNX Runtime on the CPU."""
    bundle = Path(folder)
    description = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))
    engines = _load_engines(bundle, description) if (bundle / ENGINES).is_file() else None
    return engines or _load_sessions(bundle, description)


def follow(folder: str | Path) -> FrameReuse:
    """Returns the bundle's network for a stream; one that was picked without frames computes each of them."""
    description = json.loads((Path(folder) / "bundle.json").read_text(encoding="utf-8"))
    frames = description.get("frames", {"threshold": 0.0, "max_age": 1})
    return FrameReuse(load(folder), frames["threshold"], frames["max_age"])


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
    return StagedNetwork(stages, description["thresholds"])


def answer(network: Network, images: Floats, batch: int) -> tuple[Floats, NDArray[np.int64], float]:
    """Returns logits, exits and the median seconds per full batch."""
    logits, exits, seconds = [], [], []
    for start in range(0, len(images), batch):
        begin = time.perf_counter()
        found, left = network(images[start : start + batch])
        seconds.append(time.perf_counter() - begin)
        logits.append(found)
        exits.append(left)
    full = seconds[: max(len(images) // batch, 1)]
    return np.concatenate(logits), np.concatenate(exits), float(np.median(full))


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
    arguments = _arguments()
    bundle = Path(__file__).resolve().parent
    description = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))
    own = arguments.images is None and arguments.stream is None
    images, labels = read(arguments.stream or arguments.images or bundle / "check.npz")
    wanted = tuple(description["image_shape"])
    if images.shape[1:] != wanted or not len(images):
        raise ValueError(f"images are (n, {', '.join(map(str, wanted))}) with n above 0, got {images.shape}")
    if arguments.stream or (own and "frames" in description):
        logits, exits = _answer_stream(follow(bundle), images)
    else:
        logits, exits = _answer_images(load(bundle), images, description["target"]["batch"])
    classes = logits.argmax(axis=1)
    if arguments.predictions:
        np.save(arguments.predictions, classes)
    for index, name in enumerate([*description["exits"], "end"]):
        print(f"  answered at {name}: {int((exits == index).sum())}")
    correct = None if labels is None else int((classes == labels).sum())
    if correct is not None:
        print(f"  accuracy: {correct / len(images):.4%} ({correct}/{len(images)})")
    if own:
        measured = description["check"]["correct"]
        print(f"  measured when the bundle was made: {measured / len(images):.4%} ({measured}/{len(images)})")
        return 0 if correct == measured else 1
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run this network on images, or check it against its measurement.")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("images", nargs="?", type=Path, help=".npz with `images` and perhaps `labels`, or .npy")
    source.add_argument("--stream", type=Path, help="the same, but frames in their order, answered one by one")
    parser.add_argument("--predictions", type=Path, help="write the predicted class of each image to this .npy")
    return parser.parse_args()


def _answer_images(network: Network, images: Floats, batch: int) -> tuple[Floats, NDArray[np.int64]]:
    """Returns logits and exits of images that have nothing to do with each other, and says what a batch takes."""
    logits, exits, seconds = answer(network, images, batch)
    print(f"{len(images)} images, {seconds * 1e3:.2f} ms per batch of {batch} (median here)")
    return logits, exits


def _answer_stream(network: FrameReuse, frames: Floats) -> tuple[Floats, NDArray[np.int64]]:
    """Returns logits and exits of frames, and says how many are key frames and what a frame takes."""
    answers, computed, seconds = [], 0, []
    for index in range(len(frames)):
        begin = time.perf_counter()
        key, is_new = network.frame(frames[index : index + 1])
        seconds.append(time.perf_counter() - begin)
        answers.append(key)
        computed += is_new
    mean, median, worst = (1e3 * float(taken(seconds)) for taken in (np.mean, np.median, np.max))
    print(f"{len(frames)} frames, {computed / len(frames):.1%} of them key frames")
    print(f"  {mean:.2f} ms per frame, median {median:.2f} ms, worst {worst:.2f} ms (here)")
    return np.concatenate([key.logits for key in answers]), np.concatenate([key.exits for key in answers])


if __name__ == "__main__":
    sys.exit(main())
