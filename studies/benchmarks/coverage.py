"""Which of torchvision's classification networks can be compressed, and how much of each.

python -m studies.benchmarks.coverage [--models resnet18,vgg16] [--out FILE] [--seconds 900] [--gigabytes 12]

Each network has random weights, a process of its own and images as small as it takes. A random candidate with about
half of the channels of every group that may be cut is sliced, and another one lacks half of the residual blocks that
can go, too; their files have to answer as torch does.
"""

import argparse
import json
import multiprocessing
import resource
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from evaluators.artifact_builder import ArtifactBuilder
from evaluators.runtimes.onnxruntime_cpu import OnnxRuntime, load
from search.config.environment import environment
from spaces.candidate import Candidate
from spaces.depth import BlockStage, find_stages, shortened
from spaces.dynamic.cut_points import find_cut_points
from spaces.dynamic.exit_network import ExitHead, ExitNetwork, feature_channels
from spaces.dynamic.skippable_blocks import removable_blocks
from spaces.pruning.prunable import find_groups, halves
from spaces.pruning.slicing import sliced
from spaces.thresholds import Thresholds

SHARES = (1 / 3, 2 / 3)
IMAGES = 8
_LIMITS = {"inception": 299, "vit_h": 224, "vit": 224, "swin": 64, "maxvit": 224}


@dataclass(frozen=True)
class Row:
    """What is known of one network."""

    model: str
    size: int
    parameters: int = 0
    free: int = 0
    whole: int = 0
    reasons: dict[str, int] | None = None
    quantizable: int = 0
    exits: str = ""
    difference: float = float("nan")
    stages: str = ""
    shortened_difference: float = float("nan")
    sqnr_db: float = float("nan")
    seconds: float = 0.0
    gigabytes: float = 0.0
    error: str = ""

    def cells(self) -> list[str]:
        """Returns the row of the table."""
        if self.error:
            return [self.model, str(self.size), *["-"] * 9, f"{self.seconds:.0f}", f"{self.gigabytes:.1f}", self.error]
        reasons = "; ".join(f"{count}x {reason}" for reason, count in (self.reasons or {}).items())
        return [
            self.model,
            str(self.size),
            f"{self.parameters / 1e6:.1f} M",
            f"{self.free}",
            f"{self.whole}",
            f"{self.quantizable}",
            self.exits or "-",
            f"{self.difference:.0e}" if self.free else "-",
            self.stages or "-",
            f"{self.shortened_difference:.0e}" if self.stages else "-",
            f"{self.sqnr_db:.0f} dB",
            f"{self.seconds:.0f}",
            f"{self.gigabytes:.1f}",
            reasons,
        ]


HEADINGS = (
    "network", "px", "parameters", "groups cut", "whole", "layers int8", "exits", "difference",
    "blocks that can go", "difference without", "int8 SQNR", "s", "GB", "why whole",
)  # fmt: skip


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(all_models()))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=900.0, help="limit for one network")
    parser.add_argument("--gigabytes", type=float, default=12.0, help="limit for one network")
    given = parser.parse_args()
    known = {}
    if given.out and given.out.is_file():
        known = {row["model"]: Row(**row) for row in json.loads(given.out.read_text())}
    for model in given.models.split(","):
        known[model] = in_own_process(model, given.seconds, given.gigabytes)
        print(" | ".join(known[model].cells()), flush=True)
        if given.out:
            given.out.write_text(json.dumps([asdict(row) for row in known.values()], indent=1))
    print_table(list(known.values()))


def all_models() -> list[str]:
    """Returns the names of all classification networks, the large ones last."""
    return sorted(torchvision.models.list_models(module=torchvision.models), key=_weights_of)


def _weights_of(model: str) -> int:
    return int(torchvision.models.get_model_weights(model).DEFAULT.meta["num_params"])


def image_size(model: str) -> int:
    """Returns the side of the smallest image that a network takes; what takes any gets 64 pixels."""
    return next((size for start, size in _LIMITS.items() if model.startswith(start)), 64)


