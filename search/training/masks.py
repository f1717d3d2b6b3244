"""Training a network once more, with masks in its residual blocks."""

import copy
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from evaluators.data import Splits
from evaluators.flops.masked import MaskedFlops
from search.config.progress import Progress
from search.config.sections import MasksSection
from search.training.batchnorm import check_images, rebase_batch_norm, recovery_images, refresh_statistics
from search.training.distillation import distillation_loss
from search.training.frozen_gates import settle, train_in_parts, while_gates_learn
from search.training.loop import Augment, Fitted, Report, TrainingBatches, fast_arithmetic, fit, load_weights
from spaces.dynamic.masks import MASKS
from spaces.dynamic.masks.base import LogitNorm, Mask, each_opened, insert_masks, masks_of, needed
from spaces.dynamic.masks.hard_gate import Noise
from spaces.dynamic.masks.residual_blocks import find_sites

_TEMPERATURE = 2.0
"""Softens the teacher's answers and the learner's."""
_DESCENT = 0.3
"""The share of a training in which the FLOPs that are asked for fall from all to what is wanted."""
_QUIET = 0.7
"""From this share of a training on, decisions have no noise: it learns what is deployed."""
_RELAX = 3.0
"""How fast the bounds of single gates widen: to the end as far as DGNet's do before its learning rate first falls."""
_FASTER = 10.0
"""How much faster the mean logits of gates learn, for each gate beside them: they share what FLOPs ask for."""
_IMAGES = 2_000
"""Training images that batch statistics are measured on, with hard decisions."""


def with_masks(trunk: nn.Module, masks: MasksSection, image: Tensor) -> nn.Module:
    """Returns a copy of the trunk with untrained masks in its blocks.

    Args:
        trunk: in evaluation mode.
        masks: which method, and where.
        image: one input, `(1, c, h, w)`.

    Raises:
        StructureError: there is no block for a mask, or a named one is none.
    """
    assert masks.method is not None
    torch.manual_seed(masks.seed)
    trunk = copy.deepcopy(trunk).eval()
    sites = find_sites(trunk, image, None if masks.blocks == "all" else masks.blocks)
    return insert_masks(trunk, sites, MASKS[masks.method], masks.keep)


def train_masks_once(
    network: nn.Module,
    plain: nn.Module,
    data: Splits,
    masks: MasksSection,
    augment: Augment | None,
    file: Path,
    progress: Progress,
) -> None:
    """Trains a network with its masks, or loads what an earlier call came to.

    Args:
        network: with untrained masks.
        plain: the same without them.
        data: of which the training images are used.
        masks: how.
        augment: varies images.
        file: for the result.
        progress: told how far it is.

    Raises:
        DivergedError: the loss is not finite for the second time.
    """
    if load_weights(network, file):
        network.eval()
        return
    batches = TrainingBatches(data.train, masks.batch, masks.seed, augment)
    images, check = recovery_images(data.train, _IMAGES), check_images(data.train, _IMAGES)

    def learn(checkpoint: Path, report: Report) -> None:
        train_masks(network, plain, batches, while_gates_learn(masks), checkpoint, report)
        refresh_statistics(network, images, check)

    loss_of = _MaskedLoss(network, plain, masks, torch.from_numpy(data.train.images[:1]))

    def settled(checkpoint: Path, report: Report) -> None:
        settle(network, masks_of(network), loss_of, batches, masks, checkpoint, report)
        rebase_batch_norm(network, images)

    train_in_parts(network, learn, settled, file, progress)


def train_masks(
    network: nn.Module,
    plain: nn.Module,
    batches: TrainingBatches,
    masks: MasksSection,
    checkpoint: Path | None = None,
    report: Report = lambda _done, _total: None,
) -> Fitted:
    """Trains a network with masks: on labels, on what it answered without them, and towards the wanted FLOPs.

    Source: Li et al., Dynamic Dual Gating Neural Networks, 2021 (bounded FLOPs loss), made for short trainings from a
    trained network on: what is asked for falls from all FLOPs, and the noise of decisions ends before the training.

    Raises:
        DivergedError: the loss is not finite for the second time.
    """
    inside, loss_of = masks_of(network), _MaskedLoss(network, plain, masks, torch.from_numpy(batches.data.images[:1]))

    def step(images: Tensor, labels: Tensor, done: float, generator: torch.Generator) -> float:
        noise = Noise(generator, max(0.0, 1 - done / _QUIET))
        for mask in inside:
            mask.go_on(done)
            for gate in mask.gates:
                gate.noise = noise
        wanted = 1 - (1 - masks.keep) * min(1.0, done / _DESCENT)
        loss = loss_of(images, labels, wanted) + masks.bounds * bounds_loss(inside, wanted, done)
        loss.backward()
        return float(loss.detach())

    norms = [module for module in network.modules() if isinstance(module, LogitNorm)]
    hooks = [norm.bias.register_hook(lambda grad, norm=norm: _FASTER * norm.num_features * grad) for norm in norms]
    try:
        fitted = fit(network, step, batches, masks, checkpoint, report)
    finally:
        for hook in hooks:
            hook.remove()
    for mask in inside:
        mask.go_on(1.0)
        for gate in mask.gates:
            gate.noise = None
    return fitted


class _MaskedLoss:
    """On labels, on what the network answered without masks, and on FLOPs."""

    def __init__(self, network: nn.Module, plain: nn.Module, masks: MasksSection, image: Tensor) -> None:
        self._network = network
        self._masks = masks
        self._flops = MaskedFlops(plain, network, image)
        self._teacher = copy.deepcopy(plain).eval() if masks.distillation > 0 else None

    def __call__(self, images: Tensor, labels: Tensor, wanted: float | None = None) -> Tensor:
        """Returns the loss of a batch; the wanted share of FLOPs is that of the settings where none is given."""
        with fast_arithmetic():
            with torch.no_grad():
                answers = self._teacher(images).float() if self._teacher else torch.empty(0)
            logits = self._network(images).float()
        loss = distillation_loss(logits, answers, labels, self._masks.distillation, _TEMPERATURE)
        share = self._flops.per_image(needed(masks_of(self._network))).mean() / self._flops.dense
        return loss + self._masks.weight * flops_loss(share, self._masks.keep if wanted is None else wanted)


def flops_loss(share: Tensor, wanted: float) -> Tensor:
    """Returns the squared distance of the share of FLOPs from the wanted one."""
    return (share - wanted) ** 2


def bounds_loss(masks: list[Mask], wanted: float, done: float) -> Tensor:
    """Returns how far gates are open beyond what they may be: all alike at first, as they like at the end.

    With gates that multiply each may be open for the root of the wanted share.

    Args:
        masks: after a forward.
        wanted: share of the FLOPs.
        done: the share of the training that is behind.
    """
    slack = math.exp(-_RELAX * done)
    losses = []
    for mask, _, opened in each_opened(masks):
        alike = wanted ** (1 / mask.factors)
        low, high = slack * alike, 1 - slack + slack * alike
        mean = opened.mean()
        losses.append(torch.relu(low - mean) ** 2 + torch.relu(mean - high) ** 2)
    return torch.stack(losses).mean() if losses else torch.zeros(())
