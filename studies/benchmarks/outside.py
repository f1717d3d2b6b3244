"""The outsider's tools: a timer and a quantizer that share no code with evaluators/.

What this program says of its own files is worth little until somebody else's clock agrees. This one lets any number of
calls take turns of a few hundredths of a second, in the process's CPU time, and compares them turn by turn.
"""

import importlib.util
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import nn

Images = NDArray[np.float32]
Call = Callable[[], object]
Answer = Callable[[Images], Images]
"""From images `(n, c, h, w)` to logits `(n, classes)`."""
INPUT = "images"


@dataclass(frozen=True)
class Timed:
    """What a call takes.

    Args:
        seconds: of the process's CPU time, the median over turns.
        ratio: to the first call, the median of the turns' ratios.
        low: the lower end of its bootstrapped 95% interval.
        high: the upper end.
    """

    seconds: float
    ratio: float
    low: float
    high: float


def timed(
    calls: Mapping[str, Call], turns: int = 21, turn_s: float = 0.012, at_most_s: float = 60.0
) -> dict[str, Timed]:
    """Returns what each call takes beside the first, calls of one turn back to back, its first one not counted.

    Args:
        calls: by name.
        turns: of each, in turn with all others.
        turn_s: how long a turn of each lasts, at least one call.
        at_most_s: after so long no further turn begins, from the third on.
    """
    counts = {}
    for name, call in calls.items():
        _seconds(call, 2)
        counts[name] = max(1, round(turn_s / _seconds(call, 1)))
    begin, rows = time.monotonic(), list[list[float]]()
    while len(rows) < turns and (len(rows) < 3 or time.monotonic() - begin < at_most_s):
        row = []
        for name, call in calls.items():
            call()
            row.append(_seconds(call, counts[name]))
        rows.append(row)
    found = np.array(rows)  # (turns, calls)
    ratios = found / found[:, :1]
    picks = np.random.default_rng(0).integers(0, len(found), (500, len(found)))
    low, high = np.percentile(np.median(ratios[picks], axis=1), [2.5, 97.5], axis=0)
    medians = zip(np.median(found, axis=0), np.median(ratios, axis=0), low, high, strict=True)
    return {name: Timed(*map(float, each)) for name, each in zip(calls, medians, strict=True)}


def _seconds(call: Call, count: int) -> float:
    begin = time.process_time()
    for _ in range(count):
        call()
    return (time.process_time() - begin) / count


def session(model: bytes | str, threads: int = 1) -> onnxruntime.InferenceSession:
    """Returns a session as a user makes it: the CPU, `threads` threads, all optimizations."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def answering(file: bytes) -> Answer:
    """Returns what an ONNX file answers."""
    made = session(file)
    name = made.get_inputs()[0].name
    return lambda images: made.run(None, {name: images})[0]


def bundle(folder: Path) -> Answer:
    """Returns what a bundle answers, as its own run.py loads it."""
    sys.path.insert(0, str(folder))
    try:
        network = _module(folder / "run.py").load(folder)
    finally:
        sys.path.remove(str(folder))
        for name in ("manifest", "staged", "inputs", "frame_reuse", "resizing", "sessions"):  # each brings its own
            sys.modules.pop(name, None)
    return lambda images: network(images)[0]


def _module(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"bundle_{file.parent.parent.name}", file)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def one_after_the_other(answer: Answer, images: Images, batch: int) -> Call:
    """Returns a call that answers the next batch of real images each time."""
    batches: Iterator[Images] = cycle(np.array_split(images, max(len(images) // batch, 1)))
    return lambda: answer(next(batches))


def exported(network: nn.Module, image: Images) -> bytes:
    """Returns a network as torch's own exporter writes it, for batches of any size."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = str(Path(folder) / "network.onnx")
        torch.onnx.export(
            network,
            (torch.from_numpy(image),),
            file,
            dynamo=False,
            opset_version=17,
            input_names=[INPUT],
            output_names=["logits"],
            dynamic_axes={INPUT: {0: "batch"}, "logits": {0: "batch"}},
        )
        return Path(file).read_bytes()


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # the library has no types
    def __init__(self, images: Images) -> None:
        self._feeds: Iterator[dict[str, Images]] = ({INPUT: images[at : at + 1]} for at in range(len(images)))

    def get_next(self) -> dict[str, Images] | None:
        return next(self._feeds, None)


def preprocessed(model: bytes) -> bytes:
    """Returns a float model after ONNX Runtime's own pre-processing for quantization."""
    with tempfile.TemporaryDirectory() as folder:
        given, made = (str(Path(folder) / name) for name in ("given.onnx", "made.onnx"))
        Path(given).write_bytes(model)
        with quiet():
            try:
                quant_pre_process(given, made)
            except Exception:  # its symbolic shape inference does not know every operator
                quant_pre_process(given, made, skip_symbolic_shape=True)
        return Path(made).read_bytes()


def statically_quantized(model: bytes, images: Images, method: str = "MinMax") -> bytes:
    """Returns ONNX Runtime's own int8 form of a float model: Q/DQ, u8 activations, s8 weights per channel.

    Args:
        model: pre-processed.
        images: for calibration, one at a time.
        method: that finds ranges, `MinMax`, `Percentile` or `Entropy`.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, made = (str(Path(folder) / name) for name in ("given.onnx", "made.onnx"))
        Path(given).write_bytes(model)
        with quiet():
            quantize_static(
                given,
                made,
                _Reader(images),
                quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                per_channel=True,
                calibrate_method=CalibrationMethod[method],
            )
        return Path(made).read_bytes()


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps a library's advice off the screen."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)


def operators(model: bytes) -> dict[str, int]:
    """Returns how often each operator stands in what ONNX Runtime makes of a model when it loads it."""
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        nodes = onnx.load(options.optimized_model_filepath, load_external_data=False).graph.node
        names = [node.op_type for node in nodes]
    return {name: names.count(name) for name in sorted(set(names))}
