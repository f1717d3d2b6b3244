"""Runs this network: python run.py [IMAGES.npz|IMAGES.npy|PICTURE|FOLDER] [--show], python run.py --stats FOLDER.

Without a file it answers the bundle's own check images and compares with what was measured when the bundle was made.
A .npz holds `images` (n, c, h, w), float32, preprocessed as in training, and, to score them, `labels` (n,). Pictures
are preprocessed here, as bundle.json says. `--show` tells which exit answered each input, `--stats` how many answer at
each. It needs onnxruntime and numpy, and pillow for pictures; a bundle with engines uses them where tensorrt runs. From
Python:

    network = load("path/to/bundle")
    logits, exits = network(images)
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

ENGINES = "engines.json"
ARRAYS, PICTURES = (".npy", ".npz"), (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff")
"""The files that are read of a folder, by the end of their name."""
FEW = 20
"""The exits of so many inputs are shown one by one without being asked for."""


class StagedNetwork:
    """A network whose early exits let easy inputs leave.

    Args:
        stages: each maps a batch to `[features, logits]`, the last one to `[logits]`.
        thresholds: the confidence from which each exit answers.
        confidence: what tells it, a name in `CONFIDENCES`.
    """

    def __init__(
        self,
        stages: Sequence[Callable[[Floats], Sequence[Floats]]],
        thresholds: Sequence[float],
        confidence: str = "softmax",
    ) -> None:
        if len(stages) != len(thresholds) + 1:
            raise ValueError(f"there is one threshold per exit, got {len(thresholds)} for {len(stages)} stages")
        self.stages = tuple(stages)
        self.thresholds = tuple(thresholds)
        self._confidence = CONFIDENCES[confidence]

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
            leaves = self._confidence(logits) >= threshold
            gone = waiting[leaves]
            answers[gone], exits[gone] = logits[leaves], index
            waiting, features = waiting[~leaves], features[~leaves]
            if not len(waiting):
                return answers, exits
        assert answers is not None
        answers[waiting] = self.stages[-1](features)[0]
        return answers, exits

    def all_logits(self, images: Floats) -> Floats:
        """Returns what every exit and, last, the end says, `(n, exits + 1, classes)`: nobody leaves."""
        found, features = [], images
        for stage in self.stages[:-1]:
            features, logits = stage(features)
            found.append(logits)
        return np.stack([*found, self.stages[-1](features)[0]], axis=1)


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


def harmful_optimizers(model: bytes) -> list[str]:
    """Returns the optimizations of ONNX Runtime that would change the answers of an ONNX file.

    It takes a ReLU into the quantization behind it, which for fp8 drops the ReLU (seen in 1.32). What tells fp8 is the
    name that our writer gives its zero points.
    """
    return ["ReluQuantRewrite"] if b"/fp8/zero_point" in model else []


Network = Callable[[Floats], tuple[Floats, NDArray[np.int64]]]


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
            gates = description["thresholds"], description.get("confidence", "softmax")
            opened = TensorRT().open_engines((bundle / ENGINES).read_bytes(), bundle, *gates)
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
    return StagedNetwork(stages, description["thresholds"], description.get("confidence", "softmax"))


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


def read_all(path: Path, description: dict[str, Any]) -> Iterator[tuple[str, Floats, NDArray[np.int64] | None]]:
    """Yields name, images `(n, c, h, w)` and perhaps labels of a file, or of every file below a folder, by name."""
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in (*ARRAYS, *PICTURES))
        if not files:
            raise ValueError(
                f"a folder of inputs has {', '.join((*ARRAYS, *PICTURES))} files, got none in {str(path)!r}"
            )
    wanted = tuple(description["image_shape"])
    for file in files:
        if file.suffix.lower() in PICTURES:
            images, labels = picture(file, description.get("preprocessing")), None
        else:
            images, labels = read(file)
        images = images[None] if images.shape == wanted else images
        if images.shape[1:] != wanted or not len(images):
            shapes = f"(n, {', '.join(map(str, wanted))}) with n above 0"
            raise ValueError(f"images are {shapes}, got {images.shape} in {str(file)!r}")
        yield (str(file.relative_to(path)) if file != path else file.name), images, labels


def picture(file: Path, preprocessing: dict[str, Any] | None) -> Floats:
    """Returns a picture as the network was trained on them, `(1, c, h, w)`."""
    if preprocessing is None:
        raise ValueError(
            f"this bundle's data came preprocessed, got the picture {str(file)!r}; give .npy or .npz files"
        )
    try:
        from PIL import Image
    except ImportError as error:
        raise ValueError(f"a picture needs pillow, got {error}; pip install pillow, or give .npy files") from error
    mean, std = (np.array(preprocessing[name], np.float32) for name in ("mean", "std"))
    size, shorter = preprocessing["size"], preprocessing["resize"]
    with Image.open(file) as opened:
        image = upright(opened, "L" if len(mean) == 1 else "RGB")
    if min(image.size) != shorter:
        sides = (shorter * image.width // min(image.size), shorter * image.height // min(image.size))
        image = image.resize(sides, Image.Resampling[preprocessing["interpolation"]])
    left, top = (round((side - size) / 2.0) for side in image.size)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), np.float32).reshape(1, size, size, -1)
    normalised: Floats = (pixels * (np.float32(1 / 255) / std) - mean / std).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(normalised)


def upright(image: Any, mode: str) -> Any:
    """Returns a picture in `mode`, turned as its EXIF data says, 16 bits made 8, transparency laid on white."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.float64).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


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
    parser.add_argument("images", nargs="?", type=Path, help=".npz with `images` and perhaps `labels`, .npy, picture")
    parser.add_argument("--predictions", type=Path, help="write the predicted class of each image to this .npy")
    parser.add_argument("--show", action="store_true", help="tell which exit answered each input")
    parser.add_argument("--stats", type=Path, metavar="FOLDER|FILE", help="tell how many inputs each exit answers")
    arguments = parser.parse_args()
    bundle = Path(__file__).resolve().parent
    description = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))
    batch = description["target"]["batch"]
    if arguments.stats:
        return _stats(load(bundle), description, arguments.stats)
    named = [*read_all(arguments.images or bundle / "check.npz", description)]
    images = np.concatenate([part for _, part, _ in named])
    logits, exits, seconds = answer(load(bundle), images, batch)
    classes = logits.argmax(axis=1)
    if arguments.predictions:
        np.save(arguments.predictions, classes)
    print(f"{len(images)} images, {seconds * 1e3:.2f} ms per batch of {batch} (median here)")
    names = [*description["exits"], "end"]
    for index, name in enumerate(names):
        print(f"  answered at {name}: {int((exits == index).sum())}")
    if arguments.show or (arguments.images and len(images) <= FEW):
        inputs = [f"{name}[{row}]" if len(part) > 1 else name for name, part, _ in named for row in range(len(part))]
        for name, label, index in zip(inputs, classes, exits, strict=True):
            print(f"  {name}: class {label}, at {names[index]}")
    every = [part for _, _, part in named if part is not None]
    labels = np.concatenate(every) if len(every) == len(named) else None
    correct = None if labels is None else int((classes == labels).sum())
    if correct is not None:
        print(f"  accuracy: {correct / len(images):.4%} ({correct}/{len(images)})")
    if arguments.images is None:
        measured = description["check"]["correct"]
        print(f"  measured when the bundle was made: {measured / len(images):.4%} ({measured}/{len(images)})")
        return 0 if correct == measured else 1
    return 0


