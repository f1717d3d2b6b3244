"""Batch statistics measured anew: the cheapest recovery, and a part of every other."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
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


def recovery_images(data: LabelledImages, count: int, seed: int = 0) -> Tensor:
    """Returns `count` training images in random order, `(count, c, h, w)`: a sorted set would show one class only."""
    order = np.random.default_rng(seed).permutation(len(data))[:count]
    return torch.from_numpy(data.images[order])


def recalibrate_batch_norm(network: nn.Module, images: Tensor) -> None:
    """Replaces the running statistics of every batch normalisation by the cumulative mean over `images`.

    Dropped channels shift the mean and variance of what comes after them. Weights stay as they are. Images
    skip what blocks they will skip. Masks decide as they will, but features stay where training leaves them: statistics
    of positions that are masked away would be those of zeros.
    Source: Li et al., EagleEye, 2020.
    """
    norms = _norms(network)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    _run_unmasked(network, images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def rebase_batch_norm(network: nn.Module, images: Tensor) -> None:
    """Gives a network the statistics that it would be recalibrated to, and changes nothing that it computes.

    Weights that learned with fixed statistics have no longer those of their features, and recalibration would undo what
    they learned. In `scale * (x - mean) / std + shift` another scale and shift make up for another mean and std.

    Args:
        network: in evaluation mode.
        images: `(n, c, h, w)`, better those that it is recalibrated on later.
    """
    norms = [norm for norm in _norms(network) if norm.affine and norm.track_running_stats]
    seen: dict[_BatchNorm, list[tuple[Tensor, Tensor]]] = {norm: [] for norm in norms}

    def see(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        axes = [axis for axis in range(args[0].dim()) if axis != 1]
        variance, mean = torch.var_mean(args[0].float(), axes)
        seen[norm].append((mean, variance))  # type: ignore[index]

    hooks = [norm.register_forward_pre_hook(see) for norm in norms]
    _run_unmasked(network, images)
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        for norm in (norm for norm in norms if seen[norm]):
            mean, variance = (torch.stack(each).mean(dim=0) for each in zip(*seen[norm], strict=True))
            old_mean, old_variance = norm.running_mean, norm.running_var
            assert old_mean is not None
            assert old_variance is not None
            unit = norm.weight / (old_variance + norm.eps).sqrt()
            norm.bias.add_(unit * (mean - old_mean))
            norm.weight.copy_(unit * (variance + norm.eps).sqrt())
            old_mean.copy_(mean)
            old_variance.copy_(variance)


def _norms(network: nn.Module) -> list[_BatchNorm]:
    return [module for module in network.modules() if isinstance(module, _BatchNorm)]


def _run_unmasked(network: nn.Module, images: Tensor) -> None:
    """Runs images through the trunk, where masks decide but hidden features stay where training leaves them."""
    for mask in masks_of(network):
        mask.training = True
    run = network.run_trunk if isinstance(network, ExitNetwork) else network
    with torch.no_grad():
        for batch in torch.split(images, BATCH):
            run(batch)
    for mask in masks_of(network):
        mask.training = False