def in_own_process(model: str, seconds: float, gigabytes: float) -> Row:
    """Returns what is known of one network after at most so many seconds and with at most so much memory."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(model, gigabytes, sender))
    begin = time.monotonic()
    process.start()
    sender.close()
    try:
        row: Row = receiver.recv() if receiver.poll(seconds) else Row(model, image_size(model), error="out of time")
    except EOFError:
        row = Row(model, image_size(model), error=f"the process died, within {gigabytes:g} GB of memory")
    process.kill()
    process.join()
    return Row(**asdict(row) | {"seconds": time.monotonic() - begin})


def _report(model: str, gigabytes: float, sender: Connection) -> None:
    warnings.simplefilter("ignore")
    limit = int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        row = cover(model)
    except Exception as error:  # the table says why
        row = Row(model, image_size(model), error=f"{type(error).__name__}: {error}".splitlines()[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    sender.send(Row(**asdict(row) | {"gigabytes": peak}))


def cover(model: str) -> Row:
    """Returns what can be done with one network: exits placed, channels cut, layers quantized, files run."""
    size = image_size(model)
    trunk = random_network(model, size)
    images = torch.randn(IMAGES, 3, size, size, generator=torch.Generator().manual_seed(1))
    places = find_cut_points(trunk, images[:1], SHARES)
    channels = feature_channels(trunk, places.after, images[:1])
    network = ExitNetwork(trunk, places.after, [ExitHead(count, 1000, 4) for count in channels]).eval()
    removable = tuple(removable_blocks(trunk, images[:1], network.cut_points))
    builder = ArtifactBuilder(network, images.numpy(), OnnxRuntime(), removable=removable)
    groups = find_groups(network, images[:1], builder.disagreement)
    off = Thresholds(dict.fromkeys(network.exit_names))
    stages = find_stages(network, images[:1], builder.disagreement)
    smaller = sliced(network, groups.free, halves(groups.free, seed=7))
    shorter = shortened(smaller, half_of(stages))
    with torch.no_grad():
        dense = network(images)[-1].numpy()
    int8 = _answers(builder, network, Candidate({}, dict.fromkeys(builder.layers, "int8"), off), images)
    return Row(
        model,
        size,
        sum(parameter.numel() for parameter in trunk.parameters()),
        len(groups.free),
        len(groups.whole),
        groups.reasons,
        len(builder.layers) - len(network.exit_names),
        " ".join(f"{share:.0%}" for share in places.shares),
        _difference(builder, smaller, off, images),
        "+".join(str(len(stage.blocks)) for stage in stages),
        _difference(builder, shorter, off, images) if stages else float("nan"),
        float(10 * np.log10(np.square(dense).sum() / np.square(int8 - dense).sum())),
    )


def half_of(stages: Sequence[BlockStage], seed: int = 7) -> tuple[str, ...]:
    """Returns a random half of the blocks of each stage, rounded up."""
    rng = np.random.default_rng(seed)
    return tuple(
        str(block) for stage in stages for block in rng.permutation(stage.blocks)[: (len(stage.blocks) + 1) // 2]
    )


def _difference(builder: ArtifactBuilder, network: ExitNetwork, off: Thresholds, images: torch.Tensor) -> float:
    """Returns the largest difference of a network's file from torch, as a share of the largest logit."""
    with torch.no_grad():
        expected = network(images)[-1].numpy()
    answer = _answers(builder, network, Candidate({}, {}, off, removed_blocks=network.removed_blocks), images)
    return float(np.abs(answer - expected).max() / np.abs(expected).max())


def _answers(builder: ArtifactBuilder, network: ExitNetwork, candidate: Candidate, images: torch.Tensor) -> np.ndarray:
    (stage,) = builder.build(network, candidate).deployed
    return np.asarray(load(stage, 1)(images.numpy())[0])


def random_network(model: str, size: int) -> nn.Module:
    """Returns a network with random weights, whose batch norms have random scales and the statistics of noise."""
    torch.manual_seed(0)
    slow = {"init_weights": False} if model in ("googlenet", "inception_v3") else {}
    made: nn.Module = torchvision.models.get_model(model, weights=None, **slow)
    norms = [module for module in made.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0.0, 0.1)
        norm.momentum = None
    for parameter in made.parameters():
        if parameter.ndim > 1 and parameter.abs().max() < 1e-3:  # what starts at nothing would hide any mistake
            nn.init.normal_(parameter, 0.0, 0.1)
    if norms:
        with torch.no_grad():
            made.train()(torch.randn(4, 3, size, size))
    for name, buffer in made.named_buffers():
        if name.endswith("running_var"):
            # Next to no variance makes torch differ from itself: by 2% between one image and two.
            buffer.clamp_(min=0.01)
    return made.eval()


def print_table(rows: Sequence[Row]) -> None:
    """Prints the table and what it comes to."""
    machine = environment(OnnxRuntime().device())
    print(f"\n{machine['device']}, {machine['cores']} cores, torch {machine['torch']},", end=" ")
    print(f"torchvision {torchvision.__version__}, onnxruntime {machine['onnxruntime']}")
    print("\n| " + " | ".join(HEADINGS) + " |\n|" + "---|" * len(HEADINGS))
    for row in sorted(rows, key=lambda row: row.model):
        print("| " + " | ".join(row.cells()) + " |")
    done = [row for row in rows if not row.error]
    cut = sum(bool(row.free) and row.difference < 1e-3 for row in done)
    deep = [row for row in done if row.stages]
    short = sum(row.shortened_difference < 1e-3 for row in deep)
    print(f"\n{len(rows)} networks, {cut} sliced equal to torch, {len(rows) - len(done)} not done;", end=" ")
    print(f"{len(deep)} have blocks that can go, {short} of them equal to torch without half of these.")


if __name__ == "__main__":
    main()
