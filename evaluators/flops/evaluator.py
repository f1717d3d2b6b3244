"""FLOPs as fvcore counts them: one fused multiply-add is one flop, batch normalisation and pooling are counted."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from evaluators.deployed import Answers, DeployedCandidate
from evaluators.flops.operators import analysis, not_counted
from evaluators.measurement import Measurement
from spaces.dynamic.exit_network import ExitNetwork
from spaces.dynamic.masks.base import Mask, masks_of, needed

Floats = NDArray[np.float64]

_PROTOCOL = "fvcore, one fused multiply-add is one flop, per image"
_MASKED = (
    "; masked convolutions by the positions and channels that an image needs, gates included: no runtime for dense"
    " tensors saves them"
)
_BATCH = 64
_MAX_MASKED_IMAGES = 512
"""The largest number of images on which masks are evaluated, because each is run through the torch network."""


class FlopsEvaluator:
    """FLOPs per image; the mean over the validation images if inputs decide what is run.

    Args:
        network: the dense network with its exits and gates.
        image: one input, `(1, c, h, w)`.
    """

    metric = "flops"

    def __init__(self, network: ExitNetwork, image: torch.Tensor) -> None:
        self._image = image
        self._begins, self._stage_of = _stages(network, image)
        self._counts: dict[object, Mapping[str, float]] = {}
        self.remarks = tuple(
            f"FLOPs leave out {name}, which runs {count} time{'s' * (count > 1)} and may multiply: nobody counts it"
            for name, count in not_counted(network, image).items()
        )
        """What the network computes and nobody counts, as sentences without their end."""

    def measure(self, subject: DeployedCandidate) -> Measurement:
        """Returns the mean FLOPs per image, and those of the longest path.

        Notes have the mean share of skippable blocks that images run, and its standard deviation over images.
        """
        return replace(self._measure(subject), remarks=self.remarks)

    def _measure(self, subject: DeployedCandidate) -> Measurement:
        counts = self._by_module(subject)
        always, blocks = self._parts(subject, counts)
        compared = self._compared(subject)
        worst = compared + float(always.sum() + blocks.sum())
        notes = {"nonzero": self._nonzero(subject, counts)} if subject.candidate.patterns else {}
        if masks := masks_of(subject.network):
            return self._masked(subject, masks, counts, always, compared + float(blocks.sum()))
        if not subject.artifact.is_dynamic:
            return Measurement("flops", worst, "expected", 1, 0.0, "any", _PROTOCOL, {"worst": worst}, notes)
        reached, ran = self._run_by(subject)
        per_image = compared + reached @ always + ran @ blocks
        n, spread = len(per_image), float(per_image.std() / np.sqrt(len(per_image)))
        notes |= _shares(ran[subject.answers.computed], subject.artifact.blocks)
        return Measurement(
            "flops", float(per_image.mean()), "expected", n, spread, "any", _PROTOCOL, {"worst": worst}, notes
        )

    def _masked(
        self,
        subject: DeployedCandidate,
        masks: Sequence[Mask],
        counts: Mapping[str, float],
        always: Floats,
        more: float,
    ) -> Measurement:
        """Returns the mean FLOPs of a network with masks, up to the exit that each image takes."""
        images = subject.validation.images[:_MAX_MASKED_IMAGES]
        saved = np.zeros((len(images), len(always)))
        with torch.no_grad():
            for start in range(0, len(images), _BATCH):
                subject.network.run_trunk(torch.from_numpy(np.ascontiguousarray(images[start : start + _BATCH])))
                for path, share in needed(masks).items():
                    stage = self._stage(f"trunk.{path}", subject.artifact.exits, subject.network.exit_names)
                    saved[start : start + _BATCH, stage] += counts[f"trunk.{path}"] * (1 - share.double().numpy())
        reached = np.ones_like(saved)
        if subject.artifact.is_dynamic:
            reached = self._run_by(subject)[0][: len(images)].astype(float)
        per_image = more + (reached * (always - saved)).sum(axis=1)
        n, spread = len(per_image), float(per_image.std() / np.sqrt(len(per_image)))
        others = {"worst": more + float(always.sum())}
        notes = {"std": float(per_image.std())}
        protocol = _PROTOCOL + _MASKED
        return Measurement("flops", float(per_image.mean()), "expected", n, spread, "any", protocol, others, notes)

    def _run_by(self, subject: DeployedCandidate) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Returns which stages and which blocks each validation image runs, `(n, stages)` and `(n, blocks)`."""
        answers = subject.answers
        reached = (answers.exits[:, None] >= np.arange(answers.stages)) & answers.computed[:, None]
        return reached, reached[:, self._block_stages(subject)] & ~answers.skipped

    def _block_stages(self, subject: DeployedCandidate) -> list[int]:
        """Returns the stage of each skippable block."""
        names, active = subject.network.exit_names, subject.artifact.exits
        return [sum(names.index(name) < self._begins[block] for name in active) for block in subject.artifact.blocks]

    def _parts(self, subject: DeployedCandidate, counts: Mapping[str, float]) -> tuple[Floats, Floats]:
        """Returns the FLOPs of each stage without skippable blocks, and those of each skippable block."""
        active, gated = subject.artifact.exits, subject.artifact.blocks
        always, blocks = np.zeros(len(active) + 1), np.zeros(len(gated))
        for path, count in counts.items():
            inside = [index for index, block in enumerate(gated) if f"{path}.".startswith(f"trunk.{block}.")]
            if inside:
                blocks[inside] += count
            elif _is_deployed(path, active, gated):
                always[self._stage(path, active, subject.network.exit_names)] += count
        return always, blocks

    def stages(self, subject: DeployedCandidate, answers: Answers | None = None) -> list[float]:
        """Returns the FLOPs of each stage of the deployed version, heads included.

        Args:
            subject: the version.
            answers: the blocks that images skip if no image leaves early; None if every block is run.
        """
        stages, blocks = self._parts(subject, self._by_module(subject))
        ran = np.ones(len(blocks)) if answers is None else 1 - answers.skipped.mean(axis=0)
        np.add.at(stages, self._block_stages(subject), ran * blocks)
        return [float(flops) for flops in stages]

    def heads(self, subject: DeployedCandidate) -> list[float]:
        """Returns the FLOPs of the head of each active exit."""
        counts = self._by_module(subject)
        return [
            sum(count for path, count in counts.items() if path.startswith(f"exits.{name}."))
            for name in subject.artifact.exits
        ]

    def _compared(self, subject: DeployedCandidate) -> float:
        """Returns the FLOPs of comparing a frame with the last key frame: one per value, as fvcore counts pooling."""
        return float(self._image.numel()) if subject.artifact.reuse else 0.0

    def exits_before(self, path: str) -> int:
        """Returns the number of exits before a module of the trunk."""
        return self._stage_of.get(path, 0)

    def _nonzero(self, subject: DeployedCandidate, counts: Mapping[str, float]) -> float:
        """Returns the share of the trunk's FLOPs with nonzero weights."""
        weights = dict(subject.network.named_parameters())
        trunk = {path: count for path, count in counts.items() if path.startswith("trunk.")}
        left = sum(
            count * (float((weights[f"{path}.weight"] != 0).float().mean()) if f"{path}.weight" in weights else 1.0)
            for path, count in trunk.items()
        )
        return left / sum(trunk.values())

    def _stage(self, path: str, active: tuple[str, ...], exits: tuple[str, ...]) -> int:
        """Returns the stage in which a module runs if only the `active` exits cut the network."""
        depth = self._stage_of.get(path, len(exits))
        return sum(1 for name in active if exits.index(name) < depth)

    def _by_module(self, subject: DeployedCandidate) -> Mapping[str, float]:
        candidate = subject.candidate
        key = tuple(sorted(candidate.channels.items())), candidate.removed_blocks, candidate.input_size
        if key not in self._counts:
            self._counts[key] = _without_masking(subject.network, count_by_module(subject.network, self._image))
        return self._counts[key]


