"""Runs this network: python run.py [IMAGES.npz|IMAGES.npy|PICTURE|FOLDER] [--show|--stream FRAMES|--stats FOLDER].

Without a file it runs on the bundle's check images and compares the accuracy with that measured when the bundle was
made. A .npz has `images` (n, c, h, w), float32, preprocessed as in training, and optionally `labels` (n,) for the
accuracy. Pictures are preprocessed here, as bundle.json says. `--show` prints which exit answered each input and which
blocks it skipped, `--stats` the share of inputs for each. With `--stream` inputs are frames of a stream, in order, and
those similar to the last key frame get its answer. It needs onnxruntime and numpy, and pillow for pictures. A bundle
with engines uses TensorRT, and one made for OpenVINO uses OpenVINO, where they are installed. From Python:

    network = load("path/to/bundle")
    network.classify("dog.png")  # the name of its class
    logits, routes = network(images)  # (n, c, h, w) float32, preprocessed as in training

    stream = follow("path/to/bundle")
    key_frame, is_new = stream.frame(image)  # (1, c, h, w); key_frame.logits, key_frame.routes

A route is the index of the exit that answered, from 0. If blocks may be skipped, it also encodes which ones were: then
`exits_of(routes)` returns the indices, and `skipped_of(routes, number_of_blocks)` which blocks were skipped.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING or __package__ == "evaluators.bundle":
    from evaluators.bundle.manifest import Frames, Manifest
    from evaluators.inference.frame_reuse import FrameReuse
    from evaluators.inference.inputs import read_all
    from evaluators.inference.resizing import resized
    from evaluators.inference.sessions import (
        BatchSizes,
        PaddedStage,
        harmful_optimizers,
        openvino_has_bf16,
        openvino_settings,
        session_entries,
    )
    from evaluators.inference.staged import (
        Floats,
        Network,
        Routes,
        StagedNetwork,
        exits_of,
        from_json,
        skipped_of,
    )
else:  # a bundle has these files beside its run.py, which anybody may call from anywhere
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from frame_reuse import FrameReuse
    from inputs import read_all
    from manifest import Frames, Manifest
    from resizing import resized
    from sessions import (
        BatchSizes,
        PaddedStage,
        harmful_optimizers,
        openvino_has_bf16,
        openvino_settings,
        session_entries,
    )
    from staged import Floats, Network, Routes, StagedNetwork, exits_of, from_json, skipped_of

InputFile = tuple[str, Floats, "NDArray[np.int64] | None"]
"""Name, images and labels, if any, of a file."""
ENGINES = "engines.json"
FEW = 20
"""Up to this number of inputs, their exits are printed one by one even without `--show`."""


class Classifier:
    """A bundle's network.

    Args:
        network: maps images at its own size to logits and routes.
        manifest: of the bundle.
    """

    def __init__(self, network: Network, manifest: Manifest) -> None:
        self.manifest = manifest
        self._network = network
        self._shape = tuple(manifest.image_shape)
        self._size = manifest.input_size

    def __call__(self, images: Floats) -> tuple[Floats, Routes]:
        """Returns logits `(n, classes)` and routes `(n,)` of images `(n, c, h, w)`, preprocessed as in training.

        Raises:
            ValueError: they have another shape or type.
        """
        wanted = self._shape or np.shape(images)[1:]  # earlier bundles do not say it
        if not isinstance(images, np.ndarray) or images.dtype != np.float32 or images.shape[1:] != wanted:
            kind = f"{images.dtype} {images.shape}" if isinstance(images, np.ndarray) else type(images).__name__
            raise ValueError(f"images are a float32 array (n, {', '.join(map(str, self._shape))}), got {kind}")
        return self._network(resized(images, self._size))

    def classify(self, file: str | Path) -> str:
        """Returns the class of a picture, or of the one image of a .npy file: its name, else its number.

        Raises:
            ValueError: the file has other content, or a picture needs pillow.
            OSError: it cannot be read.
        """
        if not isinstance(file, str | Path):
            raise ValueError(f"a picture is named by its file, got {type(file).__name__}; call network(images)")
        images = [images for _, images, _ in read_all(Path(file), self._shape, self.manifest.preprocessing)]
        count = sum(map(len, images))
        if count != 1:
            raise ValueError(f"one picture is classified at a time, got {count} in {str(file)!r}; for more: run.py")
        return self.manifest.class_name(int(self(images[0])[0].argmax()))


def load(folder: str | Path) -> Classifier:
    """Returns the bundle's network, on TensorRT or OpenVINO if made for them and installed, else on ONNX Runtime."""
    return load_with_library(folder)[1]


