"""What corrections of int8 bring, with images and without, on the CIFAR-10 study's ResNet-20.

    python -m studies.benchmarks.quantization_corrections --data imagefolder:PATH --weights resnet20.pt

Prints Markdown. All layers are int8, and scored as deployed: in an ONNX Runtime session, on the study's validation
images. The error is that of the logits against the float network's, root mean square, as a share of theirs. It tells
more than accuracy, which moves by chance by half a point on 2,000 images.
"""

import argparse
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from evaluators.artifact_builder import ArtifactBuilder
from evaluators.data import Splits
from evaluators.graph.template import Template
from evaluators.quantization.adaround import Learning
from evaluators.quantization.equalization import equalized, find_pairs, scaled
from evaluators.quantization.int8 import NO_GRIDS, Grids
from evaluators.quantization.scheme import Scheme
from evaluators.runtimes.cpu import cpu_name
from evaluators.runtimes.onnxruntime_cpu import OnnxRuntime, load
from search.config.overrides import Request
from search.loading.prepare import prepare
from spaces.candidate import Candidate
from spaces.dynamic.exit_network import ExitNetwork
from studies.benchmarks.markdown import print_table

_BATCH = 100
Row = tuple[str, ...]


@dataclass(frozen=True)
class Scored:
    """How an int8 network does.

    Args:
        accuracy: top-1, a share.
        error: of its logits, as a share of the float network's.
    """

    accuracy: float
    error: float

    @property
    def cells(self) -> Row:
        """What a table shows of it."""
        return f"{100 * self.accuracy:.2f}%", f"{100 * self.error:.1f}%"


@dataclass(frozen=True)
class Bench:
    """A network and what it is scored on."""

    network: ExitNetwork
    data: Splits

    @property
    def image(self) -> torch.Tensor:
        """One input, `(1, c, h, w)`."""
        return torch.from_numpy(self.data.calibration.images[:1])

    def score(self, scheme: Scheme, grids: Grids = NO_GRIDS) -> Scored:
        """Returns how the network does when all of it is made int8 by this scheme, or with weights on these grids."""
        network = equalized(self.network, self.image) if scheme.equalize else self.network
        calibration = self.data.calibration.images[:]
        builder = ArtifactBuilder(network, calibration, OnnxRuntime(), scheme=scheme)
        whole = Candidate({}, dict.fromkeys(builder.layers, "int8"))
        exact = self._logits(builder.build(network, replace(whole, precision={})).deployed[0])
        found = self._logits(builder.build(network, whole, grids=grids).deployed[0])
        right = found.argmax(1) == self.data.validation.labels
        return Scored(float(right.mean()), float(np.sqrt(np.mean((found - exact) ** 2) / np.mean(exact**2))))

    def float_accuracy(self) -> float:
        """Returns the share of the validation images that the float network is right about."""
        builder = ArtifactBuilder(self.network, self.data.calibration.images[:1], OnnxRuntime())
        logits = self._logits(builder.build(self.network, Candidate({}, {})).deployed[0])
        return float((logits.argmax(1) == self.data.validation.labels).mean())

    def _logits(self, file: bytes) -> NDArray[np.float32]:
        run, images = load(file, 1), self.data.validation.images
        return np.concatenate([run(images[at : at + _BATCH])[0] for at in range(0, len(images), _BATCH)])

    def learned(self, steps: int) -> Grids:
        """Returns the network's weights as AdaRound rounds them, in so many steps a layer."""
        calibration = self.data.calibration.images[:]
        builder = ArtifactBuilder(self.network, calibration, OnnxRuntime())
        whole = Candidate({}, dict.fromkeys(builder.layers, "int8"))
        return builder.learn_rounding(self.network, whole, calibration, Learning(steps))

    def rescaled(self, most: float, seed: int = 0) -> "Bench":
        """Returns the same function, whose paired channels are scaled by random factors from `1 / most` to `most`."""
        template, generator = Template(self.network, self.image), torch.Generator().manual_seed(seed)
        state = self.network.state_dict()
        factors = {
            pair: most ** (2 * torch.rand(len(state[pair.first.weight]), generator=generator, dtype=torch.float64) - 1)
            for pair in find_pairs(template)
        }
        made = copy.deepcopy(self.network)
        made.load_state_dict(scaled(state, factors))
        return Bench(made, self.data)


def corrections_table(pipeline: Bench, steps: int) -> list[Row]:
    """Returns how roundings and bias corrections do together."""
    schemes = Scheme(), Scheme(bias_correction="batchnorm"), Scheme(bias_correction="data")
    rows: list[Row] = [("rounding", "bias correction", "accuracy", "error of logits")]
    for name, grids in {"nearest": NO_GRIDS, f"adaround, {steps} steps": pipeline.learned(steps)}.items():
        rows += [(name, scheme.bias_correction, *pipeline.score(scheme, grids).cells) for scheme in schemes]
    return rows


def ranges_table(pipeline: Bench) -> list[Row]:
    """Returns how ranges with and without images do."""
    schemes = Scheme(), Scheme(ranges="batchnorm"), Scheme(ranges="batchnorm", bias_correction="batchnorm")
    rows: list[Row] = [("ranges", "bias correction", "accuracy", "error of logits")]
    return rows + [(scheme.ranges, scheme.bias_correction, *pipeline.score(scheme).cells) for scheme in schemes]


def equalization_table(benches: Mapping[str, Bench]) -> list[Row]:
    """Returns what equalization does for networks whose channels are alike, and are not."""
    rows: list[Row] = [("network", "weights", "equalize", "accuracy", "error of logits")]
    for name, pipeline in benches.items():
        for base in (Scheme(weights="per-tensor"), Scheme(weights="per-channel")):
            for scheme in (base, replace(base, equalize=True)):
                rows.append((name, scheme.weights, "yes" if scheme.equalize else "no", *pipeline.score(scheme).cells))
    return rows


def _print(rows: Sequence[Row]) -> None:
    print_table(rows[0], rows[1:])
    print()


def _pipeline(data: str, weights: str) -> Bench:
    study = Request(study="cifar10", weights=weights, data=data).to_study()
    loaded, built = prepare(study, False, lambda *_: None, lambda text: print(text))
    return Bench(ExitNetwork(built.network.eval(), [], []).eval(), loaded.splits)


def main() -> None:
    """Measures all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CIFAR-10, as for the search's --data")
    parser.add_argument("--weights", required=True, help="a state dict of the study's ResNet-20")
    parser.add_argument("--steps", type=int, default=Scheme().rounding_steps, help="of AdaRound, for each layer")
    given = parser.parse_args()
    pipeline = _pipeline(given.data, given.weights)
    right = pipeline.float_accuracy()
    print(f"\nIn float: {100 * right:.2f}% of {len(pipeline.data.validation)} validation images.\n")
    _print(ranges_table(pipeline))
    ill = {f"rescaled by up to {most}": pipeline.rescaled(most) for most in (10, 1000)}
    _print(equalization_table({"as trained": pipeline} | ill))
    _print(corrections_table(pipeline, given.steps))
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {cpu_name()}, seed 0.")


if __name__ == "__main__":
    main()