def _without_masking(network: ExitNetwork, counts: Mapping[str, float]) -> dict[str, float]:
    """Returns the counts without those that masks add to a block itself: partial sums are part of a convolution."""
    masked_blocks = {f"trunk.{mask.site.block}" for mask in masks_of(network)}
    return {path: count for path, count in counts.items() if path not in masked_blocks}


def count_by_module(network: torch.nn.Module, image: torch.Tensor) -> dict[str, float]:
    """Returns the FLOPs of each module without its children, for one image; `""` is the network's own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        totals = analysis(network, image).by_module()
    own = {}
    for path, module in network.named_modules():
        children = [f"{path}.{name}" if path else name for name, _ in module.named_children()]
        own[path] = float(totals[path] - sum(totals[child] for child in children))
    return {path: count for path, count in own.items() if count}


def _shares(ran: NDArray[np.bool_], blocks: Sequence[str]) -> dict[str, float]:
    if not blocks:
        return {}
    each = {f"ran {block}": float(share) for block, share in zip(blocks, ran.mean(axis=0), strict=True)}
    return {"blocks_run": float(ran.mean()), "blocks_run_std": float(ran.mean(axis=1).std())} | each


def _is_deployed(path: str, exits: Sequence[str], blocks: Sequence[str]) -> bool:
    """Returns whether a module is deployed: exit heads and gates are only if they are active."""
    if path.startswith("exits."):
        return path.split(".")[1] in exits
    return not path.startswith("skips.") or any(path.startswith(f"skips.{block}.") for block in blocks)


def _stages(network: ExitNetwork, image: torch.Tensor) -> tuple[dict[str, int], dict[str, int]]:
    """Returns how many cut points lie before each gated block, and before each module: the stage that it runs in.

    That is where it begins, and, of a module that spans several, where what it computes itself comes.
    """
    order: dict[str, int] = {}
    passed = 0

    def start(path: str) -> None:
        order.setdefault(path, passed)

    def finish() -> None:
        nonlocal passed
        passed += 1

    hooks = [
        module.register_forward_pre_hook(lambda _module, _args, path=path: start(path))
        for path, module in network.named_modules()
    ]
    hooks += [
        network.trunk.get_submodule(path).register_forward_hook(lambda _module, _args, _out: finish())
        for path in network.cut_points
    ]
    with torch.no_grad():
        network(image)
    for hook in hooks:
        hook.remove()
    begins = {block: order[f"trunk.{block}"] for block in network.skip_blocks}
    # Parents that span several stages start in the first; what they compute themselves comes after their children.
    order |= {path: passed for path, module in network.named_modules() if any(True for _ in module.children())}
    heads = {f"exits.{name}.": index for index, name in enumerate(network.exit_names)}
    heads |= {f"skips.{block}.": stage for block, stage in begins.items()}
    own = {path: next((stage for head, stage in heads.items() if path.startswith(head)), order[path]) for path in order}
    return begins, own