def load_with_library(folder: str | Path) -> tuple[str, Classifier]:
    """Returns the name of the library that runs the bundle's network on this machine, and the network."""
    library, network = _loaded(Path(folder))
    return library, Classifier(network, Manifest.read(Path(folder)))


def _loaded(bundle: Path) -> tuple[str, Network]:
    manifest = Manifest.read(bundle)
    engines = _load_engines(bundle, manifest) if (bundle / ENGINES).is_file() else None
    if engines:
        return "tensorrt", engines
    compiled = _load_compiled(bundle, manifest) if manifest.library_name == "openvino" else None
    if compiled:
        return "openvino", compiled
    return "onnxruntime", _load_sessions(bundle, manifest)


def follow(folder: str | Path) -> FrameReuse:
    """Returns the bundle's network for the frames of a stream; if it was not made for streams, it computes each one."""
    return _for_stream(load(folder), Manifest.read(Path(folder)))


def _for_stream(network: Network, manifest: Manifest) -> FrameReuse:
    frames = manifest.frames or Frames()
    return FrameReuse(network, frames.threshold, frames.max_age)


def _load_engines(bundle: Path, manifest: Manifest) -> Network | None:
    """Returns the network on the GPU; None, after writing the reason, if it cannot run there."""
    sys.path.insert(0, str(bundle / "runtime.pyz"))
    try:
        from evaluators.runtimes.tensorrt_gpu.runtime import TensorRT

        reason = TensorRT.missing()
        if reason is None:
            engines = (bundle / ENGINES).read_bytes()
            session = TensorRT().open_engines(engines, bundle, manifest.thresholds, manifest.confidence)
            return lambda images: session.answer(images, manifest.target.batch)
    except Exception as error:  # engines run only on the kind of machine that they were built on
        reason = " ".join(str(error).split())
    sys.stderr.write(f"the engines cannot be used here: {reason}; ONNX Runtime takes over\n")
    return None


def _load_compiled(bundle: Path, manifest: Manifest) -> StagedNetwork | None:
    """Returns the network on OpenVINO, compiled as it was measured; None, after writing why, if it is missing."""
    try:
        import openvino
    except ImportError as error:
        sys.stderr.write(f"OpenVINO cannot be used here: {error}; ONNX Runtime takes over\n")
        return None
    core = openvino.Core()
    sizes = BatchSizes()
    target = manifest.target
    settings = openvino_settings(target.threads, target.fp32_in == "bf16" and openvino_has_bf16(core))

    def compile_for(file: bytes, shape: tuple[int, ...]) -> Any:
        model = core.read_model(file)
        model.reshape(list(shape))
        return core.compile_model(model, "CPU", settings)

    stages = [PaddedStage(partial(compile_for, file), sizes) for file in _files(bundle, manifest)]
    return StagedNetwork(stages, from_json(manifest.plan), manifest.confidence)


def _files(bundle: Path, manifest: Manifest) -> list[bytes]:
    for name in manifest.deployed:
        if not (bundle / name).is_file():
            raise FileNotFoundError(2, "no such file", str(bundle / name))
    return [(bundle / name).read_bytes() for name in manifest.deployed]


def _load_sessions(bundle: Path, manifest: Manifest) -> StagedNetwork:
    """Returns the network on ONNX Runtime's CPU provider, with the number of threads that it was measured with."""
    import onnxruntime

    def stage(file: bytes) -> Callable[[Floats], list[Floats]]:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = manifest.target.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # what is wrong is in the exception, too
        for key, value in session_entries(file).items():
            options.add_session_config_entry(key, value)
        disabled = harmful_optimizers(file)
        session = onnxruntime.InferenceSession(
            file, options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled
        )
        input_name = session.get_inputs()[0].name
        output_names = [output.name for output in session.get_outputs()]  # reading them in each call would cost time
        return lambda batch: session.run(output_names, {input_name: batch})

    stages = [stage(file) for file in _files(bundle, manifest)]
    return StagedNetwork(stages, from_json(manifest.plan), manifest.confidence)


