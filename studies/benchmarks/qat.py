"""What int8 costs after training, and what a short quantization-aware training wins back.

    python -m studies.benchmarks.qat --data imagefolder:PATH --weights resnet20.pt --steps 150

Works on the CIFAR-10 study's dense network and on uniformly pruned ones, every layer in int8. Accuracies are of the
deployed file in its runtime, on the study's validation and test images together: nothing is chosen here. The pruned
networks are fine-tuned in float for `--finetune` steps first, from which both columns start.
"""

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from evaluators.data import LabelledImages
from evaluators.quantization.int8 import NO_GRIDS
from evaluators.runtimes.cpu import cpu_name
from evaluators.runtimes.onnxruntime_cpu import load
from search.config.overrides import Request
from search.config.registries import QUANTIZERS
from search.config.study import ExitsSection, FinetuneSection, QatSection
from search.pipeline.pipeline import CompressionPipeline, build_pipeline
from search.recovery.finetune import finetune
from search.recovery.qat import Int8Network, Learned, train_int8
from search.training.batchnorm import recalibrate_batch_norm, recovery_images
from search.training.loop import TrainingBatches
from search.training.teacher import Teacher
from spaces.candidate import Candidate
from spaces.dynamic.exit_network import ExitNetwork

_BATCH = 250

Logits = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class RecoveryContext:
    """The study's network with all that training it in int8 needs."""

    pipeline: CompressionPipeline

    def accuracy(self, logits: Logits) -> float:
        """Returns the top-1 accuracy on all images that nothing was trained on."""
        parts = (self.pipeline.data.validation, self.pipeline.data.test)
        with torch.no_grad():
            return sum(_right(logits, part) for part in parts) / sum(len(part) for part in parts)

    def deployed(self, network: ExitNetwork, candidate: Candidate, learned: Learned | None) -> float:
        """Returns the accuracy of the int8 file, whose ranges are the network's own unless they were learned."""
        builder = self.pipeline.builder
        ranges = builder.read_ranges(network, self.pipeline.data.calibration.images[:])
        if learned is not None:
            ranges = {**ranges, **learned.ranges}
        (stage,) = builder.build(network, candidate, ranges, learned.grids if learned else NO_GRIDS).deployed
        run = load(stage, torch.get_num_threads())
        return self.accuracy(lambda images: torch.from_numpy(run(images.numpy())[-1]))

    def candidate(self, keep: float) -> Candidate:
        """Returns the version that keeps this share of every group's channels, in int8."""
        space = self.pipeline.space
        return space.candidate(space.uniform(keep, "int8"))

    def pruned(self, candidate: Candidate, steps: int) -> ExitNetwork:
        """Returns its network, fine-tuned in float if it is pruned."""
        network = self.pipeline.space.apply(self.pipeline.network, candidate)
        if self.pipeline.compressor.plan(candidate).is_pruned and steps:
            settings = FinetuneSection(steps=steps)
            finetune(network, Teacher(self.pipeline.network.trunk), self.batches(settings.batch), settings)
            recalibrate_batch_norm(
                network, recovery_images(self.pipeline.data.train, self.pipeline.study.recovery.images)
            )
        return network

    def batches(self, size: int) -> TrainingBatches:
        """Returns the training set."""
        return TrainingBatches(self.pipeline.data.train, size, 0, self.pipeline.compressor.context.augment)


def _right(logits: Logits, data: LabelledImages) -> int:
    right = 0
    for start in range(0, len(data), _BATCH):
        answers = logits(torch.from_numpy(data.images[start : start + _BATCH])).argmax(1).numpy()
        right += int((answers == data.labels[start : start + _BATCH]).sum())
    return right


def rows(
    ground: RecoveryContext, keep: float, finetuning: int, settings: QatSection, quantizers: Sequence[str]
) -> None:
    """Prints the rows of one width: fp32, int8 after training, and int8 trained by each method."""
    candidate = ground.candidate(keep)
    network = ground.pruned(candidate, finetuning)
    floating = ground.accuracy(lambda images: network(images)[-1])
    _print_row(f"{keep:.0%}", "fp32", floating, None, None)
    plain = ground.deployed(network, candidate, None)
    _print_row("", "int8, not trained", plain, plain, None)
    int8 = ground.pipeline.compressor.context.int8
    assert int8 is not None
    for name in quantizers:
        trained = copy.deepcopy(network)
        placement = int8.builder.int8_placement(trained, candidate)
        ranges = int8.builder.read_ranges(trained, int8.calibration)
        learner = Int8Network(trained, int8.builder.trainable(), placement, name, ranges)
        begin = time.process_time()
        done = train_int8(learner, Teacher(ground.pipeline.network.trunk), ground.batches(settings.batch), settings)
        step = (time.process_time() - begin) / done.steps
        inside = ground.accuracy(lambda images, learner=learner: learner.logits(images)[-1])  # type: ignore[misc]
        deployed = ground.deployed(trained, candidate, learner.learned())
        _print_row("", f"int8, {name}", deployed, inside, step)


def _print_row(width: str, what: str, accuracy: float, inside: float | None, step: float | None) -> None:
    cells = [width, what, f"{100 * accuracy:.2f}%"]
    cells += [f"{100 * inside:.2f}%" if inside is not None and step is not None else ""]
    print(f"| {' | '.join([*cells, f'{step:.2f}' if step else ''])} |", flush=True)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CIFAR-10, as for the search's --data")
    parser.add_argument("--weights", required=True, help="a state dict of the study's ResNet-20")
    parser.add_argument("--steps", type=int, default=150, help="of quantization-aware training, of 128 images")
    parser.add_argument("--finetune", type=int, default=150, help="steps in float before it, for pruned networks")
    parser.add_argument("--keep", type=float, nargs="+", default=[1.0, 0.5], help="shares of every group's channels")
    parser.add_argument("--quantizers", nargs="+", default=list(QUANTIZERS), choices=list(QUANTIZERS))
    parser.add_argument("--distillation", type=float, default=QatSection().distillation)
    parser.add_argument("--rate", type=float, default=QatSection().learning_rate)
    given = parser.parse_args()
    settings = QatSection(steps=given.steps, distillation=given.distillation, learning_rate=given.rate)
    study = Request(study="cifar10", weights=given.weights, data=given.data).to_study()
    recovery = study.recovery.model_copy(update={"qat": settings})
    study = study.model_copy(update={"exits": ExitsSection(after=()), "recovery": recovery})
    ground = RecoveryContext(build_pipeline(study, lambda *_: None, say=lambda text: print(text)))
    print("\n| channels | | deployed | in training | CPU seconds a step |\n|---|---|---|---|---|")
    for keep in given.keep:
        rows(ground, keep, given.finetune, settings, given.quantizers)
    print(f"\n{given.steps} steps of {settings.batch} images at {settings.learning_rate:g}; {cpu_name()}, ", end="")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, seed 0.")


if __name__ == "__main__":
    main()
