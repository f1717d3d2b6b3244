"""The contestants: other tools as their documentation uses them, plain PyTorch, and this program's command line."""

import copy
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import optuna
import torch
from torch import nn

from search.config.budget import Budget
from search.config.study import ElasticSection, ExitsSection, FinalSection, Study
from studies.benchmarks import outside
from studies.benchmarks.cifar_networks import Mobile
from studies.benchmarks.peers.question import (
    Clock,
    Question,
    accuracy,
    finetune,
    recalibrate,
    stages_of,
    without_blocks,
)
from studies.cifar10.model import ResNet20, SubsampledShortcut

INT8_METHODS = ("MinMax", "Percentile", "Entropy")
_TRIAL_S = 5.0
"""Processor seconds that plain Optuna fine-tunes each trial for."""
_NOTHING_WITHIN = 1
"""Exit code of a search that found no version within its budget."""


@dataclass(frozen=True)
class Entry:
    """A version that a contestant would deploy.

    Args:
        label: what it is.
        file: ONNX; nothing where it is a bundle.
        bundle: a folder with a run.py of its own.
    """

    label: str
    file: bytes = b""
    bundle: Path | None = None


class Contestant(Protocol):
    """One way to compress a network."""

    def missing(self, question: Question, /) -> str | None:
        """Returns why it cannot take part; None where it can."""
        ...

    def entries(self, question: Question, /) -> Iterator[Entry]:
        """Yields its versions, made within the question's processor minutes."""
        ...


class StaticQuantization:
    """ONNX Runtime's `quantize_static`, with each of its calibrators."""

    def missing(self, _question: Question, /) -> str | None:
        """Returns nothing: it is always there."""

    def entries(self, question: Question, /) -> Iterator[Entry]:
        """Yields one version for each calibrator."""
        for method in INT8_METHODS:
            yield Entry(method, question.int8_file(question.dense, method))


class Nncf:
    """NNCF's post-training quantization of the ONNX file, with its defaults.

    Args:
        python: an interpreter that has nncf and onnx.
    """

    def __init__(self, python: str | None) -> None:
        self._python = python

    def missing(self, _question: Question, /) -> str | None:
        """Returns why it is not asked."""
        if self._python is None:
            return "no --nncf PYTHON with nncf and onnx was named"
        tried = subprocess.run([self._python, "-c", "import nncf, onnx"], check=False, capture_output=True, text=True)
        return None if tried.returncode == 0 else (tried.stderr.strip().splitlines() or ["it does not start"])[-1]

    def entries(self, question: Question, /) -> Iterator[Entry]:
        """Yields its one version."""
        assert self._python is not None
        folder = question.folder
        (folder / "dense.onnx").write_bytes(outside.preprocessed(question.dense_file()))
        np.save(folder / "calibration.npy", question.splits.calibration.images[:])
        script = (
            "import nncf, numpy, onnx, sys\n"
            "model, images, out = sys.argv[1:]\n"
            "batches = [{'images': image[None]} for image in numpy.load(images)]\n"
            "onnx.save(nncf.quantize(onnx.load(model), nncf.Dataset(batches)), out)\n"
        )
        files = [str(folder / name) for name in ("dense.onnx", "calibration.npy", "int8.onnx")]
        subprocess.run([self._python, "-c", script, *files], check=True, capture_output=True)
        yield Entry("default preset", (folder / "int8.onnx").read_bytes())


class TorchPruning:
    """torch-pruning's group magnitude pruner, fine-tuning, then `quantize_static`."""

    RATIOS = (0.25, 0.5, 0.7)

    def missing(self, _question: Question, /) -> str | None:
        """Returns nothing: it is among this program's requirements."""

    def entries(self, question: Question, /) -> Iterator[Entry]:
        """Yields a version for each ratio, each with an equal share of the time."""
        for ratio in self.RATIOS:
            network = pruned(question, copy.deepcopy(question.dense), ratio)
            finetune(question, network, question.minutes / len(self.RATIOS))
            yield Entry(f"{ratio:.0%} of the channels cut", question.int8_file(network))


def pruned(
    question: Question, network: nn.Module, ratio: float, ratios: Mapping[nn.Module, float] | None = None
) -> nn.Module:
    """Returns a network after torch-pruning has cut a share of its channels, in steps of 8.

    It does not follow shortcuts that pad: of networks that have them, what lies inside their blocks is cut.
    """
    import torch_pruning

    image = torch.from_numpy(question.splits.calibration.images[:1])
    last: list[nn.Module] = [module for module in network.modules() if isinstance(module, nn.Linear)]
    if pads(network):
        last += [module for name, module in network.named_modules() if name.endswith("conv2") or name == "conv1"]
    pruner = torch_pruning.pruner.MetaPruner(
        network,
        image,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        pruning_ratio_dict=dict(ratios or {}),
        ignored_layers=last,
        round_to=8,
    )
    pruner.step()
    return network.eval()


def pads(network: nn.Module) -> bool:
    """Returns whether a network is a ResNet whose shortcuts have no weights: they pad channels with zeros."""
    return any(isinstance(module, SubsampledShortcut) for module in network.modules())