def answer(network: Network, images: Floats, batch: int) -> tuple[Floats, Routes, float]:
    """Returns logits `(n, classes)`, routes `(n,)` and the median seconds per full batch."""
    logits = []
    routes = []
    seconds = []
    for start in range(0, len(images), batch):
        begin = time.perf_counter()
        batch_logits, batch_routes = network(images[start : start + batch])
        seconds.append(time.perf_counter() - begin)
        logits.append(batch_logits)
        routes.append(batch_routes)
    full = seconds[: max(len(images) // batch, 1)]
    return np.concatenate(logits), np.concatenate(routes), float(np.median(full))


def main() -> int:
    """Returns the exit code: 0, 1 if the accuracy on the check images differs from the measured one, 2 for an error."""
    try:
        return _run()
    except Exception as error:  # libraries raise exceptions of all kinds for a file that they cannot read
        sys.stderr.write(f"run.py: {_reason(error)}\n")
        return 2


def _reason(error: Exception) -> str:
    """Returns one line on what is wrong with the images, the bundle or this machine."""
    message = " ".join(str(error).split())
    if isinstance(error, FileNotFoundError):
        return f"a file that exists, got {error.filename!r}; give another, or copy the whole bundle again"
    if isinstance(error, KeyError):
        return f"a .npz has `images`, got none of {message}"
    if isinstance(error, ImportError):
        return f"a bundle needs onnxruntime and numpy, got {message!r}; pip install onnxruntime numpy"
    return message


def _run() -> int:
    arguments = _arguments()
    bundle = Path(__file__).resolve().parent
    manifest = Manifest.read(bundle)
    if arguments.stats:
        return _print_statistics(load(bundle), manifest, arguments.stats)
    given = arguments.stream or arguments.images
    files = [*read_all(given or bundle / "check.npz", manifest.image_shape, manifest.preprocessing)]
    images = np.concatenate([file_images for _, file_images, _ in files])
    library, network = load_with_library(bundle)
    if arguments.stream or (given is None and manifest.frames):
        logits, routes = _answer_stream(_for_stream(network, manifest), images, library)
    else:
        where = library if manifest.input_size is None else f"{library}, resizing to {manifest.input_size} included"
        logits, routes = _answer_images(network, images, manifest.target.batch, where)
    classes = logits.argmax(axis=1)
    if arguments.predictions:
        np.save(arguments.predictions, classes)
    _print_route_counts(manifest, routes, str, "answered at ")
    if arguments.show or (given and len(images) <= FEW):
        _print_inputs(manifest, files, classes, routes)
    correct = _print_accuracy(files, classes)
    return 0 if given else _compare_with_measured(library, manifest, len(images), correct or 0)


def _print_inputs(manifest: Manifest, files: Sequence[InputFile], classes: NDArray[np.int64], routes: Routes) -> None:
    """Prints the class and the route of each input."""
    names = [f"{name}[{row}]" if len(images) > 1 else name for name, images, _ in files for row in range(len(images))]
    for name, label, route in zip(names, classes, _described_routes(manifest, routes), strict=True):
        named = f" {manifest.class_name(label)}" if manifest.class_names else ""
        print(f"  {name}: class {label}{named}, at {route}")


def _print_accuracy(files: Sequence[InputFile], classes: NDArray[np.int64]) -> int | None:
    """Prints the accuracy and returns the number of correct answers; None if files have no labels."""
    labels_of_files = [labels for _, _, labels in files if labels is not None]
    if len(labels_of_files) < len(files):
        return None
    correct = int((classes == np.concatenate(labels_of_files)).sum())
    print(f"  accuracy: {correct / len(classes):.4%} ({correct}/{len(classes)})")
    return correct


def _compare_with_measured(library: str, manifest: Manifest, count: int, correct: int) -> int:
    """Prints the accuracy that was measured; returns the exit code: 0 if that on this machine is the same, else 1."""
    measured = manifest.check.correct
    print(f"  measured when the bundle was made: {measured / count:.4%} ({measured}/{count})")
    return 0 if abs(correct - measured) <= _tolerance(library, manifest, count) else 1


def _tolerance(library: str, manifest: Manifest, images: int) -> int:
    """Returns the accepted difference of correct answers: 0, or 1% with another library, which rounds differently."""
    return 0 if manifest.library_name in ("", library) else -(-images // 100)


def _described_routes(manifest: Manifest, routes: Routes) -> list[str]:
    """Returns, as text, the exit that answered each input, and the blocks that it skipped."""
    blocks = np.array(manifest.blocks, dtype=str)
    skipped_blocks = [", ".join(blocks[row]) for row in skipped_of(routes, len(blocks))]
    pairs = zip(exits_of(routes), skipped_blocks, strict=True)
    return [manifest.ends[index] + (f", skipped {skipped}" if skipped else "") for index, skipped in pairs]


def _print_route_counts(manifest: Manifest, routes: Routes, as_text: Callable[[int], str], prefix: str = "") -> None:
    """Prints how many inputs each exit answers, and how many skip each block."""
    for index, name in enumerate(manifest.ends):
        print(f"  {prefix}{name}: {as_text(int((exits_of(routes) == index).sum()))}")
    for block, is_skipped in zip(manifest.blocks, skipped_of(routes, len(manifest.blocks)).T, strict=True):
        print(f"  skipped {block}: {as_text(int(is_skipped.sum()))}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run this network on images, or check it against its measurement.")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "images", nargs="?", type=Path, help=".npz with `images` and optionally `labels`, .npy, picture, or folder"
    )
    source.add_argument("--stream", type=Path, help="the same, but frames of a stream in order, answered one by one")
    source.add_argument(
        "--stats", type=Path, metavar="FOLDER|FILE", help="print the share of inputs that each exit answers"
    )
    parser.add_argument("--predictions", type=Path, help="write the predicted class of each image to this .npy")
    parser.add_argument("--show", action="store_true", help="print which exit answered each input")
    return parser.parse_args()


def _answer_images(network: Network, images: Floats, batch: int, where: str) -> tuple[Floats, Routes]:
    """Returns logits and routes of independent images, and prints the time per batch, and where that was taken."""
    logits, routes, seconds = answer(network, images, batch)
    print(f"{len(images)} images, {seconds * 1e3:.2f} ms per batch of {batch} (median here, {where})")
    return logits, routes


def _answer_stream(network: FrameReuse, frames: Floats, library: str) -> tuple[Floats, Routes]:
    """Returns logits and routes of frames, and prints the share of key frames and the time per frame."""
    key_frames = []
    computed = 0
    seconds = []
    for index in range(len(frames)):
        begin = time.perf_counter()
        key_frame, is_new = network.frame(frames[index : index + 1])
        seconds.append(time.perf_counter() - begin)
        key_frames.append(key_frame)
        computed += is_new
    mean, median, worst = (1e3 * float(statistic(seconds)) for statistic in (np.mean, np.median, np.max))
    print(f"{len(frames)} frames, {computed / len(frames):.1%} of them key frames")
    print(f"  {mean:.2f} ms per frame, median {median:.2f} ms, worst {worst:.2f} ms (here, {library})")
    logits = np.concatenate([key_frame.logits for key_frame in key_frames])
    return logits, np.concatenate([key_frame.routes for key_frame in key_frames])


def _print_statistics(network: Network, manifest: Manifest, path: Path) -> int:
    """Prints the share of inputs on each route and their mean time; reads one file at a time, so folders may be large.

    Returns:
        The exit code, 0.
    """
    batch = manifest.target.batch
    routes_of_batches = [np.empty(0, np.int64)]
    seconds = 0.0
    files = 0
    pending = np.empty((0, *manifest.image_shape), np.float32)
    for _, images, _ in read_all(path, manifest.image_shape, manifest.preprocessing):
        files += 1
        pending = np.concatenate([pending, images])
        full = len(pending) // batch * batch
        seconds += _append_routes(network, pending[:full], batch, routes_of_batches)
        pending = pending[full:]
    seconds += _append_routes(network, pending, batch, routes_of_batches)
    routes = np.concatenate(routes_of_batches)
    mean_ms = seconds / len(routes) * 1e3
    print(f"{len(routes)} images of {files} files, {mean_ms:.3f} ms per image in batches of {batch} (mean here)")
    _print_route_counts(manifest, routes, lambda count: f"{count / len(routes):.1%} ({count})")
    return 0


def _append_routes(network: Network, images: Floats, batch: int, routes: list[Routes]) -> float:
    """Appends the routes of some images to `routes`, batch by batch; returns the seconds that the network took."""
    seconds = 0.0
    for start in range(0, len(images), batch):
        begin = time.perf_counter()
        _, batch_routes = network(images[start : start + batch])
        seconds += time.perf_counter() - begin
        routes.append(batch_routes)
    return seconds


if __name__ == "__main__":
    sys.exit(main())