def _stats(network: Network, description: dict[str, Any], path: Path) -> int:
    """Writes how many inputs each exit answers, and what they take: file by file, so that a folder may be large."""
    names, batch = [*description["exits"], "end"], description["target"]["batch"]
    counts, seconds, files = np.zeros(len(names), np.int64), 0.0, 0
    waiting = np.empty((0, *description["image_shape"]), np.float32)
    for _, images, _ in read_all(path, description):
        files += 1
        waiting = np.concatenate([waiting, images])
        whole = len(waiting) // batch * batch
        seconds += _count(network, waiting[:whole], batch, counts)
        waiting = waiting[whole:]
    seconds += _count(network, waiting, batch, counts)
    mean = seconds / counts.sum() * 1e3
    print(f"{counts.sum()} images of {files} files, {mean:.3f} ms an image in batches of {batch} (mean here)")
    for name, count in zip(names, counts, strict=True):
        print(f"  {name}: {count / counts.sum():.1%} ({count})")
    return 0


def _count(network: Network, images: Floats, batch: int, counts: NDArray[np.int64]) -> float:
    """Adds where the images leave to `counts`; returns the seconds that they took."""
    taken = 0.0
    for start in range(0, len(images), batch):
        begin = time.perf_counter()
        _, exits = network(images[start : start + batch])
        taken += time.perf_counter() - begin
        counts += np.bincount(exits, minlength=len(counts))
    return taken


if __name__ == "__main__":
    sys.exit(main())
