"""What skipping updates of a recurrent network costs in accuracy and saves in time, on digits read row by row.

    python -m studies.recurrent.benchmark [--task rows|scan|halves] [--seeds 5]
    python -m studies.recurrent.benchmark --sizes 32 64 128 256 512

The first trains a GRU on scikit-learn's digits, from it a Skip RNN for each cost of an update, and beside it, frozen,
two predictors, and prints Markdown. On the validation images, thresholds are found, and of each method the most
accurate that makes at most 60% of the updates is chosen. What is printed was measured on the test images, in the loop
that is deployed, its files in ONNX Runtime. The second tells from which size of state on skipping can pay: untrained
networks that skip three updates of four.
"""

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evaluators.data import LabelledImages, Splits
from evaluators.runtimes.cpu import cpu_name
from evaluators.runtimes.onnxruntime_cpu import OnnxRuntime
from evaluators.runtimes.paired_timing import TimingProtocol
from search.config.sections import FittingSection
from search.training.loop import TrainingBatches
from studies.benchmarks.markdown import print_table
from studies.digits.data import augment, splits
from studies.recurrent.gru import GruClassifier
from studies.recurrent.loops import EveryStep, File, Loop, PredictedLoop, SkipLoop
from studies.recurrent.measuring import Skimming, load_file, skimming, time_beside
from studies.recurrent.onnx_files import head_file, predictor_file, skip_step_file, step_file, whole_file
from studies.recurrent.skip_predictor import SkipPredictor, skimmed
from studies.recurrent.skip_rnn import SkipGruClassifier
from studies.recurrent.training import LABELS, train_classifier, train_predictor, train_skipping

HIDDEN = 64
SHARES = (0.95, 0.9, 0.8, 0.59)
"""Of the updates of the validation images, that a predictor's thresholds leave."""
_MOST_UPDATES = 0.6
"""What is chosen makes no more of the updates, validation images read, if anything does."""
_SURE, _HALVINGS = 16.0, 14
"""Logits of a predictor between which its threshold is looked for, and in how many steps."""
_PROTOCOL = TimingProtocol(burst=8, dropped=3, turns=20, calls=100_000, limit_s=4.0, half_width=0.02)


@dataclass(frozen=True)
class Task:
    """Digits as sequences.

    Args:
        size: of the images, in pixels.
        features: pixels that one step reads.
        epochs: of the plain network and of each Skip RNN.
        costs: of an update, one for each Skip RNN.
    """

    size: int
    features: int
    epochs: tuple[int, int]
    costs: tuple[float, ...]

    @property
    def steps(self) -> int:
        """The length of a sequence."""
        return self.size**2 // self.features

    def in_steps(self, images: Tensor) -> Tensor:
        """Returns images `(n, 1, size, size)` as sequences `(n, t, features)`."""
        return images.reshape(len(images), self.steps, self.features)


TASKS: Mapping[str, Task] = {
    "rows": Task(32, 32, (30, 30), (0.005, 0.01, 0.02, 0.05)),
    "scan": Task(8, 8, (60, 80), (0.01, 0.02, 0.05)),
    "halves": Task(8, 4, (60, 80), (0.005, 0.01, 0.03)),
}
"""By name: the study's images row by row, and the scans that they are enlarged from, row by row and by half rows."""


@dataclass(frozen=True)
class Version:
    """A network and what it does.

    Args:
        method: its name.
        setting: the cost of an update, or the share of the updates that was wanted.
        loop: is deployed.
        validation: what it does with the validation images.
        test: the same with the test images.
    """

    method: str
    setting: float
    loop: Loop
    validation: Skimming
    test: Skimming


