"""Which criterion prunes best, and which recovery wins most accuracy back for the time it takes.

    python -m studies.benchmarks.recovery criteria --data imagefolder:PATH --weights resnet20.pt
    python -m studies.benchmarks.recovery effort --data imagefolder:PATH --weights resnet20.pt

Both work on the CIFAR-10 study, print Markdown, and go on where they were stopped: what is measured is kept in --out.
Accuracies are of the fp32 network in torch on the study's validation and test images together: nothing is chosen here,
and ranks of versions that differ by less than a point need all of them.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from evaluators.data import LabelledImages
from evaluators.flops.evaluator import count_by_module
from evaluators.runtimes.cpu import cpu_name
from search.config.overrides import Request
from search.config.study import ElasticSection, ExitsSection, FinetuneSection
from search.pipeline.pipeline import CompressionPipeline, build_pipeline
from search.recovery.elastic import random_channels, train_elastic
from search.recovery.finetune import finetune
from search.training.batchnorm import recalibrate_batch_norm, recovery_images
from search.training.loop import TrainingBatches, save
from search.training.teacher import Teacher
from spaces.channels import SparsitySpace
from spaces.dynamic.exit_network import ExitNetwork
from spaces.pruning.criteria import CRITERIA
from spaces.pruning.criteria.base import Evidence
from studies.benchmarks.markdown import print_table

KEPT = (0.7, 0.5, 0.3)
"""Shares of the dense network's FLOPs."""
_BATCH = 250
_FULL = "elastic, then in full"
_EQUAL = 10
"""So many random versions of about equal FLOPs are ranked."""

Channels = dict[str, int]


@dataclass
class Results:
    """Figures that are measured once and kept in a file."""

    file: Path

    def get(self, name: str, measure: Callable[[], float]) -> float:
        """Returns a figure, measured now or before."""
        known: dict[str, float] = json.loads(self.file.read_text()) if self.file.is_file() else {}
        if name not in known:
            known[name] = measure()
            self.file.write_text(json.dumps(known, indent=1))
            print(f"  {name}: {known[name]:.4f}", flush=True)
        return known[name]


class RecoveryContext:
    """The study's network, its images, and pruned networks by their channels."""

    def __init__(self, pipeline: CompressionPipeline) -> None:
        self.pipeline = pipeline
        self.network = ExitNetwork(pipeline.network.trunk, [], []).eval()
        calibration = pipeline.data.calibration
        self.evidence = Evidence(torch.from_numpy(calibration.images[:]), torch.from_numpy(calibration.labels))
        self.groups = pipeline.space.sparsity.groups
        self.images = recovery_images(pipeline.data.train, pipeline.study.recovery.images)
        self.image = self.evidence.images[:1]
        self.dense_flops = self.flops(self.network)

    def flops(self, network: ExitNetwork) -> float:
        """Returns the FLOPs of one image."""
        return sum(count_by_module(network, self.image).values())

    def space(self, name: str, step: int) -> SparsitySpace:
        """Returns the space in which a criterion ranks the channels."""
        return SparsitySpace(self.groups, CRITERIA[name](self.network, self.groups, self.evidence), step, 0.1)

    def batches(self, size: int, seed: int = 0) -> TrainingBatches:
        """Returns the training set."""
        return TrainingBatches(self.pipeline.data.train, size, seed, self.pipeline.compressor.context.augment)

    def accuracy(self, network: ExitNetwork) -> float:
        """Returns the top-1 accuracy on all images that nothing was trained on."""
        parts = (self.pipeline.data.validation, self.pipeline.data.test)
        return sum(_right(network, part) for part in parts) / sum(len(part) for part in parts)

    def recalibrated(self, network: ExitNetwork) -> ExitNetwork:
        """Returns the network with fresh batch statistics."""
        recalibrate_batch_norm(network, self.images)
        return network

    def uniform(self, space: SparsitySpace, share: float) -> Channels:
        """Returns one share of every group's channels, so that the network keeps about this share of its FLOPs."""

        def channels(keep: float) -> Channels:
            return {group.name: max(round(keep * group.channels), 1) for group in self.groups}

        def miss(keep: float) -> float:
            return abs(self.flops(space.apply(self.network, channels(keep))) / self.dense_flops - share)

        return channels(min(np.linspace(0.1, 1.0, 46), key=miss))