def narrowed(network: nn.Module, widths: Sequence[int]) -> nn.Module:
    """Returns a ResNet whose shortcuts pad with so many channels in each stage: the middle ones, which shortcuts carry.

    Inside a block those stay whose filters have the largest norms.
    """
    made: Any = copy.deepcopy(network)
    kept = _middle(made.conv1.out_channels, widths[0])
    _cut(made.conv1, made.bn1, torch.arange(3), kept)
    for stage, width in zip((made.layer1, made.layer2, made.layer3), widths, strict=True):
        for block in stage:
            before, kept = kept, _middle(block.conv2.out_channels, width)
            if isinstance(block.shortcut, SubsampledShortcut):
                block.shortcut.padding = (width - len(before)) // 2  # below zero it crops
            inside = block.conv1.weight.flatten(1).norm(dim=1).topk(width).indices.sort().values
            _cut(block.conv1, block.bn1, before, inside)
            _cut(block.conv2, block.bn2, inside, kept)
    made.linear.weight = nn.Parameter(made.linear.weight[:, kept].detach())
    made.linear.in_features = len(kept)
    narrow: nn.Module = made
    return narrow


def _middle(count: int, kept: int) -> torch.Tensor:
    return torch.arange((count - kept) // 2, (count - kept) // 2 + kept)


def _cut(layer: nn.Conv2d, norm: Any, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
    """Leaves a convolution and the batch norm after it some of their channels."""
    layer.weight = nn.Parameter(layer.weight[outputs][:, inputs].detach())
    layer.in_channels, layer.out_channels = len(inputs), len(outputs)
    norm.num_features = len(outputs)
    norm.weight, norm.bias = nn.Parameter(norm.weight[outputs].detach()), nn.Parameter(norm.bias[outputs].detach())
    norm.running_mean, norm.running_var = norm.running_mean[outputs], norm.running_var[outputs]


class EvenBlocks:
    """Blocks left out evenly, by hand, then fine-tuning and `quantize_static`."""

    SHARES = (0.75, 0.5, 0.25, 0.1)

    def missing(self, question: Question, /) -> str | None:
        """Returns why a network has nothing to leave out."""
        return None if stages_of(question.dense) else "the network has no blocks that return their input's shape"

    def entries(self, question: Question, /) -> Iterator[Entry]:
        """Yields a version for each share of the blocks kept, each with an equal share of the time."""
        counts = [len(blocks) for _, blocks in stages_of(question.dense)]
        for share in self.SHARES:
            network = without_blocks(question.dense, [round(share * count) for count in counts])
            finetune(question, recalibrate(question, network), question.minutes / len(self.SHARES))
            yield Entry(f"{share:.0%} of the blocks kept", question.int8_file(network))


class SmallNetwork:
    """The small network of the family, trained for the whole time, then `quantize_static`.

    Args:
        resnet20: trained weights of the ResNets' small network, which then needs no training.
    """

    def __init__(self, resnet20: Path) -> None:
        self._resnet20 = resnet20

    def missing(self, question: Question, /) -> str | None:
        """Returns why a network has no smaller one."""
        return "it is the smallest of its family" if question.name == "resnet20" else None

    def entries(self, question: Question, /) -> Iterator[Entry]:
        """Yields the small network."""
        if question.name == "resnet56":
            network: nn.Module = ResNet20()
            network.load_state_dict(torch.load(self._resnet20, weights_only=True))
            yield Entry("ResNet-20, as it was trained elsewhere", question.int8_file(network.eval()))
            return
        torch.manual_seed(question.seed)
        counts = [0 for _ in stages_of(question.dense)]
        network = without_blocks(Mobile(), counts)
        finetune(question, network, question.minutes, 0.2)
        yield Entry("one block a stage, from scratch", question.int8_file(network))


class PlainOptuna:
    """TPE over stage widths and depths, as a day's script would do it; its best fine-tuned, then `quantize_static`.

    Half of the time goes to trials, each fine-tuned for a few seconds; the other half to the versions of its front.
    """

    KEPT = 4

    def missing(self, _question: Question, /) -> str | None:
        """Returns nothing: Optuna is among this program's requirements."""

    def entries(self, question: Question, /) -> Iterator[Entry]:
        """Yields the versions of its front, four at most, evenly spread over latency."""
        study = optuna.create_study(
            directions=["maximize", "minimize"], sampler=optuna.samplers.TPESampler(seed=question.seed)
        )
        clock = Clock()
        dense = outside.session(question.int8_file(question.dense))
        while clock.minutes < question.minutes / 2:
            study.optimize(lambda trial: self._tried(question, trial, dense), n_trials=1)
        front = sorted(study.best_trials, key=lambda trial: trial.values[1])
        places = sorted({round(place) for place in np.linspace(0, len(front) - 1, self.KEPT)})
        left = max(question.minutes - clock.minutes, 0.1 * question.minutes)
        for place in places:
            network = self._made(question, front[place].params)
            finetune(question, network, left / len(places))
            yield Entry(f"trial {front[place].number}", question.int8_file(network))

    def _tried(self, question: Question, trial: optuna.Trial, dense: object) -> tuple[float, float]:
        counts = [len(blocks) for _, blocks in stages_of(question.dense)]
        for index, count in enumerate(counts):
            trial.suggest_int(f"blocks{index}", 0, count)
        for index in range(len(self._sequences(question.dense))):
            trial.suggest_float(f"cut{index}", 0.0, 0.75, step=0.25)
        network = self._made(question, trial.params)
        finetune(question, network, _TRIAL_S / 60)
        images = question.splits.validation
        int8 = outside.session(question.int8_file(network))
        image = question.splits.calibration.images[:1]
        calls = {name: (lambda made=made: made.run(None, {outside.INPUT: image})) for name, made in
                 (("dense", dense), ("int8", int8))}  # fmt: skip
        return accuracy(network, images.images[:2000], images.labels[:2000]), outside.timed(calls, 11)["int8"].ratio

    def _made(self, question: Question, values: Mapping[str, float]) -> nn.Module:
        counts = [int(values[f"blocks{index}"]) for index in range(len(stages_of(question.dense)))]
        network = without_blocks(question.dense, counts)
        if pads(network):
            widths = [round(width * (1 - float(values[f"cut{index}"]))) for index, width in enumerate((16, 32, 64))]
            return recalibrate(question, narrowed(network, widths))
        ratios: dict[nn.Module, float] = {
            module: float(values[f"cut{index}"])
            for index, path in enumerate(self._sequences(network))
            for module in network.get_submodule(path).modules()
            if isinstance(module, nn.Conv2d)
        }
        return recalibrate(question, pruned(question, network, 0.0, ratios))

    @staticmethod
    def _sequences(network: nn.Module) -> Sequence[str]:
        """Returns the paths of the sequences of blocks, each of which has one width to cut."""
        return (
            list(dict.fromkeys(path for path, _ in stages_of(network)))
            or [path for path, module in network.named_modules() if isinstance(module, nn.Sequential)][:3]
        )


class ThisProgram:
    """This program through its command line: one search, then a pick for each of the versions on its front.

    Args:
        batch: that it searches for.
        budget: the limit of its search, as a share of the dense network's latency, in %.
        picks: versions of the front that are picked, at most.
    """

    def __init__(self, batch: int, budget: float = 60.0, picks: int = 6) -> None:
        self._batch = batch
        self._budget = budget
        self._picks = picks

    def missing(self, _question: Question, /) -> str | None:
        """Returns nothing."""

    def entries(self, question: Question, /) -> Iterator[Entry]:
        """Yields the picked bundles."""
        folder = question.folder
        file = folder / "study.toml"
        file.write_text(self._study(question).to_toml(), encoding="utf-8")
        place = ("--runs", str(folder / "runs"))
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        length = ("--trials", str(_trials(question.minutes)), "--seed", str(question.seed))
        command("--study", str(file), *place, *length)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / 60
        print(f"this program took {spent:.1f} processor minutes of {question.minutes:g}", file=sys.stderr, flush=True)
        told = json.loads(command("front", "--json", *place))
        trials = sorted(told["front"], key=lambda version: float(version["measurements"]["latency"]["value"]))
        places = sorted({round(at) for at in np.linspace(0, len(trials) - 1, self._picks)}) if trials else []
        for number in (trials[at]["trial"] for at in places):
            bundle = folder / f"trial{number}"
            command("pick", *place, "--trial", str(number), "--out", str(bundle))
            yield Entry(f"trial {number}", bundle=bundle)

    def _study(self, question: Question) -> Study:
        minutes = question.minutes
        # Shared weights and trials take 0.55 of the minutes, so this share of them takes what is left.
        final = FinalSection(versions=self._picks, of_search=0.8)
        recovery = question.study.recovery.model_copy(
            update={"elastic": ElasticSection(minutes=0.3 * minutes, seed=question.seed), "final": final}
        )
        update = {
            "name": question.name,
            "budget": Budget.parse([f"latency<{self._budget:g}%"]),
            "exits": ExitsSection(after=()),
            "recovery": recovery,
            "target": question.study.target.model_copy(update={"batch": self._batch}),
        }
        return question.study.model_copy(update=update)


def _trials(minutes: float) -> int:
    """Returns how many trials take about a quarter of the time, at five seconds each."""
    return max(round(0.25 * minutes * 60 / 5), 12)


def command(*arguments: str) -> str:
    """Returns what a command of this program prints as its result; its remarks go to standard error."""
    print(f"$ python -m search {' '.join(arguments)}", file=sys.stderr, flush=True)
    with tempfile.TemporaryFile("w+", encoding="utf-8") as out:
        ended = subprocess.run([sys.executable, "-m", "search", *arguments], check=False, stdout=out)
        if ended.returncode not in (0, _NOTHING_WITHIN):
            raise RuntimeError(f"search {arguments[0]} ends with 0 or {_NOTHING_WITHIN}, got {ended.returncode}")
        out.seek(0)
        return out.read()
