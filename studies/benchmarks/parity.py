"""Our all-int8 file against the usual tool's, for torchvision's convolutional networks, as Markdown.

python -m studies.benchmarks.parity [--models resnet18,vgg16] [--batches 1,16] [--runtime openvino] [--out FILE]

On ONNX Runtime the other file is `quantize_static`'s after its own pre-processing (Q/DQ, u8 activations, s8 weights per
channel, min-max); on OpenVINO it is NNCF's post-training quantization with its defaults (`pip install nncf`). Both are
calibrated on the same images. Each network has random weights, 224 pixels (Inception 299) and a process of its own.
Files take turns by a timer that shares no code with evaluators/: one thread, calls back to back, the process's CPU
time, the median of the turns' ratios. A row above the bound shows which operators differ in the optimized graphs.
"""

import argparse
import json
import multiprocessing
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from evaluators.artifact_builder import ArtifactBuilder
from evaluators.runtimes.cpu import cpu_name
from evaluators.runtimes.registry import runtime
from spaces.candidate import Candidate
from spaces.dynamic.exit_network import ExitNetwork
from studies.benchmarks import outside
from studies.benchmarks.coverage import all_models, random_network
from studies.benchmarks.markdown import print_table

SIZE = 224
_SIZES = {"inception_v3": 299}
"""What does not take 224 pixels."""
CALIBRATION = 8
BOUND = 1.05
"""So many times as long as the other tool's file may ours take."""
_NO_CONVOLUTIONS = ("vit_", "swin", "maxvit")
_HEADINGS = (
    "network",
    "batch",
    "dense, ms",
    "other / dense",
    "ours / dense",
    "ours / other",
    "SQNR other, ours",
    "why",
)


@dataclass(frozen=True)
class Row:
    """One network at one batch size; ratios are of time.

    Args:
        model: its name.
        batch: images at a time.
        dense_ms: of the float network.
        other: the other tool's int8 to dense.
        ours: our int8 to dense.
        ratio: ours to the other's.
        other_db: the ratio of signal to quantization noise at the other's logits.
        ours_db: at ours.
        operators: where the optimized graphs differ, ours and the other's count of each operator.
        error: why there are no figures.
    """

    model: str
    batch: int
    dense_ms: float = float("nan")
    other: float = float("nan")
    ours: float = float("nan")
    ratio: float = float("nan")
    other_db: float = float("nan")
    ours_db: float = float("nan")
    operators: dict[str, tuple[int, int]] | None = None
    error: str = ""

    def cells(self) -> list[str]:
        """Returns the row of the table."""
        if self.error:
            return [self.model, str(self.batch), *["-"] * 5, self.error]
        differ = " ".join(f"{name} {ours}:{other}" for name, (ours, other) in (self.operators or {}).items())
        return [
            self.model,
            str(self.batch),
            f"{self.dense_ms:.2f}",
            f"{self.other:.3f}",
            f"{self.ours:.3f}",
            f"**{self.ratio:.3f}**" if self.ratio > BOUND else f"{self.ratio:.3f}",
            f"{self.other_db:.0f}, {self.ours_db:.0f} dB",
            differ if self.ratio > BOUND else "",
        ]


def convolutional() -> list[str]:
    """Returns torchvision's classification networks that are made of convolutions, the large ones last."""
    return [name for name in all_models() if not name.startswith(_NO_CONVOLUTIONS)]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(convolutional()))
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--runtime", default="onnxruntime", choices=list(TOOLS))
    parser.add_argument("--seconds", type=float, default=600.0, help="limit for one network")
    parser.add_argument("--out", type=Path, help="JSON; what it holds already is not measured again")
    given = parser.parse_args()
    batches = [int(batch) for batch in given.batches.split(",")]
    known = [Row(**each) for each in json.loads(given.out.read_text())] if given.out and given.out.is_file() else []
    rows = [row for row in known if not row.error]
    for model in given.models.split(","):
        if not set(batches) <= {row.batch for row in rows if row.model == model}:
            rows += _in_own_process(model, batches, given.runtime, given.seconds)
            print("\n".join(" | ".join(row.cells()) for row in rows if row.model == model), flush=True)
        if given.out:
            given.out.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    _print(rows, given.runtime)


def _in_own_process(model: str, batches: Sequence[int], name: str, seconds: float) -> list[Row]:
    """Returns a network's rows after at most so many seconds; those that are not done say so."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(model, batches, name, sender))
    begin = time.monotonic()
    rows = list[Row]()
    error = f"not done in {seconds:.0f} s"
    process.start()
    sender.close()
    try:
        while len(rows) < len(batches) and receiver.poll(max(seconds - (time.monotonic() - begin), 0)):
            rows.append(receiver.recv())
    except EOFError:
        error = "the process died, of memory most likely"
    process.kill()
    process.join()
    return [*rows, *(Row(model, batch, error=error) for batch in batches[len(rows) :])]


def _report(model: str, batches: Sequence[int], name: str, sender: Connection) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        compare = _Comparison(model, name)
        for batch in batches:
            sender.send(compare.row(batch))
    except Exception as error:  # the table says why
        sender.send(Row(model, batches[0], error=f"{type(error).__name__}: {error}".splitlines()[0][:200]))


Answer = Callable[[outside.Images], outside.Images]


class _Tool(Protocol):
    """What makes the other int8 file, and runs all of them."""

    def quantized(self, dense: bytes, images: outside.Images) -> Any:
        """Returns the other tool's int8 form of a float file."""
        ...

    def loaded(self, file: Any, shape: tuple[int, ...]) -> Answer:
        """Returns a file, or the other tool's form, as a function of a batch of this shape."""
        ...


