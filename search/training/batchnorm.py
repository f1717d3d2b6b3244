"""Recomputes batch norm statistics on a few images, corrected by those of the dense network on the same images."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from evaluators.data import LabelledImages
from search.training.distillation import all_logits
from spaces.dynamic.exit_network import ExitNetwork
from spaces.dynamic.masks.base import masks_of

BATCH = 64
"""Images per batch, at most, that are normalized together."""
CHECKED = 64
"""Labelled images on which new statistics are compared with the old ones."""
_CLEARLY = 0.02
"""Relative difference of losses that counts as an improvement on so few images."""
_GROUPS = 256
"""Groups of images, at most, that statistics of inputs are kept for."""
_TRAINED_BATCH = 128
"""Assumed batch size of the training that stored statistics come from."""
_SAME = 1e-4
"""Difference of features, in standard deviations, below which they count as equal."""


@dataclass(frozen=True)
class CheckImages:
    """Labelled training images on which new statistics have to improve the loss.

    Args:
        images: `(n, c, h, w)`.
        labels: `(n,)`.
    """

    images: Tensor
    labels: Tensor

    def loss(self, network: nn.Module) -> float:
        """Returns the mean cross-entropy over the exits and the end of a network in evaluation mode, in nats."""
        with torch.no_grad():
            outputs = zip(*(_logits(network, batch) for batch in _batches(self.images)), strict=True)
            losses = [F.cross_entropy(torch.cat(logits), self.labels) for logits in outputs]
        return float(torch.stack(losses).mean())


@dataclass(frozen=True)
class InputStatistics:
    """Statistics of a batch norm's input on some images, in `k` groups of images, for `c` channels.

    Args:
        means: of its input in each group, minus its running mean, `(k, c)`.
        squares: mean squared distance of its input from its running mean in each group, `(k, c)`.
        mean: its running mean, `(c,)`.
        variance: its running variance, `(c,)`.
        images: number of images.
        stored_images: number of images that its running statistics are equivalent to.
    """

    means: Tensor
    squares: Tensor
    mean: Tensor
    variance: Tensor
    images: int
    stored_images: float

    @property
    def shift(self) -> Tensor:
        """The mean of its input minus the running mean, `(c,)`."""
        return self.means.mean(0)

    @property
    def spreads(self) -> Tensor:
        """The mean squared distance of the input from its mean, in each group, `(k, c)`."""
        return self.squares - 2 * self.shift * self.means + self.shift**2

    def without(self, dropped: NDArray[np.int64] | None) -> "InputStatistics":
        """Returns the statistics without the dropped channels."""
        if dropped is None:
            return self
        kept = np.setdiff1d(np.arange(len(self.mean)), dropped)
        remaining = (self.means[:, kept], self.squares[:, kept], self.mean[kept], self.variance[kept])
        return InputStatistics(*remaining, self.images, self.stored_images)


def recovery_images(data: LabelledImages, count: int, seed: int = 0) -> Tensor:
    """Returns `count` training images in random order, `(count, c, h, w)`, because a set may be sorted by class."""
    order = np.random.default_rng(seed).permutation(len(data))[:count]
    return torch.from_numpy(data.images[order])


def check_images(data: LabelledImages, count: int, seed: int = 0) -> CheckImages:
    """Returns labelled training images, other than the `count` of `recovery_images` if there are enough."""
    order = np.random.default_rng(seed).permutation(len(data))
    chosen = np.concatenate([order[count:], order[:count]])[:CHECKED]
    return CheckImages(torch.from_numpy(data.images[chosen]), torch.from_numpy(data.labels[chosen]))


def correct_statistics(
    network: nn.Module,
    source: Mapping[str, InputStatistics],
    dropped: Mapping[str, NDArray[np.int64]],
    images: Tensor,
    check: CheckImages,
) -> None:
    """Updates running statistics after pruning, in place, if that does not raise the loss on `check`.

    A few images estimate a mean badly, but its change by pruning well, because the source saw the same images. For a
    channel with running mean `M`, and a mean over these images of `d` in the source and `s` in the pruned network, the
    new mean is

        s + b * N / (N + n) * (M - d)

    with `n` images, running statistics equivalent to `N` images, and `b` the regression slope of the pruned network's
    means per image on the source's, clipped to 0..1. This is the estimate of least variance (a control variate). After
    little pruning `b` is 1, and the mean is that of both weighted by their images; if the features have nothing in
    common, `b` is 0, and only the measured mean counts. A channel with equal features in both keeps its running
    statistics. Variances follow the same rule on a logarithmic scale, on which they stay positive. Positions in an
    image do not count as samples, because they are correlated. If the measured statistics alone give a lower loss on
    `check`, they are used: after heavy pruning little is in common with the source.

    A running average with momentum `m` weights batches by `m (1 - m)^i`, equivalent to the mean of `2 / m - 1` batches:
    19 at 0.1. Batches of the training are assumed to have 128 images.
    Source: Li et al., EagleEye, 2020 (statistics after pruning); Glasserman, Monte Carlo Methods in Financial
    Engineering, 2003, 4.1 (control variates).

    Args:
        network: pruned from the source, in evaluation mode.
        source: input statistics of the source's batch norms on the same images.
        dropped: indices of dropped channels, by batch norm.
        images: `(n, c, h, w)`.
        check: other images, if there are enough.
    """
    pairs = {
        name: (seen, source[name].without(dropped.get(name))) for name, seen in norm_inputs(network, images).items()
    }
    corrected = {name: _corrected(*pair) for name, pair in pairs.items()}
    changed = {name: new for name, new in corrected.items() if new is not None}
    measured = {name: _measured(pairs[name][0]) for name in changed}
    _keep_best(network, [{}, changed, measured], check)


def refresh_statistics(network: nn.Module, images: Tensor, check: CheckImages) -> None:
    """Sets the batch norm statistics of a trained network to the best of its own and measured ones, in place.

    Running averages of a training cover more images than are measured here; but a short training hardly moves them, and
    random decisions of gates lead to other features than deployed ones. So both are tried, and their mean weighted by
    images, as in `correct_statistics`.

    Args:
        network: in evaluation mode.
        images: `(n, c, h, w)`.
        check: other images, if there are enough.
    """
    seen = norm_inputs(network, images)
    measured = {name: _measured(inputs) for name, inputs in seen.items()}
    pooled = {name: _pooled(inputs) for name, inputs in seen.items()}
    _keep_best(network, [{}, pooled, measured], check)
    for norm in _norms(network).values():  # it would differ after an interrupted training
        norm.get_buffer("num_batches_tracked").zero_()


def recalibrate_batch_norm(network: nn.Module, images: Tensor) -> None:
    """Replaces the running statistics of every batch norm that runs by those of `images`.

    Weights do not change. Gates skip blocks. Masks decide, but masked features are kept as in training, because
    otherwise their statistics would be those of zeros.
    """
    seen = norm_inputs(network, images)
    _store(network, {name: _measured(inputs) for name, inputs in seen.items()})


Statistics = tuple[Tensor, Tensor]
"""Mean and variance of a batch norm, `(c,)` each."""


def _corrected(own: InputStatistics, source: InputStatistics) -> Statistics | None:
    """Returns the corrected statistics of a batch norm; None if its features are those of the source."""
    unit = (source.variance + 1e-12).sqrt()
    mean_shift = ((own.means - source.means) / unit).abs().amax(0)
    square_shift = ((own.squares - source.squares) / unit**2).abs().amax(0)
    changed = (mean_shift > _SAME) | (square_shift > _SAME)
    if not changed.any():
        return None
    share = own.stored_images / (own.stored_images + own.images)
    mean = own.mean + own.shift - share * _slope(own.means, source.means) * source.shift
    own_variance = own.spreads.mean(0)
    source_variance = source.spreads.mean(0)
    is_positive = (own_variance > 0) & (source_variance > 0) & (source.variance > 0)
    relative = (own.spreads / own_variance.clamp_min(1e-30), source.spreads / source_variance.clamp_min(1e-30))
    ratio = torch.where(is_positive, source.variance / source_variance.clamp_min(1e-30), 1.0)
    variance = own_variance * ratio ** (share * _slope(*relative))
    return torch.where(changed, mean, own.mean), torch.where(changed, variance, own.variance)


def _slope(own: Tensor, source: Tensor) -> Tensor:
    """Returns the regression slope of `own` on `source`, both `(k, c)`, clipped to 0..1, `(c,)`."""
    own, source = own - own.mean(0), source - source.mean(0)
    power = (source**2).sum(0)
    slope = (own * source).sum(0) / power.clamp_min(1e-30)
    return torch.where(power > 0, slope, 0.0).clamp(0.0, 1.0)


def _measured(seen: InputStatistics) -> Statistics:
    """Returns the statistics of the images alone."""
    return seen.mean + seen.shift, seen.spreads.mean(0)


def _pooled(seen: InputStatistics) -> Statistics:
    """Returns the mean of running and measured statistics, weighted by their images."""
    share = seen.images / (seen.stored_images + seen.images)
    between = share * (1 - share) * seen.shift**2
    return seen.mean + share * seen.shift, (1 - share) * seen.variance + share * seen.spreads.mean(0) + between


def _keep_best(network: nn.Module, choices: Sequence[Mapping[str, Statistics]], check: CheckImages) -> None:
    """Sets the statistics of the lowest loss; each choice has to be clearly better than those before it."""
    if not any(choices):
        return
    stored = {name: _stored(norm) for name, norm in _norms(network).items()}
    best = choices[0]
    lowest = np.inf
    for choice in choices:
        _store(network, {**stored, **choice})
        loss = check.loss(network)
        if loss < (1 - _CLEARLY) * lowest:
            best = choice
            lowest = loss
    _store(network, {**stored, **best})


def _store(network: nn.Module, statistics: Mapping[str, Statistics]) -> None:
    for name, (mean, variance) in statistics.items():
        norm = network.get_submodule(name)
        with torch.no_grad():
            norm.get_buffer("running_mean").copy_(mean)
            norm.get_buffer("running_var").copy_(variance)


def _stored(norm: _BatchNorm) -> Statistics:
    return norm.get_buffer("running_mean").clone(), norm.get_buffer("running_var").clone()


def rebase_batch_norm(network: nn.Module, images: Tensor) -> None:
    """Sets the statistics to those of `images` without changing the network's function.

    After training with fixed statistics these differ from those of the features, so that recalibration would undo the
    training. In `scale * (x - mean) / std + shift`, scale and shift are adjusted for the new mean and std.

    Args:
        network: in evaluation mode.
        images: `(n, c, h, w)`, preferably those of a later recalibration.
    """
    norms = {name: norm for name, norm in _norms(network).items() if norm.affine}
    seen = _seen(network, norms, images)
    with torch.no_grad():
        for name, inputs in seen.items():
            norm = norms[name]
            variance = inputs.spreads.mean(0)
            unit = norm.weight / (inputs.variance + norm.eps).sqrt()
            norm.bias.add_(unit * inputs.shift)
            norm.weight.copy_(unit * (variance + norm.eps).sqrt())
    _store(network, {name: _measured(inputs) for name, inputs in seen.items()})


def _norms(network: nn.Module) -> dict[str, _BatchNorm]:
    """Returns the batch norms with running statistics, by their paths."""
    modules = {name: module for name, module in network.named_modules() if isinstance(module, _BatchNorm)}
    return {name: norm for name, norm in modules.items() if norm.running_mean is not None}


def norm_inputs(network: nn.Module, images: Tensor) -> dict[str, InputStatistics]:
    """Returns the input statistics of each batch norm that runs, normalizing by the batch as in training."""
    norms = _norms(network)
    with _batch_statistics(list(norms.values())):
        return _seen(network, norms, images) if norms else {}


@contextmanager
def _batch_statistics(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Lets batch norms normalize by the statistics of the batch, without updating their running ones."""
    for norm in norms:
        norm.train()
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
            norm.eval()