def _right(network: ExitNetwork, data: LabelledImages) -> int:
    right = 0
    with torch.no_grad():
        for start in range(0, len(data), _BATCH):
            answers = network(torch.from_numpy(data.images[start : start + _BATCH]))[-1].argmax(1).numpy()
            right += int((answers == data.labels[start : start + _BATCH]).sum())
    return right


def criteria_table(ground: RecoveryContext, results: Results, epochs: float) -> None:
    """Prints criterion by kept FLOPs by recovery."""
    settings = FinetuneSection(epochs=epochs or 1)
    ways = ("none", "bn", "finetune") if epochs else ("none", "bn")
    columns = [(share, how) for share in KEPT for how in ways]
    dense = results.get("dense", partial(ground.accuracy, ground.network))
    rows = []
    for name in CRITERIA:
        begin = time.perf_counter()
        space = ground.space(name, 1)
        seconds = results.get(f"{name}/seconds", partial(_since, begin))
        cells = []
        for share, how in columns:
            key = f"{name}/{share}/{how}" + (f"/{epochs:g}" if how == "finetune" else "")
            cells.append(results.get(key, partial(_pruned, ground, space, share, how, settings)))
        rows.append([name, f"{seconds:.1f}", *(f"{100 * cell:.1f}" for cell in cells)])
    heads = [f"{share:.0%} {how if how != 'finetune' else f'bn + {epochs:g} epoch'}" for share, how in columns]
    print(f"\nDense: {100 * dense:.2f}%.\n")
    print_table(["criterion", "seconds", *heads], rows)


def _since(begin: float) -> float:
    return time.perf_counter() - begin


def _pruned(ground: RecoveryContext, space: SparsitySpace, share: float, how: str, settings: FinetuneSection) -> float:
    network = space.apply(ground.network, ground.uniform(space, share))
    if how != "none":
        ground.recalibrated(network)
    if how == "finetune":
        network = _tuned(ground, network, settings)
    return ground.accuracy(network)


def effort_table(
    ground: RecoveryContext, results: Results, out: Path, minutes: float, candidates: int, final: float
) -> None:
    """Prints what each recovery brings at equal training time, and how well it ranks versions of equal FLOPs."""
    space = ground.space("l2", ground.pipeline.space.sparsity.finest)
    shared = _shared_weights(ground, space, out, minutes)
    each, full = FinetuneSection(minutes=minutes / candidates), FinetuneSection(epochs=final)
    arms: dict[str, tuple[ExitNetwork, FinetuneSection | None]] = {
        "bn": (ground.network, None),
        "finetune": (ground.network, each),
        "elastic": (shared, None),
        _FULL: (shared, full),
    }
    uniform = {f"uniform {share:.0%}": ground.uniform(space, share) for share in KEPT}
    random = {f"random {index}": channels for index, channels in enumerate(_half_random(ground, space))}
    chosen = uniform | random
    found: dict[str, dict[str, float]] = {arm: {} for arm in arms}
    for name, channels in chosen.items():
        for arm, (source, settings) in arms.items():
            key = f"{arm}/{minutes:g} min/{candidates}/{final:g}/{name}"
            found[arm][name] = results.get(key, partial(_recovered, ground, space, source, channels, settings))
    flops = {name: ground.flops(space.apply(ground.network, channels)) for name, channels in chosen.items()}
    _print_effort(found, {name: count / ground.dense_flops for name, count in flops.items()})


def _recovered(
    ground: RecoveryContext,
    space: SparsitySpace,
    source: ExitNetwork,
    channels: Channels,
    settings: FinetuneSection | None,
) -> float:
    network = ground.recalibrated(space.apply(source, channels))
    return ground.accuracy(_tuned(ground, network, settings) if settings else network)


def _tuned(ground: RecoveryContext, network: ExitNetwork, settings: FinetuneSection) -> ExitNetwork:
    finetune(network, Teacher(ground.network.trunk), ground.batches(settings.batch), settings)
    return ground.recalibrated(network)


