"""What skipping blocks costs in accuracy and saves in time, on the CIFAR-10 study's ResNet-20, one image at a time.

    python -m studies.benchmarks.skipping --data imagefolder:PATH --weights resnet20.pt
    python -m studies.benchmarks.skipping --sizes mobilenet_v2 resnet18 resnet50

The first trains the network once more with gates around two blocks, and around all that have an identity shortcut, and
prints Markdown. Each gate's threshold is set so that a share of the calibration images runs its block, given what the
gates before it decided. Accuracy, decisions and latency are of the files in ONNX
Runtime, on the test images; latency is the ratio to the network without gates in the same precision.

The second tells from which size of network on skipping can pay: larger networks with untrained gates, on noise.
"""

import argparse
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torchvision
from torch import Tensor

from evaluators.accuracy import AccuracyEvaluator
from evaluators.artifact_builder import ArtifactBuilder
from evaluators.data import LabelledImages, Splits
from evaluators.deployed import DeployedCandidate
from evaluators.flops.evaluator import FlopsEvaluator
from evaluators.latency.evaluator import LatencyEvaluator, Reference
from evaluators.measurement import Measurement
from evaluators.runtimes.base import Target
from evaluators.runtimes.cpu import cpu_name
from evaluators.runtimes.onnxruntime_cpu import OnnxRuntime
from evaluators.runtimes.paired_timing import TimingProtocol
from search.config.overrides import Request
from search.config.study import ExitsSection, SkipsSection, Study
from search.loading.models import BuiltModel
from search.loading.prepare import prepare
from search.training.block_gates import with_gates
from search.training.dense import trained_network
from spaces.candidate import Candidate
from spaces.dynamic.exit_network import ExitNetwork
from spaces.dynamic.skippable_blocks import find_blocks
from spaces.precision import uniform
from spaces.thresholds import Thresholds

TWO = ("layer2.1", "layer3.1")
SHARES = (None, 0.8, 0.6, 0.4)
"""Of the images, that each gate runs its block for; None where gates are left out."""
PRECISIONS = ("fp32", "int8")
HEADS = ["blocks", "precision", "wanted to run", "accuracy", "blocks run", "FLOPs", "latency", "all blocks run"]


@dataclass(frozen=True)
class Measured:
    """One row of the table.

    Args:
        accuracy: of the deployed files.
        flops: mean, of what each image ran.
        latency: told as a multiple of the network without gates in the same precision.
    """

    accuracy: Measurement
    flops: Measurement
    latency: Measurement


class Bench:
    """One network with its gates, in both precisions."""

    def __init__(self, network: ExitNetwork, data: Splits) -> None:
        self.network = network
        self.data = data
        self.runtime = OnnxRuntime()
        self.target = Target("onnxruntime", self.runtime.device(), 1, 1)
        self.builder = ArtifactBuilder(network, data.calibration.images[:], self.runtime)
        self._flops = FlopsEvaluator(network, torch.from_numpy(data.calibration.images[:1]))
        plain = {name: self.builder.build(network, self.candidate(name, {})) for name in PRECISIONS}
        # A reference of one second: what is told as seconds is a ratio.
        references = {name: Reference(artifact.deployed[0], 1.0) for name, artifact in plain.items()}
        protocol = TimingProtocol(turns=20, calls=5_000, limit_s=6.0, half_width=0.01)
        self._latency = LatencyEvaluator(references, self.runtime, self.target, protocol)

    def candidate(self, precision: str, thresholds: dict[str, float]) -> Candidate:
        """Returns the version with these thresholds, by block; blocks without one are always run."""
        return Candidate({}, uniform(self.builder.layers, precision), Thresholds(blocks=thresholds))

    def thresholds(self, share: float) -> dict[str, float]:
        """Returns the threshold with which each gate runs its block for a share of the calibration images."""
        found: dict[str, float] = {}

        def decide(block: str, logits: Tensor) -> Tensor:
            found[block] = float(torch.quantile(logits, 1 - share))
            return (logits >= found[block]).float()

        with torch.no_grad():
            self.network.run_trunk(torch.from_numpy(self.data.calibration.images[:]), decide)
        return found

    def measure(self, precision: str, thresholds: dict[str, float]) -> Measured:
        """Returns what a version measures."""
        candidate = self.candidate(precision, thresholds)
        artifact = self.builder.build(self.network, candidate)
        subject = DeployedCandidate(self.network, candidate, artifact, self.data.test, self.runtime, self.target)
        measured = AccuracyEvaluator().measure(subject), self._flops.measure(subject), self._latency.measure(subject)
        return Measured(*measured)


