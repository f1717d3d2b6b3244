"""Runs this network: python run.py [IMAGES.npz|IMAGES.npy|PICTURE|FOLDER] [--show|--stream FRAMES|--stats FOLDER].

Without a file it answers the bundle's own check images and compares with what was measured when the bundle was made.
A .npz holds `images` (n, c, h, w), float32, preprocessed as in training, and, to score them, `labels` (n,). Pictures
are preprocessed here, as bundle.json says. `--show` tells which exit answered each input and which blocks it passed by,
`--stats` how many do so. With `--stream` inputs are frames in their order; those that hardly differ from the last key
frame get its answer. It needs onnxruntime and numpy, and pillow for pictures; a bundle with engines uses them where
tensorrt runs, and one that was made for OpenVINO uses that where it is installed. From Python:

    network = load("path/to/bundle")
    logits, routes = network(images)

    stream = follow("path/to/bundle")
    key_frame, is_new = stream.frame(image)  # (1, c, h, w); key_frame.logits, key_frame.routes

A route is the exit that answered, 0 being the first; where blocks may be skipped, `exits_of(routes)` is, and
`skipped_of(routes, blocks)` tells which of so many blocks were.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING or __package__:
    from evaluators.runtimes.inputs import read_all
    from evaluators.runtimes.reuse import FrameReuse
    from evaluators.runtimes.staged import (
        Floats,
        Network,
        Routes,
        StagedNetwork,
        Steps,
        exits_of,
        from_json,
        skipped_of,
    )
else:  # a bundle has these files beside its run.py, which anybody may call from anywhere
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from inputs import read_all
    from reuse import FrameReuse
    from staged import Floats, Network, Routes, StagedNetwork, Steps, exits_of, from_json, skipped_of

ENGINES = "engines.json"
FEW = 20
"""The exits of so many inputs are shown one by one without being asked for."""


class BatchSizes:
    """The batch sizes that stages are compiled for: the first that is seen, and the powers of two below it."""

    def __init__(self) -> None:
        self._whole = 0

    def fitting(self, count: int) -> int:
        """Returns the smallest of them that holds `count` inputs; what exceeds the first is its own size."""
        self._whole = self._whole or count
        return count if count > self._whole else min(1 << (count - 1).bit_length(), self._whole)


class PaddedStage:
    """A stage of OpenVINO's that is compiled for a few shapes; other batches are padded with zeros.

    With the batch size left open its kernels are slower, and each change of it costs as much as a third of a batch.

    Args:
        compiled: returns the compiled model for inputs of one shape.
        sizes: of batches; shared by all stages, because the first one sees whole batches.
    """

    def __init__(self, compiled: Callable[[tuple[int, ...]], Any], sizes: BatchSizes) -> None:
        self._compiled = compiled
        self._sizes = sizes
        self.requests: dict[tuple[int, ...], Any] = {}

    def __call__(self, inputs: Floats) -> list[Floats]:
        """Returns `[features, logits]` for a batch, or `[logits]` for the last stage's."""
        count, size = len(inputs), self._sizes.fitting(len(inputs))
        shape = (size, *inputs.shape[1:])
        if shape not in self.requests:
            self.requests[shape] = self._compiled(shape).create_infer_request()
        if size > count:
            inputs = np.concatenate([inputs, np.zeros((size - count, *shape[1:]), inputs.dtype)])
        found = self.requests[shape].infer([inputs], share_inputs=True)
        return [found[index][:count] for index in range(len(found))]


def openvino_settings(threads: int, bf16: bool) -> dict[str, Any]:
    """Returns how OpenVINO compiles; left to itself it runs fp32 in bf16 where the CPU has it.

    Its threads are not pinned: a pinned one waits for whatever else its core is busy with.
    """
    return {
        "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,
    }


def openvino_has_bf16(core: Any) -> bool:
    """Returns whether the CPU multiplies bf16 itself."""
    return "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def harmful_optimizers(model: bytes) -> list[str]:
    """Returns the optimizations of ONNX Runtime that would change the answers of an ONNX file.

    It takes a ReLU into the quantization behind it, which for fp8 drops the ReLU (seen in 1.32). What tells fp8 is the
    name that our writer gives its zero points.
    """
    return ["ReluQuantRewrite"] if b"/fp8/zero_point" in model else []


def session_entries(model: bytes) -> dict[str, str]:
    """Returns what a session of ONNX Runtime is told about a file, by the key of its configuration.

    Where weights are only stored in few bits and nothing computes in int8, they become float once, when the file is
    loaded; else with every batch, at 1.7 times the time for a ResNet-20 (seen in 1.32).
    """
    stored_only = b"DequantizeLinear" in model and b"QuantizeLinear" not in model
    return {"session.disable_quant_qdq": "1"} if stored_only else {}


