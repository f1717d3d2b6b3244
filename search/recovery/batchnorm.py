"""Batch statistics measured anew: the cheapest recovery, and a part of every other."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from evaluators.artifact.qdq import Ranges
from evaluators.data import LabelledImages
from search.recovery import NO_PATTERNS, NO_RANGES, Ground
from spaces.masks.mask import masks_of
from spaces.network import ExitNetwork

BATCH = 64


class BatchNormRecovery:
    """Measures the batch statistics of a pruned network on some training images."""

    effort = "bn"
    ranges: Ranges = NO_RANGES

    def __init__(self, ground: Ground) -> None:
        self.source = ground.network
        self._images = recovery_images(ground.train, ground.settings.images)

    def recover(
        self,
        network: ExitNetwork,
        channels: Mapping[str, int],  # noqa: ARG002
        patterns: Mapping[str, str] = NO_PATTERNS,  # noqa: ARG002
    ) -> None:
        """Replaces the running statistics."""
        recalibrate_batch_norm(network, self._images)


def recovery_images(data: LabelledImages, count: int, seed: int = 0) -> torch.Tensor:
    """Returns `count` training images in random order, `(count, c, h, w)`: a sorted set would show one class only."""
    order = np.random.default_rng(seed).permutation(len(data))[:count]
    return torch.from_numpy(data.images[order])


def recalibrate_batch_norm(network: nn.Module, images: torch.Tensor) -> None:
    """Replaces the running statistics of every batch normalisation by the cumulative mean over `images`.

    Dropped channels shift the mean and variance of what comes after them. Weights stay as they are. Images
    skip what blocks they will skip. Masks decide as they will, but features stay where training leaves them: statistics
    of positions that are masked away would be those of zeros.
    Source: Li et al., EagleEye, 2020.
    """
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    for mask in masks_of(network):
        mask.training = True
    run = network.run_trunk if isinstance(network, ExitNetwork) else network
    with torch.no_grad():
        for batch in torch.split(images, BATCH):
            run(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
    for mask in masks_of(network):
        mask.training = False
