"""The same network on ONNX Runtime and on OpenVINO: what it answers, and how fast, as Markdown.

python -m studies.benchmarks.runtimes --weights resnet20.pt --data imagefolder:PATH
"""

import argparse
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import cycle

import numpy as np
import torch

from evaluators.artifact import Artifact
from evaluators.artifact_builder import ArtifactBuilder
from evaluators.data import LabelledImages
from evaluators.deployed import predict
from evaluators.runtimes.base import Fp32In, Runtime, TimedBatch
from evaluators.runtimes.cpu import cpu_name
from evaluators.runtimes.paired_timing import TimingProtocol, time_pair
from evaluators.runtimes.registry import runtime
from search.config.study import DataSection, ModelSection, Study, load_study
from search.loading.prepare import prepare
from spaces.candidate import Candidate
from spaces.dynamic.exit_network import ExitNetwork

PROTOCOL = TimingProtocol(half_width=0.01, limit_s=3.0)
OCCASIONS = 3
BATCHES = (1, 8)
_TWO = ("onnxruntime", "openvino")


@dataclass(frozen=True)
class Version:
    """A way to write the dense network.

    Args:
        name: for people.
        precisions: of each layer in turn, over and over.
        fp32_in: what fp32 layers run in.
    """

    name: str
    precisions: tuple[str, ...]
    fp32_in: Fp32In = "fp32"


VERSIONS = (
    Version("fp32", ("fp32",)),
    Version("fp32 in bf16", ("fp32",), "bf16"),
    Version("int8", ("int8",)),
    Version("int8 and fp32, three layers each", ("int8",) * 3 + ("fp32",) * 3),
    Version("int8, fp32 in bf16, three layers each", ("int8",) * 3 + ("fp32",) * 3, "bf16"),
    Version("weights stored in int4", ("int4",)),
    Version("int8 and int4 in turn", ("int8", "int4")),
)


def main() -> None:
    """Prints a table of accuracies and one of speeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", required=True, help="a state dict of the CIFAR ResNet-20")
    parser.add_argument("--data", required=True, help="its images, as `--data` of the command takes them")
    parser.add_argument("--images", type=int, default=10_000, help="so many test images at most")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    study = _study(given.weights, given.data, given.images)
    loaded, built = prepare(study, False, lambda *_: None, lambda _: None)
    network, splits = ExitNetwork(built.network.eval(), [], []).eval(), loaded.splits
    calibration = splits.calibration.images[:]
    libraries = {name: runtime(name) for name in _TWO}
    artifacts = {version: _artifact(network, calibration, version) for version in VERSIONS}
    print(f"{cpu_name()}, {', '.join(each.version() for each in libraries.values())}, torch {torch.__version__}\n")
    _print_accuracies(artifacts, libraries, splits.validation, splits.test)
    _print_speeds(artifacts, libraries, splits.validation)


def _study(weights: str, data: str, images: int) -> Study:
    study = load_study("cifar10")
    sections = {
        "model": ModelSection(source=study.model.source, weights=weights),
        "data": DataSection(source=data, mean=study.data.mean, std=study.data.std, test=images),
        "training": None,
    }
    return study.model_copy(update=sections)


def _artifact(network: ExitNetwork, calibration: np.ndarray, version: Version) -> Artifact:
    builder = ArtifactBuilder(network, calibration, runtime("openvino"), version.fp32_in)
    precision = dict(zip(builder.layers, cycle(version.precisions), strict=False))
    return builder.build(network, Candidate({}, precision))


def _print_accuracies(
    artifacts: Mapping[Version, Artifact],
    libraries: Mapping[str, Runtime],
    validation: LabelledImages,
    test: LabelledImages,
) -> None:
    print(f"| version | bytes | boundaries | {len(validation)} validation images | {len(test)} test images | apart |")
    print("|---|---|---|---|---|---|")
    for version, artifact in artifacts.items():
        rights = np.array(
            [[_right(artifact, libraries[name], images) for name in _TWO] for images in (validation, test)]
        )
        counts = (len(validation), len(test))
        cells = [
            f"{here / count:.2%} / {there / count:.2%}" for (here, there), count in zip(rights, counts, strict=True)
        ]
        apart = abs(np.diff(rights.sum(axis=0))[0]) / sum(counts) * 100
        print(f"| {version.name} | {artifact.size} | {artifact.boundaries} | {' | '.join(cells)} | {apart:.2f} |")
    print("\nAccuracy on ONNX Runtime / on OpenVINO, and the points between the two over all of these images.\n")


def _right(artifact: Artifact, library: Runtime, images: LabelledImages) -> int:
    """Returns how many images are answered right."""
    return int(predict(library.open(artifact.deployed, [], 1), 1, images, 100).correct.sum())


def _print_speeds(
    artifacts: Mapping[Version, Artifact], libraries: Mapping[str, Runtime], images: LabelledImages
) -> None:
    plain = artifacts[VERSIONS[0]]
    heads = [f"{name}, batch {batch}" for name in _TWO for batch in BATCHES]
    print(f"| version | {' | '.join(heads)} |\n|---|{'---|' * len(heads)}")
    for version, artifact in artifacts.items():
        cells = [_speed(artifact, libraries[name], plain, images, batch) for name in _TWO for batch in BATCHES]
        print(f"| {version.name} | {' | '.join(cells)} |")
    print(
        "\nHow many times as fast as the same network in fp32 on ONNX Runtime, one thread, by the thread's CPU time,"
        f" in turns with it; the median of {OCCASIONS} loads, and the lowest and the highest."
    )


def _speed(artifact: Artifact, library: Runtime, plain: Artifact, images: LabelledImages, batch: int) -> str:
    found = sorted(_ratio(artifact, library, plain, images, batch) for _ in range(OCCASIONS))
    return f"{found[OCCASIONS // 2]:.2f} ({found[0]:.2f} to {found[-1]:.2f})"


def _ratio(artifact: Artifact, library: Runtime, plain: Artifact, images: LabelledImages, batch: int) -> float:
    """Returns how many times as fast an artifact is as the fp32 one on ONNX Runtime, both in turn."""
    opened = library.open(artifact.deployed, [], 1)
    reference = runtime("onnxruntime").open(plain.deployed, [], 1)
    turns = opened.turns(images.images[:batch], [TimedBatch(0, batch)], reference, batch, PROTOCOL)
    return 1 / time_pair(turns, [1.0], PROTOCOL, time.perf_counter).ratio


if __name__ == "__main__":
    main()
