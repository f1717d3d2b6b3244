"""What each way of making int8 costs in accuracy.

    python -m studies.benchmarks.quantization calibrators --data imagefolder:PATH --weights resnet20.pt

Each table is of the CIFAR-10 study's network, every layer in int8, and prints Markdown. Accuracies are of the files
that are deployed, in their runtime, on the study's validation and test images together: nothing is chosen here.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from evaluators.artifact_builder import ArtifactBuilder
from evaluators.data import LabelledImages
from evaluators.quantization.calibration import CALIBRATORS
from evaluators.quantization.scheme import Scheme
from evaluators.runtimes.cpu import cpu_name
from search.config.overrides import Request
from search.config.study import ExitsSection
from search.pipeline.pipeline import build_pipeline
from spaces.candidate import Candidate
from spaces.dynamic.exit_network import ExitNetwork
from studies.benchmarks.markdown import print_table

_BATCH = 250
_WEIGHTS: tuple[Literal["per-channel", "per-tensor"], ...] = ("per-channel", "per-tensor")


class RecoveryContext:
    """The study's network, its images, and the accuracy of what is deployed.

    Args:
        data: CIFAR-10, as for the search's `--data`.
        weights: a state dict of the study's network.
        calibration: so many training images to calibrate on; as many as in the study where not given.
    """

    def __init__(self, data: str, weights: str, calibration: int | None) -> None:
        study = Request(study="cifar10", weights=weights, data=data).to_study()
        section = study.data.model_copy(update={"calibration": calibration or study.data.calibration})
        study = study.model_copy(update={"exits": ExitsSection(after=()), "data": section})
        self.pipeline = build_pipeline(study, lambda *_: None, say=lambda text: print(text))
        self.network: ExitNetwork = self.pipeline.network
        self.calibration: NDArray[np.float32] = self.pipeline.data.calibration.images[:]
        self.parts: tuple[LabelledImages, ...] = (self.pipeline.data.validation, self.pipeline.data.test)
        self.images = sum(len(part) for part in self.parts)

    def builder(self, scheme: Scheme, calibration: NDArray[np.float32]) -> ArtifactBuilder:
        """Returns what writes the network's files."""
        return ArtifactBuilder(self.network, calibration, self.pipeline.runtime, scheme=scheme)

    def accuracy(self, files: Sequence[bytes]) -> float:
        """Returns the top-1 accuracy of deployed files on all images that nothing was trained on."""
        opened = self.pipeline.runtime.open(files, [], self.pipeline.target.threads)
        right = 0
        for part in self.parts:
            logits, _ = opened.answer(part.images, _BATCH)
            right += int((logits.argmax(axis=1) == part.labels).sum())
        return right / self.images

    def float_accuracy(self) -> float:
        """Returns the accuracy of the network in fp32."""
        builder = self.builder(Scheme(), self.calibration[:4])
        return self.accuracy(builder.build(self.network, all_layers(builder, "fp32")).deployed)

    def close(self) -> None:
        """Prints what the figures were measured on."""
        print(
            f"\n{len(self.calibration)} training images to calibrate on, {self.images} scored; {cpu_name()}, "
            f"{self.pipeline.target.threads} thread, {self.pipeline.runtime.version()}, torch {torch.__version__}."
        )


def all_layers(builder: ArtifactBuilder, precision: str) -> Candidate:
    """Returns the dense network with every layer in one precision."""
    return Candidate({}, dict.fromkeys(builder.layers, precision))


def calibrators(given: argparse.Namespace) -> None:
    """Prints calibrator by granularity of the weights: accuracy, points lost, and CPU seconds of calibration."""
    ground = RecoveryContext(given.data, given.weights, given.calibration)
    exact = ground.float_accuracy()
    rows = [["fp32", f"{100 * exact:.2f}%", "", "", "", ""]]
    for name in CALIBRATORS:
        seconds, found = _calibrated(ground, Scheme(calibrator=name))
        cells = [cell for accuracy in found for cell in (f"{100 * accuracy:.2f}%", f"{100 * (accuracy - exact):+.2f}")]
        rows.append([f"`{name}`", *cells, f"{seconds:.1f}"])
    heads = ["calibrator", *(head for weights in _WEIGHTS for head in (f"int8, {weights}", "points"))]
    print()
    print_table([*heads, "CPU seconds to calibrate"], rows)
    ground.close()


def _calibrated(ground: RecoveryContext, scheme: Scheme) -> tuple[float, list[float]]:
    """Returns the CPU seconds that calibration took and the accuracy for each granularity of the weights."""
    found, seconds = [], []
    for weights in _WEIGHTS:
        # It reads a few images when it is made, so that reading them all can be timed.
        builder = ground.builder(replace(scheme, weights=weights), ground.calibration[:4])
        begin = time.process_time()
        ranges = builder.read_ranges(ground.network, ground.calibration)
        seconds.append(time.process_time() - begin)
        found.append(ground.accuracy(builder.build(ground.network, all_layers(builder, "int8"), ranges).deployed))
    return min(seconds), found


def main() -> None:
    """Measures one of the tables."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--data", required=True, help="CIFAR-10, as for the search's --data")
    common.add_argument("--weights", required=True, help="a state dict of the study's ResNet-20")
    common.add_argument("--calibration", type=int, help="so many training images to calibrate on; 200 where not given")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = parser.add_subparsers(required=True, metavar="table")
    for table in (calibrators,):
        command = tables.add_parser(table.__name__, parents=[common], help=table.__doc__, description=table.__doc__)
        command.set_defaults(table=table)
    given = parser.parse_args()
    given.table(given)


if __name__ == "__main__":
    main()
