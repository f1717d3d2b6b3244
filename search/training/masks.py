"""Trains masks inside residual blocks of a trained network."""

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
from search.training.frozen_gates import train_in_parts, train_with_frozen_gates, while_gates_learn
from search.training.loop import Augment, Batch, Fitted, Report, TrainingBatches, fast_arithmetic, fit, load_weights
from spaces.dynamic.masks import MASKS
from spaces.dynamic.masks.base import LogitNorm, Mask, each_opened, insert_masks, masks_of, needed
from spaces.dynamic.masks.hard_gate import Noise
from spaces.dynamic.masks.residual_blocks import find_sites

_TEMPERATURE = 2.0
"""Temperature of the distillation."""
_DESCENT = 0.3
"""Share of a training in which the target FLOPs fall from all to those of the settings."""
_QUIET = 0.7
"""Share of a training after which decisions have no noise, as when deployed."""
_RELAX = 3.0
"""Rate at which the bounds of single gates widen; at the end as wide as DGNet's at its first learning rate drop."""
_FASTER = 10.0
"""Factor of the learning rate of mean logits per gate, because gates share the gradient of the FLOPs loss."""
_IMAGES = 2_000
"""Training images for batch norm statistics, with hard decisions."""


def with_masks(trunk: nn.Module, masks: MasksSection, image: Tensor) -> nn.Module:
    """Returns a copy of the trunk with untrained masks in its blocks.

    Args:
        trunk: in evaluation mode.
        masks: the method and its blocks.
        image: one input, `(1, c, h, w)`.

    Raises:
        StructureError: no block supports masks, or a named one does not.
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
    """Trains a network with its masks, or loads the cached result.

    Args:
        network: with untrained masks.
        plain: the same without them.
        data: the training images are used.
        masks: settings of the training.
        augment: augments images.
        file: for the result.
        progress: called with the progress.

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

    def train_frozen(checkpoint: Path, report: Report) -> None:
        train_with_frozen_gates(network, masks_of(network), loss_of, batches, masks, checkpoint, report)
        rebase_batch_norm(network, images)

    train_in_parts(network, learn, train_frozen, file, progress)


def train_masks(
    network: nn.Module,
    plain: nn.Module,
    batches: TrainingBatches,
    masks: MasksSection,
    checkpoint: Path | None = None,
    report: Report = lambda _done, _total: None,
) -> Fitted:
    """Trains a network with masks, on labels, by distillation from the network without masks, and on a FLOPs loss.

    Source: Li et al., Dynamic Dual Gating Neural Networks, 2021 (bounded FLOPs loss), adapted to short trainings that
    start from a trained network: the target starts at all FLOPs, and the noise of decisions ends before the training.

    Raises:
        DivergedError: the loss is not finite for the second time.
    """
    network_masks = masks_of(network)
    loss_of = _MaskedLoss(network, plain, masks, torch.from_numpy(batches.data.images[:1]))

    def step(batch: Batch) -> float:
        noise = Noise(batch.generator, max(0.0, 1 - batch.done / _QUIET))
        for mask in network_masks:
            mask.go_on(batch.done)
            for gate in mask.gates:
                gate.noise = noise
        target = 1 - (1 - masks.keep) * min(1.0, batch.done / _DESCENT)
        loss = loss_of(batch.images, batch.labels, target) + masks.bounds * bounds_loss(
            network_masks, target, batch.done
        )
        loss.backward()
        return float(loss.detach())

    norms = [module for module in network.modules() if isinstance(module, LogitNorm)]
    hooks = [norm.bias.register_hook(lambda grad, norm=norm: _FASTER * norm.num_features * grad) for norm in norms]
    try:
        fitted = fit(network, step, batches, masks, checkpoint, report)
    finally:
        for hook in hooks:
            hook.remove()
    for mask in network_masks:
        mask.go_on(1.0)
        for gate in mask.gates:
            gate.noise = None
    return fitted


class _MaskedLoss:
    """The loss on labels, of distillation from the network without masks, and on FLOPs."""

    def __init__(self, network: nn.Module, plain: nn.Module, masks: MasksSection, image: Tensor) -> None:
        self._network = network
        self._masks = masks
        self._flops = MaskedFlops(plain, network, image)
        self._teacher = copy.deepcopy(plain).eval() if masks.distillation > 0 else None

    def __call__(self, images: Tensor, labels: Tensor, target: float | None = None) -> Tensor:
        """Returns the loss of a batch; `target` is the share of FLOPs, by default that of the settings."""
        with fast_arithmetic():
            with torch.no_grad():
                teacher_logits = self._teacher(images).float() if self._teacher else torch.empty(0)
            logits = self._network(images).float()
        loss = distillation_loss(logits, teacher_logits, labels, self._masks.distillation, _TEMPERATURE)
        share = self._flops.per_image(needed(masks_of(self._network))).mean() / self._flops.dense
        return loss + self._masks.weight * flops_loss(share, self._masks.keep if target is None else target)


def flops_loss(share: Tensor, target: float) -> Tensor:
    """Returns the squared distance of the share of FLOPs from the target."""
    return (share - target) ** 2


def bounds_loss(masks: list[Mask], target: float, done: float) -> Tensor:
    """Returns the mean squared distance of the open shares of gates from their bounds, which widen with the training.

    At first every gate has to be open for the same share, at the end it is free. Where gates multiply, that share is
    the root of the target.

    Args:
        masks: after a forward pass.
        target: share of the FLOPs.
        done: share of the training that is done.
    """
    tightness = math.exp(-_RELAX * done)
    losses = []
    for mask, _, opened in each_opened(masks):
        equal = target ** (1 / mask.factors)
        low = tightness * equal
        high = 1 - tightness + tightness * equal
        mean = opened.mean()
        losses.append(torch.relu(low - mean) ** 2 + torch.relu(mean - high) ** 2)
    return torch.stack(losses).mean() if losses else torch.zeros(())
