"""Learned gates beside each other: what each saves of the FLOPs, what it costs in accuracy, and in time.

    python -m studies.benchmarks.gates train dgnet --data imagefolder:PATH --weights resnet20.pt --keep gates
    python -m studies.benchmarks.gates table --data imagefolder:PATH --weights resnet20.pt --keep gates

The first trains the CIFAR-10 study's ResNet-20 once more with the gates of one method, from the same weights, with the
same images and settings for all; `plain` is the same training without gates. What it comes to is kept in a folder. The
second measures everything that is in the folder, and prints Markdown: accuracy and latency of the file in ONNX Runtime,
one image at a time; FLOPs of each test image by what its gates opened.
"""

import argparse
import copy
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from evaluators.accuracy import AccuracyEvaluator
from evaluators.artifact_builder import ArtifactBuilder
from evaluators.data import Splits
from evaluators.deployed import DeployedCandidate
from evaluators.flops.evaluator import FlopsEvaluator, count_by_module
from evaluators.flops.masked import MaskedFlops, measure_need
from evaluators.latency.evaluator import LatencyEvaluator, Reference
from evaluators.runtimes.base import Target
from evaluators.runtimes.cpu import cpu_name
from evaluators.runtimes.onnxruntime_cpu import OnnxRuntime
from evaluators.runtimes.paired_timing import TimingProtocol
from search.config.overrides import Request
from search.config.sections import MasksSection, SkipsSection
from search.loading.prepare import prepare
from search.training.block_gates import calibrate_gates, skip_blocks, train_gates_once, with_gates
from search.training.dense import augmentation
from search.training.distillation import distillation_loss
from search.training.loop import Augment, Batch, TrainingBatches, fast_arithmetic, fit, load_weights, save
from search.training.masks import train_masks_once, with_masks
from spaces.candidate import Candidate
from spaces.dynamic.exit_network import ExitNetwork
from spaces.dynamic.masks import MASKS
from spaces.dynamic.masks.base import masks_of
from spaces.errors import UserError
from spaces.precision import uniform
from spaces.thresholds import Thresholds
from studies.benchmarks.markdown import print_table

PLAIN, SKIPS = "plain", ("aig", "skipnet")
METHODS = (PLAIN, *MASKS, *SKIPS)
HEADS = ["method", "asked for", "accuracy", "FLOPs", "gates' own", "latency fp32", "latency int8", "trained"]
_SECONDS = "seconds"
_TEMPERATURE = 2.0


@dataclass(frozen=True)
class RecoveryContext:
    """What all methods begin with.

    Args:
        trunk: the trained network.
        data: of the study.
        augment: varies training images.
        folder: for what trainings come to.
    """

    trunk: nn.Module
    data: Splits
    augment: Augment | None
    folder: Path

    def file(self, method: str, keep: float) -> Path:
        """Returns the file of a method's weights."""
        return self.folder / (f"{PLAIN}.pt" if method == PLAIN else f"{method}-{keep:g}.pt")


def train_method(ground: RecoveryContext, method: str, keep: float, epochs: float, rate: float) -> ExitNetwork:
    """Returns the network with a method's gates, trained now or loaded."""
    file, image = ground.file(method, keep), torch.from_numpy(ground.data.calibration.images[:1])
    begin, is_new = time.perf_counter(), not file.is_file()
    tell = lambda _step, done, total: print(f"{method}: {done}/{total}", flush=True)  # noqa: E731
    if method == PLAIN:
        network = ExitNetwork(_trained_plainly(ground, file, epochs, rate), (), ())
    elif method in SKIPS:
        skips = SkipsSection(blocks="all", gate=method, rate=keep, epochs=epochs, learning_rate=rate)
        trunk = copy.deepcopy(ground.trunk)
        network = with_gates(trunk, skip_blocks(trunk, skips, image), skips, image)
        train_gates_once(network, ground.data, skips, ground.augment, file, tell)
    else:
        masks = MasksSection(method=method, keep=keep, epochs=epochs, learning_rate=rate)
        masked = with_masks(ground.trunk, masks, image)
        train_masks_once(masked, ground.trunk, ground.data, masks, ground.augment, file, tell)
        network = ExitNetwork(masked, (), ())
    if is_new:
        told = {_SECONDS: time.perf_counter() - begin, "epochs": epochs, "rate": rate}
        file.with_suffix(".json").write_text(json.dumps(told))
    return network.eval()