def rows(name: str, pipeline: Bench, shares: Sequence[float | None] = SHARES) -> Iterator[list[str]]:
    """Yields the table's rows for one network with gates."""
    dense = pipeline.measure("fp32", {}).flops.value
    for precision in PRECISIONS:
        for share in shares:
            found = pipeline.measure(precision, pipeline.thresholds(share) if share else {})
            notes = found.flops.notes
            ran = f"{notes['blocks_run']:.0%} ± {notes['blocks_run_std']:.0%}" if "blocks_run" in notes else "100%"
            yield [
                name,
                precision,
                f"{share:.0%}" if share else "gates left out",
                f"{found.accuracy.value:.2%} ± {found.accuracy.spread * 100:.1f}",
                ran,
                f"{found.flops.value / dense:.0%}",
                f"{found.latency.value:.3f} ± {found.latency.spread * 1.96:.3f}",
                f"{found.latency.others['worst']:.3f}",
            ]


def sizes(names: Sequence[str]) -> None:
    """Prints what larger networks save when their untrained gates skip two in five blocks, on noise."""
    table = [HEADS]
    rng = np.random.default_rng(0)
    noise = LabelledImages(rng.normal(size=(40, 3, 224, 224)).astype(np.float32), np.zeros(40, dtype=np.int64))
    image = torch.from_numpy(noise.images[:1])
    for name in names:
        trunk = torchvision.models.get_model(name).eval()
        blocks = find_blocks(trunk, image)
        network = with_gates(trunk, blocks, SkipsSection(blocks="all"), image)
        pipeline = Bench(network, Splits(noise, noise.head(20), noise, noise, classes=1000))
        table += rows(f"{name} ({len(blocks.gated)})", pipeline, [0.6])
    _print(table)


def _print(table: list[list[str]]) -> None:
    for cells in [table[0], ["---"] * len(table[0]), *table[1:]]:
        print(f"| {' | '.join(cells)} |")
    print(
        f"\nOne thread, batch 1, torch {torch.__version__}, {OnnxRuntime().version()}, {cpu_name()}, seed 0.",
        flush=True,
    )


def _given(study: Study, built: BuiltModel, data: Splits) -> ExitNetwork:
    """Returns a network of the study, trained now or before, from its own copy of the weights."""
    own = replace(built, network=copy.deepcopy(built.network))
    return trained_network(study, own, data, lambda step, done, total: print(f"  {step}: {done}/{total}", flush=True))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="CIFAR-10, as for the search's --data")
    parser.add_argument("--weights", help="a state dict of the study's ResNet-20")
    parser.add_argument("--sizes", nargs="+", help="torchvision's networks, for the table of larger ones")
    parser.add_argument("--epochs", type=float, default=1, help="of the training with gates")
    parser.add_argument("--blocks", choices=["two", "all"], action="append", help="which networks; both if not given")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.sizes:
        sizes(given.sizes)
        return
    if not (given.data and given.weights):
        parser.error("--data and --weights are needed")
    study = Request(study="cifar10", weights=given.weights, data=given.data).to_study()
    study = study.model_copy(update={"exits": ExitsSection(after=())})
    loaded, built = prepare(study, False, lambda *_: None, lambda text: print(text))
    table = [HEADS]
    plain = Bench(_given(study, built, loaded.splits), loaded.splits)
    for precision in PRECISIONS:
        accuracy = plain.measure(precision, {}).accuracy
        told = f"{accuracy.value:.2%} ± {accuracy.spread * 100:.1f}"
        table.append(["as given", precision, "-", told, "100%", "100%", "1", "1"])
    for name in given.blocks or ["two", "all"]:
        skips = SkipsSection(blocks=TWO if name == "two" else "all", epochs=given.epochs)
        network = _given(study.model_copy(update={"skips": skips}), built, loaded.splits)
        label = f"{name} ({len(network.skip_blocks)})"
        table += rows(label, Bench(network, loaded.splits))
    _print(table)


if __name__ == "__main__":
    main()