class Bench:
    """All networks of one seed."""

    def __init__(self, task: Task, data: Splits, seed: int) -> None:
        self.task = task
        self.data = data
        self.seed = seed
        torch.manual_seed(seed)
        self.plain = GruClassifier(task.features, HIDDEN, data.classes)
        train_classifier(self.plain, task.in_steps, self._batches(), self._settings(task.epochs[0], 0.3))
        self.head = load_file(head_file(self.plain.head), 1)
        self.step = load_file(step_file(self.plain.cell), 1)
        self.whole = load_file(whole_file(self.plain, task.steps), 1)
        self.every = self._version("every step", 0.0, EveryStep(self.step, self.head, HIDDEN))

    def sequences(self, part: LabelledImages) -> NDArray[np.float32]:
        """Returns images as a loop reads them, `(n, t, 1, features)`."""
        return part.images[:].reshape(len(part), self.task.steps, 1, self.task.features)

    def skip_rnns(self) -> Iterator[Version]:
        """Yields a trained Skip RNN for each cost."""
        for cost in self.task.costs:
            torch.manual_seed(self.seed)
            network = SkipGruClassifier(self.plain)
            settings = self._settings(self.task.epochs[1], 0.1)
            train_skipping(network, self.plain, cost, self.task.in_steps, self._batches(), settings)
            yield self._version("Skip RNN", cost, skip_loop(network))

    def predicted(self, label: str) -> Iterator[Version]:
        """Yields the frozen network beside a predictor that learned from these labels, at each threshold."""
        images = torch.from_numpy(self.data.train.images[:])
        predictor = train_predictor(self.plain, label, self.task.in_steps(images), self.seed)
        asked = load_file(predictor_file(predictor, self.plain.cell), 1)
        for share in SHARES:
            loop = PredictedLoop(self.step, self.head, asked, HIDDEN, self._threshold(predictor, share))
            yield self._version(f"predictor, {label}", share, loop)

    def _threshold(self, predictor: SkipPredictor, share: float) -> float:
        """Returns the threshold that leaves about this share of the updates of the validation images."""
        sequences = self.task.in_steps(torch.from_numpy(self.data.validation.images[:]))
        low, high = -_SURE, _SURE
        for _ in range(_HALVINGS):  # between logits: what can be skipped may be so more than 99.9% of the time
            middle = (low + high) / 2
            with torch.no_grad():
                found = skimmed(self.plain, predictor, float(torch.sigmoid(torch.tensor(middle))), sequences)
            low, high = (middle, high) if found.updates.mean() < share else (low, middle)
        return float(torch.sigmoid(torch.tensor(high)))

    def chosen(self, versions: Sequence[Version]) -> Version:
        """Returns the most accurate on the validation images of those that make few updates; if none does, of all."""
        few = [version for version in versions if version.validation.updated <= _MOST_UPDATES]
        return max(few or versions, key=lambda version: (version.validation.accuracy, -version.validation.updated))

    def times(self, version: Version) -> list[str]:
        """Returns the time per sequence beside the loop that skips nothing, and beside the whole network's file."""
        rivals = (self.every.loop, self.whole)
        return [ratio(version.loop, rival, self.sequences(self.data.test)) for rival in rivals]

    def _version(self, method: str, setting: float, loop: Loop) -> Version:
        parts = (self.data.validation, self.data.test)
        found = [skimming(loop, self.sequences(part), part.labels) for part in parts]
        return Version(method, setting, loop, *found)

    def _batches(self) -> TrainingBatches:
        return TrainingBatches(self.data.train, 50, self.seed, augment)

    def _settings(self, epochs: int, rate: float) -> FittingSection:
        return FittingSection(epochs=epochs, batch=50, learning_rate=rate, weight_decay=1e-4, clip=1.0, seed=self.seed)


def skip_loop(network: SkipGruClassifier) -> SkipLoop:
    """Returns a Skip RNN as it is deployed."""
    step, head = load_file(skip_step_file(network), 1), load_file(head_file(network.head), 1)
    return SkipLoop(step, head, network.skip.cell.hidden_size)


def ratio(loop: Loop, rival: Loop | File, sequences: NDArray[np.float32]) -> str:
    """Returns the ratio of the times, with half of its 95% interval."""
    timing = time_beside(loop, rival, sequences, _PROTOCOL)
    return f"{timing.ratio:.2f} ± {timing.ratio * timing.half_width:.2f}"