def kept_method(ground: RecoveryContext, method: str, keep: float) -> ExitNetwork:
    """Returns the network with a method's gates as it was trained.

    Raises:
        UserError: the file is not whole, or of another version's network.
    """
    image, trunk = torch.from_numpy(ground.data.calibration.images[:1]), copy.deepcopy(ground.trunk)
    network = ExitNetwork(trunk, (), ())
    part: nn.Module = trunk
    if method in SKIPS:
        skips = SkipsSection(blocks="all", gate=method, rate=keep)
        part = network = with_gates(trunk, skip_blocks(trunk, skips, image), skips, image)
    elif method != PLAIN:
        part = with_masks(ground.trunk, MasksSection(method=method, keep=keep), image)
        network = ExitNetwork(part, (), ())
    file = ground.file(method, keep)
    if not load_weights(part, file):
        raise UserError(f"a kept training has the weights of its method's network, got {file}; train it again")
    if method in SKIPS:
        calibrate_gates(network.eval(), torch.from_numpy(ground.data.calibration.images[:]), keep)
    return network.eval()


def _trained_plainly(ground: RecoveryContext, file: Path, epochs: float, rate: float) -> nn.Module:
    """Returns the network without gates, trained as the others are: on labels and on what it answered before."""
    trunk, settings = copy.deepcopy(ground.trunk), MasksSection(epochs=epochs, learning_rate=rate)

    def step(batch: Batch) -> float:
        with fast_arithmetic():
            with torch.no_grad():
                answers = ground.trunk(batch.images).float()
            logits = trunk(batch.images).float()
        loss = distillation_loss(logits, answers, batch.labels, settings.distillation, _TEMPERATURE)
        loss.backward()
        return float(loss.detach())

    if not load_weights(trunk, file):
        batches = TrainingBatches(ground.data.train, settings.batch, settings.seed, ground.augment)
        tell = lambda done, total: print(f"{PLAIN}: {done}/{total}", flush=True)  # noqa: E731
        fit(trunk, step, batches, settings, file.with_suffix(".partial.pt"), tell)
        save(trunk.state_dict(), file)
    return trunk.eval()


