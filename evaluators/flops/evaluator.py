"""FLOPs as fvcore counts them: one fused multiply-add is one flop, batch normalisation and pooling are counted."""

import logging
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from fvcore.nn import FlopCountAnalysis
from numpy.typing import NDArray

from evaluators.deployed import Answers, DeployedCandidate
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
_MOST_MASKED = 512
"""So many of the scored images tell what masks open: each goes through the network in torch."""


class FlopsEvaluator:
    """FLOPs per image, as expected over the validation images where inputs decide what is run.

    Args:
        network: the dense network with its exits and gates.
        image: one input, `(1, c, h, w)`.
    """

    metric = "flops"

    def __init__(self, network: ExitNetwork, image: torch.Tensor) -> None:
        self._image = image
        self._begins, self._stage_of = _stages(network, image)
        self._counts: dict[tuple[tuple[str, int], ...], Mapping[str, float]] = {}

    def measure(self, subject: DeployedCandidate) -> Measurement:
        """Returns the mean FLOPs of what each image runs, and the longest path's beside.

        Notes tell the share of the blocks which may be skipped that images run, and its standard deviation over images.
        """
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
        found = compared + reached @ always + ran @ blocks  # of each image
        n, spread = len(found), float(found.std() / np.sqrt(len(found)))
        notes |= _shares(ran[subject.answers.computed], subject.artifact.blocks)
        return Measurement(
            "flops", float(found.mean()), "expected", n, spread, "any", _PROTOCOL, {"worst": worst}, notes
        )

    def _masked(
        self,
        subject: DeployedCandidate,
        masks: Sequence[Mask],
        counts: Mapping[str, float],
        always: Floats,
        more: float,
    ) -> Measurement:
        """Returns the mean of what images need where masks decide, stage by stage as far as each image goes."""
        images = subject.validation.images[:_MOST_MASKED]
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
        found = more + (reached * (always - saved)).sum(axis=1)
        spread, worst = float(found.std() / np.sqrt(len(found))), more + float(always.sum())
        others, notes = {"worst": worst}, {"std": float(found.std())}
        protocol = _PROTOCOL + _MASKED
        return Measurement("flops", float(found.mean()), "expected", len(found), spread, "any", protocol, others, notes)

    def _run_by(self, subject: DeployedCandidate) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Returns which stages and which blocks each validation image runs, `(n, stages)` and `(n, blocks)`."""
        answers = subject.answers
        reached = (answers.exits[:, None] >= np.arange(answers.stages)) & answers.computed[:, None]
        return reached, reached[:, self._block_stages(subject)] & ~answers.skipped

    def _block_stages(self, subject: DeployedCandidate) -> list[int]:
        """Returns the stage that each block which may be skipped lies in."""
        names, active = subject.network.exit_names, subject.artifact.exits
        return [sum(names.index(name) < self._begins[block] for name in active) for block in subject.artifact.blocks]

    def _parts(self, subject: DeployedCandidate, counts: Mapping[str, float]) -> tuple[Floats, Floats]:
        """Returns the FLOPs of each stage without the blocks that may be skipped, and those of these blocks."""
        active, gated = subject.artifact.exits, subject.artifact.blocks
        always, blocks = np.zeros(len(active) + 1), np.zeros(len(gated))
        for path, count in counts.items():
            inside = [index for index, block in enumerate(gated) if f"{path}.".startswith(f"trunk.{block}.")]
            if inside:
                blocks[inside] += count
            elif _is_deployed(path, active, gated):
                always[self._stage(path, active, subject.network.exit_names)] += count
        return always, blocks

    def stages(self, subject: DeployedCandidate, ways: Answers | None = None) -> list[float]:
        """Returns the FLOPs of each stage of the deployed version, heads included.

        Args:
            subject: the version.
            ways: which blocks images pass by when nobody leaves; where not given, every block is run.
        """
        stages, blocks = self._parts(subject, self._by_module(subject))
        ran = np.ones(len(blocks)) if ways is None else 1 - ways.skipped.mean(axis=0)
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
        """Returns what comparing a frame with the last key frame costs: as fvcore counts pooling, one per value."""
        return float(self._image.numel()) if subject.artifact.reuse else 0.0

    def exits_before(self, path: str) -> int:
        """Returns how many exits lie before a module of the trunk."""
        return self._stage_of.get(path, 0)

    def _nonzero(self, subject: DeployedCandidate, counts: Mapping[str, float]) -> float:
        """Returns the share of the trunk's FLOPs that multiply by a weight other than zero."""
        weights = dict(subject.network.named_parameters())
        trunk = {path: count for path, count in counts.items() if path.startswith("trunk.")}
        left = sum(
            count * (float((weights[f"{path}.weight"] != 0).float().mean()) if f"{path}.weight" in weights else 1.0)
            for path, count in trunk.items()
        )
        return left / sum(trunk.values())

    def _stage(self, path: str, active: tuple[str, ...], exits: tuple[str, ...]) -> int:
        """Returns the stage that a module runs in, when only the `active` exits cut the network."""
        depth = self._stage_of.get(path, len(exits))
        return sum(1 for name in active if exits.index(name) < depth)

    def _by_module(self, subject: DeployedCandidate) -> Mapping[str, float]:
        key = tuple(sorted(subject.candidate.channels.items()))
        if key not in self._counts:
            self._counts[key] = _without_masking(subject.network, count_by_module(subject.network, self._image))
        return self._counts[key]


def _without_masking(network: ExitNetwork, counts: Mapping[str, float]) -> dict[str, float]:
    """Returns the counts but for what masks do beside a block's layers: a partial sum is a part of its convolution."""
    beside = {f"trunk.{mask.site.block}" for mask in masks_of(network)}
    return {path: count for path, count in counts.items() if path not in beside}


def count_by_module(network: torch.nn.Module, image: torch.Tensor) -> dict[str, float]:
    """Returns the FLOPs of each module without its children, for one image; `""` is the network's own."""
    logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        totals = FlopCountAnalysis(network, image).unsupported_ops_warnings(False).by_module()
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
    """Returns whether a module is in the files: not where it is the head of no exit or the gate of no block."""
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