class _StaticQuantization:
    """ONNX Runtime's `quantize_static`."""

    def quantized(self, dense: bytes, images: outside.Images) -> Any:
        return outside.statically_quantized(outside.preprocessed(dense), images)

    def loaded(self, file: Any, shape: tuple[int, ...]) -> Answer:  # noqa: ARG002
        made = outside.session(file)
        name = made.get_inputs()[0].name
        return lambda images: made.run(None, {name: images})[0]


class _Nncf:
    """NNCF's `quantize` on OpenVINO's own form of a network."""

    def __init__(self) -> None:
        import openvino

        self._core = openvino.Core()

    def quantized(self, dense: bytes, images: outside.Images) -> Any:
        import nncf

        with outside.quiet():
            return nncf.quantize(self._core.read_model(dense), nncf.Dataset(list(images[:, None])))

    def loaded(self, file: Any, shape: tuple[int, ...]) -> Answer:
        model = self._core.read_model(file) if isinstance(file, bytes) else file.clone()
        model.reshape(list(shape))
        one_thread = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
        compiled = self._core.compile_model(model, "CPU", one_thread)
        return lambda images: compiled(images)[0]


TOOLS: Mapping[str, Callable[[], _Tool]] = {"onnxruntime": _StaticQuantization, "openvino": _Nncf}
"""The tool that ours is held against, by the runtime."""


class _Comparison:
    """One network's three files on one runtime: dense, the other tool's int8, ours."""

    def __init__(self, model: str, name: str) -> None:
        self._model, self._tool = model, TOOLS[name]()
        self._size = _SIZES.get(model, SIZE)
        network, calibration = random_network(model, self._size), _images(CALIBRATION, self._size)
        trunk = ExitNetwork(network, [], []).eval()
        builder = ArtifactBuilder(trunk, calibration, runtime(name))
        ours = builder.build(trunk, Candidate({}, dict.fromkeys(builder.layers, "int8"))).deployed[0]
        dense = outside.exported(network, calibration[:1])
        other = self._tool.quantized(dense, calibration)
        self._files = {"dense": dense, "other": other, "ours": ours}
        self._differing = _differing(ours, other) if isinstance(other, bytes) else {}

    def row(self, batch: int) -> Row:
        """Returns what the files take, and how much noise is in their answers."""
        images = _images(batch, self._size)
        answers = {name: self._tool.loaded(file, images.shape) for name, file in self._files.items()}
        logits = {name: answer(images) for name, answer in answers.items()}
        calls = {name: partial(answer, images) for name, answer in answers.items()}
        found = outside.timed(calls, turn_s=0.03, at_most_s=20)
        del calls["dense"]  # what counts is told by the two alone, in turn with nothing else
        pair = outside.timed(calls, turn_s=0.03, at_most_s=20)
        return Row(
            self._model,
            batch,
            found["dense"].seconds * 1e3,
            found["other"].ratio,
            found["ours"].ratio,
            pair["ours"].ratio,
            _sqnr(logits["dense"], logits["other"]),
            _sqnr(logits["dense"], logits["ours"]),
            self._differing,
        )


def _images(count: int, size: int) -> outside.Images:
    """Returns noise, which is what the random networks' statistics are of, `(count, 3, size, size)`."""
    made: outside.Images = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1)).numpy()
    return made


def _sqnr(exact: outside.Images, rounded: outside.Images) -> float:
    noise = np.square(rounded.astype(np.float64) - exact).sum()
    return float(10 * np.log10(np.square(exact.astype(np.float64)).sum() / max(noise, 1e-30)))


def _differing(ours: bytes, other: bytes) -> dict[str, tuple[int, int]]:
    """Returns how often each operator stands in the optimized form of both files, where that differs."""
    counted = outside.operators(ours), outside.operators(other)
    names = sorted({name for each in counted for name in each})
    pairs = {name: (counted[0].get(name, 0), counted[1].get(name, 0)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _print(rows: Sequence[Row], name: str) -> None:
    other = "nncf" if name == "openvino" else "onnxruntime"
    print(f"\n{name} {metadata.version(name)}, {other} {metadata.version(other)} on {cpu_name()}, one thread\n")
    print_table(_HEADINGS, [row.cells() for row in sorted(rows, key=lambda row: (row.model, row.batch))])
    done = [row for row in rows if not row.error]
    within = sum(row.ratio <= BOUND for row in done)
    print(f"\n{within} of {len(done)} rows within {BOUND}; {len(rows) - len(done)} not done.")


if __name__ == "__main__":
    main()