def load(folder: str | Path) -> Network:
    """Returns the bundle's network: on TensorRT or OpenVINO where made for them and they run, else ONNX Runtime."""
    return load_by(folder)[1]


def load_by(folder: str | Path) -> tuple[str, Network]:
    """Returns the name of the library that runs the bundle's network here, and the network."""
    bundle = Path(folder)
    description = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))
    engines = _load_engines(bundle, description) if (bundle / ENGINES).is_file() else None
    if engines:
        return "tensorrt", engines
    compiled = _load_compiled(bundle, description) if _made_with(description) == "openvino" else None
    if compiled:
        return "openvino", compiled
    return "onnxruntime", _load_sessions(bundle, description)


def _made_with(description: dict[str, Any]) -> str:
    """Returns the name of the library that the bundle was measured with, perhaps a board's; empty if not told."""
    return str(description.get("library", "")).partition(" ")[0]


def follow(folder: str | Path) -> FrameReuse:
    """Returns the bundle's network for a stream; one that was picked without frames computes each of them."""
    description = json.loads((Path(folder) / "bundle.json").read_text(encoding="utf-8"))
    return _following(load(folder), description)


def _following(network: Network, description: dict[str, Any]) -> FrameReuse:
    frames = description.get("frames", {"threshold": 0.0, "max_age": 1})
    return FrameReuse(network, frames["threshold"], frames["max_age"])


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


def _load_compiled(bundle: Path, description: dict[str, Any]) -> StagedNetwork | None:
    """Returns the network on OpenVINO, compiled as it was measured; None, and a line on why, where there is none."""
    try:
        import openvino
    except ImportError as error:
        sys.stderr.write(f"OpenVINO cannot be used here: {error}; ONNX Runtime takes over\n")
        return None
    core, sizes, target = openvino.Core(), BatchSizes(), description["target"]
    settings = openvino_settings(target["threads"], target.get("fp32_in") == "bf16" and openvino_has_bf16(core))

    def compiled(file: bytes, shape: tuple[int, ...]) -> Any:
        model = core.read_model(file)
        model.reshape(list(shape))
        return core.compile_model(model, "CPU", settings)

    stages = [PaddedStage(partial(compiled, file), sizes) for file in _files(bundle, description)]
    return StagedNetwork(stages, _plan(description), description.get("confidence", "softmax"))


def _plan(description: dict[str, Any]) -> Steps:
    """Returns how the stages are run: a confidence for each exit, or steps where blocks may be skipped."""
    return from_json(description.get("steps") or description["thresholds"])


def _files(bundle: Path, description: dict[str, Any]) -> list[bytes]:
    for name in description["deployed"]:
        if not (bundle / name).is_file():
            raise FileNotFoundError(2, "no such file", str(bundle / name))
    return [(bundle / name).read_bytes() for name in description["deployed"]]


def _load_sessions(bundle: Path, description: dict[str, Any]) -> StagedNetwork:
    """Returns the network on ONNX Runtime's CPU provider, with the threads it was measured with."""
    import onnxruntime

    def stage(file: bytes) -> Callable[[Floats], list[Floats]]:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = description["target"]["threads"]
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        for key, value in session_entries(file).items():
            options.add_session_config_entry(key, value)
        disabled = harmful_optimizers(file)
        session = onnxruntime.InferenceSession(
            file, options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled
        )
        name, names = session.get_inputs()[0].name, [output.name for output in session.get_outputs()]
        return lambda batch: session.run(names, {name: batch})  # told once: asking costs time in every call

    stages = [stage(file) for file in _files(bundle, description)]
    return StagedNetwork(stages, _plan(description), description.get("confidence", "softmax"))


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
    if arguments.stats:
        return _stats(load(bundle), description, arguments.stats)
    given = arguments.stream or arguments.images
    named = [*read_all(given or bundle / "check.npz", description)]
    images = np.concatenate([part for _, part, _ in named])
    library, network = load_by(bundle)
    if arguments.stream or (given is None and "frames" in description):
        logits, routes = _answer_stream(_following(network, description), images, library)
    else:
        logits, routes = _answer_images(network, images, description["target"]["batch"], library)
    classes = logits.argmax(axis=1)
    if arguments.predictions:
        np.save(arguments.predictions, classes)
    _tell(description, routes, str, "answered at ")
    if arguments.show or (given and len(images) <= FEW):
        inputs = [f"{name}[{row}]" if len(part) > 1 else name for name, part, _ in named for row in range(len(part))]
        for name, label, way in zip(inputs, classes, _ways(description, routes), strict=True):
            print(f"  {name}: class {label}, at {way}")
    every = [part for _, _, part in named if part is not None]
    labels = np.concatenate(every) if len(every) == len(named) else None
    correct = None if labels is None else int((classes == labels).sum())
    if correct is not None:
        print(f"  accuracy: {correct / len(images):.4%} ({correct}/{len(images)})")
    if given is None:
        measured = description["check"]["correct"]
        print(f"  measured when the bundle was made: {measured / len(images):.4%} ({measured}/{len(images)})")
        return 0 if abs((correct or 0) - measured) <= _tolerance(library, description, len(images)) else 1
    return 0