def _seen(network: nn.Module, norms: Mapping[str, _BatchNorm], images: Tensor) -> dict[str, InputStatistics]:
    batches = _batches(images)
    groups = max(_GROUPS // len(batches), 1)
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in norms}
    hooks = [norm.register_forward_pre_hook(_collector(parts[name], groups)) for name, norm in norms.items()]
    try:
        _run_unmasked(network, batches)
    finally:
        for hook in hooks:
            hook.remove()
    inputs = {}
    for name, collected in parts.items():
        if collected:
            means, squares = (torch.cat(part) for part in zip(*collected, strict=True))
            inputs[name] = InputStatistics(
                means, squares, *_stored(norms[name]), len(images), _equivalent_images(norms[name])
            )
    return inputs


def _collector(into: list[tuple[Tensor, Tensor]], groups: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """Returns a hook that appends means and mean squares around the running mean, per group of images."""

    def collect(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        images = args[0].detach().float()
        deviations = images.flatten(2) if images.ndim > 2 else images[:, :, None]
        deviations = deviations - norm.get_buffer("running_mean")[:, None]
        squares = torch.linalg.vector_norm(deviations, dim=2) ** 2 / deviations.shape[2]  # much faster than a variance
        into.append((_grouped(deviations.mean(2), groups), _grouped(squares, groups)))

    return collect


def _grouped(rows: Tensor, groups: int) -> Tensor:
    """Returns the means of `groups` groups of rows, or of fewer if there are fewer rows."""
    return torch.stack([part.mean(0) for part in rows.tensor_split(min(groups, len(rows)))])


def _equivalent_images(norm: _BatchNorm) -> float:
    """Returns the number of images that the running statistics of a batch norm are equivalent to."""
    momentum = norm.momentum or 0.1  # without one, the number of batches is unknown
    return (2 / momentum - 1) * _TRAINED_BATCH


def _batches(images: Tensor) -> list[Tensor]:
    """Returns images in batches of about equal size, because a small last batch has bad statistics."""
    return list(images.tensor_split(max(-(-len(images) // BATCH), 1)))


def _logits(network: nn.Module, images: Tensor) -> list[Tensor]:
    """Returns the logits of each exit and of the network's end, with blocks skipped as the gates decide."""
    return all_logits(network, images) if isinstance(network, ExitNetwork) else [network(images).float()]


def _run_unmasked(network: nn.Module, batches: Sequence[Tensor]) -> None:
    """Runs images through the network; masks decide, but masked features are kept as in training."""
    for mask in masks_of(network):
        mask.training = True
    with torch.no_grad():
        for batch in batches:
            _logits(network, batch)
    for mask in masks_of(network):
        mask.training = False