class Bench:
    """Measures networks beside the one they come from.

    Args:
        ground: the network without gates, and the images.
    """

    def __init__(self, ground: RecoveryContext) -> None:
        self._ground = ground
        self._runtime = OnnxRuntime()
        self._target = Target("onnxruntime", self._runtime.device(), 1, 1)
        plain = ExitNetwork(ground.trunk, (), ()).eval()
        builder = ArtifactBuilder(plain, ground.data.calibration.images[:], self._runtime)
        self._references = {
            name: builder.build(plain, Candidate({}, dict.fromkeys(builder.layers, name))) for name in ("fp32", "int8")
        }

    def row(self, name: str, network: ExitNetwork, asked: float | None) -> list[str]:
        """Returns a row of the table."""
        told = json.loads(self._ground.file(name, asked or 0).with_suffix(".json").read_text())
        accuracy = {}
        latency = {}
        flops = None
        builder = ArtifactBuilder(network, self._ground.data.calibration.images[:], self._runtime)
        for precision in ("fp32", "int8"):
            skips = Thresholds(blocks=dict.fromkeys(network.skip_blocks, 0.0))
            candidate = Candidate({}, uniform(builder.layers, precision), skips)
            artifact = builder.build(network, candidate)
            subject = DeployedCandidate(
                network, candidate, artifact, self._ground.data.test, self._runtime, self._target
            )
            accuracy[precision] = AccuracyEvaluator().measure(subject)
            latency[precision] = self._latency(precision).measure(subject)
            flops = flops or self._flops(network, subject)
        assert flops is not None
        mean, spread, own = flops
        return [
            name,
            f"{asked:.0%}" if asked else "-",
            f"{accuracy['fp32'].value:.2%} (int8 {accuracy['int8'].value:.2%})",
            f"{mean:.1%} ± {spread:.1%}",
            f"{own:.1%}",
            *(f"{latency[each].value:.2f}" for each in ("fp32", "int8")),
            f"{told['epochs']:g} epochs, {told[_SECONDS] / 60:.0f} min",
        ]

    def _latency(self, precision: str) -> LatencyEvaluator:
        """Returns what tells latency as a multiple of the network without gates in the same precision."""
        references = {precision: Reference(self._references[precision].deployed[0], 1.0)}
        protocol = TimingProtocol(turns=20, calls=5_000, limit_s=6.0, half_width=0.01)
        return LatencyEvaluator(references, self._runtime, self._target, protocol)

    def _flops(self, network: ExitNetwork, subject: DeployedCandidate) -> tuple[float, float, float]:
        """Returns the mean over test images, its standard deviation, and the gates' own, as shares of all FLOPs."""
        image, trunk = torch.from_numpy(self._ground.data.calibration.images[:1]), self._ground.trunk
        if masks_of(network):
            counted = MaskedFlops(trunk, network.trunk, image)
            share = measure_need(network.trunk, counted, self._ground.data.test.images[:]).flops / counted.dense
            return float(share.mean()), float(share.std()), counted.gates / counted.dense
        dense = sum(count_by_module(trunk, image).values())
        gates = sum(count for path, count in count_by_module(network, image).items() if path.startswith("skips."))
        found = FlopsEvaluator(network, image).measure(subject)  # whose spread is that of the mean
        return found.value / dense, found.spread * found.n**0.5 / dense, gates / dense


def _kept(ground: RecoveryContext) -> list[tuple[str, float | None]]:
    """Returns the methods in the folder, with what was asked of each."""
    found: list[tuple[str, float | None]] = []
    for method in METHODS:
        if method == PLAIN:
            found += [(PLAIN, None)] if ground.file(PLAIN, 0).is_file() else []
            continue
        files = sorted(file for file in ground.folder.glob(f"{method}-*.pt") if file.with_suffix(".json").is_file())
        found += [(method, float(file.stem.partition("-")[2])) for file in files]
    return found


def main() -> None:
    """Trains one method, or prints the table of all that are trained."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "table"])
    parser.add_argument("method", nargs="?", choices=METHODS)
    parser.add_argument("--data", required=True, help="CIFAR-10, as for the search's --data")
    parser.add_argument("--weights", required=True, help="a state dict of the study's ResNet-20")
    parser.add_argument("--keep", type=Path, required=True, help="folder for what trainings come to")
    parser.add_argument("--share", type=float, default=0.55, help="of the FLOPs that are aimed at")
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--rate", type=float, default=0.05, help="learning rate")
    given = parser.parse_args()
    torch.set_num_threads(1)
    study = Request(study="cifar10", weights=given.weights, data=given.data).to_study()
    loaded, built = prepare(study, False, lambda *_: None, lambda text: print(text))
    given.keep.mkdir(parents=True, exist_ok=True)
    augment = augmentation(study.data.augment) if study.data.augment else None
    trunk = built.network.eval().to(memory_format=torch.channels_last)  # a training step then takes 0.86 of the time
    ground = RecoveryContext(trunk, loaded.splits, augment, given.keep)
    if given.what == "train":
        if given.method is None:
            parser.error("a method is named")
        train_method(ground, given.method, given.share, given.epochs, given.rate)
        return
    pipeline = Bench(ground)
    rows = [pipeline.row(method, kept_method(ground, method, asked or 0.0), asked) for method, asked in _kept(ground)]
    print_table(HEADS, rows)
    print(f"\nOne thread, batch 1, torch {torch.__version__}, {OnnxRuntime().version()}, {cpu_name()}, seed 0.")


if __name__ == "__main__":
    main()