def _shared_weights(ground: RecoveryContext, space: SparsitySpace, out: Path, minutes: float) -> ExitNetwork:
    shared = space.apply(ground.network, {group.name: group.channels for group in ground.groups})
    file = out / f"elastic-{minutes:g}min.pt"
    if file.is_file():
        shared.load_state_dict(torch.load(file, weights_only=True))
        return shared.eval()
    settings = ElasticSection(minutes=minutes)
    batches, partial = ground.batches(settings.batch), file.with_suffix(".partial.pt")
    done = train_elastic(shared, Teacher(ground.network.trunk), space, batches, settings, partial)
    print(f"  elastic: {done.steps} steps, {done.epochs} epochs begun, {done.seconds:.0f} s", flush=True)
    save(shared.state_dict(), file)
    return shared


def _half_random(ground: RecoveryContext, space: SparsitySpace) -> list[Channels]:
    """Returns ten random candidates with close to half of the FLOPs."""
    generator = torch.Generator().manual_seed(0)
    near: list[Channels] = []
    while len(near) < _EQUAL:
        channels = random_channels(space, generator)
        share = ground.flops(space.apply(ground.network, channels)) / ground.dense_flops
        if abs(share - 0.5) < 0.03 and channels not in near:
            near.append(channels)
    return near


def _print_effort(found: Mapping[str, Mapping[str, float]], shares: Mapping[str, float]) -> None:
    uniform = [name for name in shares if name.startswith("uniform")]
    random = [name for name in shares if name not in uniform]
    rows = []
    for arm, accuracies in found.items():
        rank = spearmanr([accuracies[name] for name in random], [found[_FULL][name] for name in random])[0]
        some = [accuracies[name] for name in random]
        cells = [f"{100 * accuracies[name]:.1f}" for name in uniform]
        cells += [f"{100 * np.mean(some):.1f} ({100 * min(some):.1f} to {100 * max(some):.1f})"]
        rows.append([arm, *cells, f"{_hypervolume(accuracies, shares):.3f}", f"{rank:.2f}"])
    heads = [f"{name} ({shares[name]:.0%})" for name in uniform]
    print()
    print_table(["recovery", *heads, f"{_EQUAL} random at 50%", "hypervolume", "Spearman, those"], rows)


def _hypervolume(accuracies: Mapping[str, float], shares: Mapping[str, float]) -> float:
    """Returns the area that the candidates dominate, of error and FLOPs share both from 0 to 1."""
    from pymoo.indicators.hv import HV

    points = np.array([(1 - accuracies[name], share) for name, share in shares.items()])
    return float(HV(ref_point=np.ones(2))(points))


def _pipeline(data: str, weights: str) -> CompressionPipeline:
    study = Request(study="cifar10", weights=weights, data=data).to_study()
    return build_pipeline(
        study.model_copy(update={"exits": ExitsSection(after=())}), lambda *_: None, say=lambda text: print(text)
    )


def main() -> None:
    """Measures one of the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["criteria", "effort"])
    parser.add_argument("--data", required=True, help="CIFAR-10, as for the search's --data")
    parser.add_argument("--weights", required=True, help="a state dict of the study's ResNet-20")
    parser.add_argument("--out", type=Path, default=Path("runs/recovery"), help="where figures are kept")
    parser.add_argument("--epochs", type=float, default=1, help="of fine-tuning, in the criteria's table; 0 for none")
    parser.add_argument("--minutes", type=float, default=10, help="of training for each recovery")
    parser.add_argument(
        "--candidates", type=int, default=20, help="new widths that a search would fine-tune in that time"
    )
    parser.add_argument("--final", type=float, default=2, help="epochs of fine-tuning in a recovery in full")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    ground = RecoveryContext(_pipeline(given.data, given.weights))
    results = Results(given.out / f"{given.table}.json")
    if given.table == "criteria":
        criteria_table(ground, results, given.epochs)
    else:
        effort_table(ground, results, given.out, given.minutes, given.candidates, given.final)
    print(f"\n{torch.get_num_threads()} threads, torch {torch.__version__}, {cpu_name()}, seed 0.")


if __name__ == "__main__":
    main()