def _tolerance(library: str, description: dict[str, Any], images: int) -> int:
    """Returns how many right answers more or fewer are no failure: another library rounds otherwise."""
    return 0 if _made_with(description) in ("", library) else -(-images // 100)


def _ways(description: dict[str, Any], routes: Routes) -> list[str]:
    """Returns, in words, the exit that answered each input, and the blocks that it passed by."""
    names, blocks = [*description["exits"], "end"], np.array(description.get("blocks", []), dtype=str)
    passed = [", ".join(blocks[row]) for row in skipped_of(routes, len(blocks))]
    found = zip(exits_of(routes), passed, strict=True)
    return [names[index] + (f", past {skipped}" if skipped else "") for index, skipped in found]


def _tell(description: dict[str, Any], routes: Routes, told: Callable[[int], str], at: str = "") -> None:
    """Writes how many inputs each exit answers, and how many pass each block by."""
    for index, name in enumerate([*description["exits"], "end"]):
        print(f"  {at}{name}: {told(int((exits_of(routes) == index).sum()))}")
    blocks = description.get("blocks", [])
    for block, passed in zip(blocks, skipped_of(routes, len(blocks)).T, strict=True):
        print(f"  passed {block} by: {told(int(passed.sum()))}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run this network on images, or check it against its measurement.")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("images", nargs="?", type=Path, help=".npz with `images` and perhaps `labels`, .npy, picture")
    source.add_argument("--stream", type=Path, help="the same, but frames in their order, answered one by one")
    source.add_argument("--stats", type=Path, metavar="FOLDER|FILE", help="tell how many inputs take which way")
    parser.add_argument("--predictions", type=Path, help="write the predicted class of each image to this .npy")
    parser.add_argument("--show", action="store_true", help="tell which way each input took")
    return parser.parse_args()


def _answer_images(network: Network, images: Floats, batch: int, library: str) -> tuple[Floats, Routes]:
    """Returns logits and routes of images that have nothing to do with each other, and says what a batch takes."""
    logits, routes, seconds = answer(network, images, batch)
    print(f"{len(images)} images, {seconds * 1e3:.2f} ms per batch of {batch} (median here, {library})")
    return logits, routes


def _answer_stream(network: FrameReuse, frames: Floats, library: str) -> tuple[Floats, Routes]:
    """Returns logits and routes of frames, and says how many are key frames and what a frame takes."""
    answers, computed, seconds = [], 0, []
    for index in range(len(frames)):
        begin = time.perf_counter()
        key, is_new = network.frame(frames[index : index + 1])
        seconds.append(time.perf_counter() - begin)
        answers.append(key)
        computed += is_new
    mean, median, worst = (1e3 * float(taken(seconds)) for taken in (np.mean, np.median, np.max))
    print(f"{len(frames)} frames, {computed / len(frames):.1%} of them key frames")
    print(f"  {mean:.2f} ms per frame, median {median:.2f} ms, worst {worst:.2f} ms (here, {library})")
    return np.concatenate([key.logits for key in answers]), np.concatenate([key.routes for key in answers])


def _stats(network: Network, description: dict[str, Any], path: Path) -> int:
    """Writes how many inputs take which way, and what they take: file by file, so that a folder may be large."""
    batch = description["target"]["batch"]
    routes, seconds, files = [np.empty(0, np.int64)], 0.0, 0
    waiting = np.empty((0, *description["image_shape"]), np.float32)
    for _, images, _ in read_all(path, description):
        files += 1
        waiting = np.concatenate([waiting, images])
        whole = len(waiting) // batch * batch
        seconds += _count(network, waiting[:whole], batch, routes)
        waiting = waiting[whole:]
    seconds += _count(network, waiting, batch, routes)
    every = np.concatenate(routes)
    mean = seconds / len(every) * 1e3
    print(f"{len(every)} images of {files} files, {mean:.3f} ms an image in batches of {batch} (mean here)")
    _tell(description, every, lambda count: f"{count / len(every):.1%} ({count})")
    return 0


def _count(network: Network, images: Floats, batch: int, routes: list[Routes]) -> float:
    """Adds the ways that the images take to `routes`; returns the seconds that they took."""
    taken = 0.0
    for start in range(0, len(images), batch):
        begin = time.perf_counter()
        _, left = network(images[start : start + batch])
        taken += time.perf_counter() - begin
        routes.append(left)
    return taken


if __name__ == "__main__":
    sys.exit(main())