def pipeline(task: Task, seeds: int) -> None:
    """Prints what all settings do, mean over seeds, and what is chosen for each seed, with its time."""
    data, chosen = splits(task.size), []
    settings: dict[tuple[str, float], list[tuple[float, float, float]]] = {}
    for seed in range(seeds):
        begin, made = time.perf_counter(), Bench(task, data, seed)
        every = made.every.test.accuracy
        families = [[made.every], list(made.skip_rnns()), *(list(made.predicted(label)) for label in LABELS)]
        for version in (each for family in families for each in family):
            row = (version.test.updated, version.test.accuracy, version.test.accuracy - every)
            settings.setdefault((version.method, version.setting), []).append(row)
        picks = [made.chosen(family) for family in families]
        chosen += [_chosen_row(seed, made, pick) for pick in picks]
        print(f"seed {seed}: {time.perf_counter() - begin:.0f} s", flush=True)
    print_table(["method", "cost or share", "updates", "accuracy", "points, worst and best"], _means(settings))
    print()
    heads = ["seed", "method", "chosen", "updates", "accuracy", "points", "time, every step = 1", "time, one file = 1"]
    print_table(heads, sorted(chosen, key=lambda row: (row[1] != "every step", row[1], row[0])))


def _chosen_row(seed: int, made: Bench, pick: Version) -> list[str]:
    points = (pick.test.accuracy - made.every.test.accuracy) * 100
    shares = [f"{pick.test.updated:.1%}", f"{pick.test.accuracy:.2%}", f"{points:+.2f}"]
    return [str(seed), pick.method, f"{pick.setting:g}", *shares, *made.times(pick)]


def _means(settings: dict[tuple[str, float], list[tuple[float, float, float]]]) -> Iterator[list[str]]:
    for (method, setting), rows in settings.items():
        updates, accuracy, points = np.array(rows).T
        told = f"{points.mean() * 100:+.2f}, {points.min() * 100:+.2f} to {points.max() * 100:+.2f}"
        yield [method, f"{setting:g}", f"{updates.mean():.1%}", f"{accuracy.mean():.2%}", told]


def sizes(hidden: Sequence[int]) -> Iterator[list[str]]:
    """Yields what untrained networks of these sizes save when they skip three updates of four."""
    task = TASKS["rows"]
    noise = np.random.default_rng(0).random((1, task.steps, 1, task.features), np.float32)
    for size in hidden:
        plain = GruClassifier(task.features, size, 10)
        network = SkipGruClassifier(plain)
        torch.nn.init.zeros_(network.skip.due.weight)
        torch.nn.init.constant_(network.skip.due.bias, float(torch.logit(torch.tensor(0.14))))
        predictor = SkipPredictor(task.features, size)
        torch.nn.init.constant_(predictor.last.bias, -20.0)
        step, head = load_file(step_file(plain.cell), 1), load_file(head_file(plain.head), 1)
        asked = load_file(predictor_file(predictor, plain.cell), 1)
        every, whole = EveryStep(step, head, size), load_file(whole_file(plain, task.steps), 1)
        never = PredictedLoop(step, head, asked, size, 1.0)
        loop = skip_loop(network)
        ratios = [ratio(loop, every, noise), ratio(loop, whole, noise), ratio(every, whole, noise)]
        yield [str(size), f"{loop(noise[0]).updates.mean():.0%}", *ratios, ratio(never, every, noise)]


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(TASKS), default="rows")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--sizes", nargs="+", type=int, help="values of the state, for the table of sizes")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.sizes:
        heads = ["state", "updates", "every step = 1", "one file = 1", "every step / one file", "predictor, no skips"]
        print_table(heads, sizes(given.sizes))
    else:
        pipeline(TASKS[given.task], given.seeds)
    print(f"\nOne thread, torch {torch.__version__}, {OnnxRuntime().version()}, {cpu_name()}.", flush=True)


if __name__ == "__main__":
    main()
