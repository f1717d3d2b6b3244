"""Recurrent networks that leave out updates, on handwritten digits read row by row.

    python -m studies.benchmarks.recurrent [--rows 32 8] [--seeds 5] [--hidden 64]

scikit-learn's digits as the digits study shows them, at 32x32, or at their own 8x8 pixels: a row is a step. A GRU is
trained; a Skip RNN goes on from it, for several costs of an update; a predictor beside the frozen GRU is tried at
several thresholds, and one of them is chosen on the validation images. Everything is told of the test images. Times are
of one sequence in ONNX Runtime on one thread: one step is a file, run in a loop, against the same loop that leaves out
nothing, and against the whole GRU as one operator.
"""

import argparse
import copy
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from evaluators.data import LabelledImages
from evaluators.recurrent import Reader, StepLoop, WholeSequence, time_readers
from evaluators.runtimes.cpu import cpu_name
from evaluators.runtimes.ort import OnnxRuntime
from evaluators.timing import Protocol
from search.recurrent import Sequences, Training, train_classifier, train_predictor, train_skip_rnn
from spaces.recurrent.classifier import RecurrentClassifier
from spaces.recurrent.predictor import SkipPredictor
from spaces.recurrent.skiprnn import SkipRnn
from studies.benchmarks.markdown import print_table
from studies.digits.data import splits

COSTS = (0.1, 0.3, 1.0)
"""Of all updates together, added to the loss."""
THRESHOLDS = (-2.0, -1.5, -1.0, -0.5, 0.0)
_AT_MOST = 0.01
"""So much accuracy on the validation images may be lost for fewer updates."""


@dataclass(frozen=True)
class Result:
    """What one network came to on test sequences.

    Args:
        accuracy: of its answers.
        updates: mean share of the steps that updated the state.
        beside: its time, as a multiple of the loop's that leaves out nothing.
    """

    accuracy: float
    updates: float
    beside: float


def sequences(data: LabelledImages, rows: int) -> Sequences:
    """Returns images as sequences of so many rows, `(n, rows, rows)`."""
    images = F.adaptive_avg_pool2d(torch.from_numpy(data.images[:]), rows)
    return Sequences(images[:, 0], torch.from_numpy(data.labels[:]))


def read_all(reader: Reader, data: Sequences) -> tuple[float, float]:
    """Returns the accuracy of a reader, and the share of the steps that updated the state."""
    found = [reader(sequence) for sequence in data.steps.numpy()]
    right = np.mean([int(read.logits.argmax()) for read in found] == data.labels.numpy())
    return float(right), float(np.mean([read.updates for read in found])) / data.steps.shape[1]


def measured(reader: Reader, loop: Reader, test: Sequences) -> Result:
    """Returns what a reader comes to on the test sequences, and its time beside the loop that leaves out nothing."""
    protocol = Protocol(burst=2, turns=12, calls=100, limit_s=1.0)
    timing = time_readers(reader, loop, test.steps[:40].numpy(), protocol)
    return Result(*read_all(reader, test), timing.ratio)


def run(seed: int, hidden: int, size: int) -> dict[str, Result]:
    """Returns what each way comes to, by its name, for one seed."""
    data = splits()
    train, validation, test = (sequences(part, size) for part in (data.train, data.validation, data.test))
    torch.manual_seed(seed)
    plain = RecurrentClassifier(train.steps.shape[2], hidden, data.classes)
    train_classifier(plain, train, Training(seed=seed))
    loop = StepLoop(plain)
    found = {"every update": measured(loop, loop, test)}
    found["whole GRU, one operator"] = measured(WholeSequence(plain, train.steps.shape[1]), loop, test)
    found |= _skipping(plain, loop, train, test, seed)
    return found | _predicted(plain, loop, train, validation, test, seed)


def _skipping(
    plain: RecurrentClassifier, loop: StepLoop, train: Sequences, test: Sequences, seed: int
) -> dict[str, Result]:
    found = {}
    for cost in COSTS:
        torch.manual_seed(seed)
        network = SkipRnn(copy.deepcopy(plain))
        train_skip_rnn(network, train, Training(seed=seed), cost / train.steps.shape[1])
        found[f"Skip RNN, cost {cost:g}"] = measured(StepLoop(network.network, network), loop, test)
    return found


def _predicted(
    plain: RecurrentClassifier, loop: StepLoop, train: Sequences, validation: Sequences, test: Sequences, seed: int
) -> dict[str, Result]:
    torch.manual_seed(seed)
    predictor = SkipPredictor(plain.cell.input_size, plain.cell.hidden_size)
    train_predictor(predictor, plain, train, Training(epochs=20, batch=200, seed=seed))
    found, able = {}, []
    whole, _ = read_all(loop, validation)
    for threshold in THRESHOLDS:
        reader = StepLoop(plain, predictor, threshold)
        found[f"predictor, threshold {threshold:g}"] = measured(reader, loop, test)
        accuracy, updates = read_all(reader, validation)
        if accuracy >= whole - _AT_MOST:
            able.append((updates, threshold))
    if able:
        found["predictor, chosen on validation"] = found[f"predictor, threshold {min(able)[1]:g}"]
    return found


def rows(results: list[Mapping[str, Result]]) -> list[list[str]]:
    """Returns the table's rows: means over seeds, the lowest and the highest behind them."""
    names = dict.fromkeys(name for result in results for name in result)
    return [
        [
            name,
            _told([result[name].accuracy for result in results if name in result], 100, "%"),
            _told(
                [result[name].accuracy - result["every update"].accuracy for result in results if name in result], 100
            ),
            _told([result[name].updates for result in results if name in result], 100, "%"),
            _told([result[name].beside for result in results if name in result], 1),
        ]
        for name in names
    ]


def _told(values: list[float], factor: float, unit: str = "") -> str:
    low, mean, high = (factor * each for each in (min(values), float(np.mean(values)), max(values)))
    digits = 1 if factor > 1 else 2
    return f"{mean:.{digits}f}{unit} ({low:.{digits}f} to {high:.{digits}f})"


def main() -> None:
    """Prints a table for each length of sequences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 8])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=64)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for size in given.rows:
        results: list[Mapping[str, Result]] = [run(seed, given.hidden, size) for seed in range(given.seeds)]
        print(f"\n{size} steps of {size} pixels, {given.hidden} wide, {given.seeds} seeds:\n")
        print_table(["", "accuracy", "points against every update", "updates made", "time"], rows(results))
    print(f"\nOne thread, torch {torch.__version__}, {OnnxRuntime().version()}, {cpu_name()}.", flush=True)


if __name__ == "__main__":
    main()
