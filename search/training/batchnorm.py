"""Statistics of batch normalisation, measured anew on a few images and corrected by what the dense network sees."""

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
"""So many images are normalised together at most, by their own statistics."""
CHECKED = 64
"""So many labelled images tell whether new statistics are better than the old ones."""
_CLEARLY = 0.02
"""By less than this share so few images cannot tell two losses apart."""
_GROUPS = 256
"""What a norm sees is kept for so many groups of images at most, because images may be thousands."""
_TRAINED_BATCH = 128
"""Images in a batch of the training that stored statistics come from, where nobody knows."""
_SAME = 1e-4
"""Features that differ by less, in standard deviations, differ by rounding."""


@dataclass(frozen=True)
class Checked:
    """Labelled training images on which new statistics have to be better than the old ones.

    Args:
        images: `(n, c, h, w)`.
        labels: `(n,)`.
    """

    images: Tensor
    labels: Tensor

    def loss(self, network: nn.Module) -> float:
        """Returns the mean cross-entropy of the exits and the end of a network in evaluation mode, in nats."""
        with torch.no_grad():
            answers = zip(*(_logits(network, batch) for batch in _batches(self.images)), strict=True)
            losses = [F.cross_entropy(torch.cat(each), self.labels) for each in answers]
        return float(torch.stack(losses).mean())


@dataclass(frozen=True)
class Seen:
    """What a norm saw of some images, in groups of them: `k` groups, `c` channels.

    Args:
        means: of its input in each group, less its stored mean, `(k, c)`.
        squares: mean squares of its input's distance from its stored mean in each group, `(k, c)`.
        mean: that it has stored, `(c,)`.
        variance: that it has stored, `(c,)`.
        images: how many there were.
        stands_for: how many images its stored statistics stand for.
    """

    means: Tensor
    squares: Tensor
    mean: Tensor
    variance: Tensor
    images: int
    stands_for: float

    @property
    def shift(self) -> Tensor:
        """The mean of its input, less the stored one, `(c,)`."""
        return self.means.mean(0)

    @property
    def spreads(self) -> Tensor:
        """The mean square of the input's distance from its mean, in each group, `(k, c)`."""
        return self.squares - 2 * self.shift * self.means + self.shift**2

    def without(self, dropped: NDArray[np.int64] | None) -> "Seen":
        """Returns the same for the channels that are left."""
        if dropped is None:
            return self
        kept = np.setdiff1d(np.arange(len(self.mean)), dropped)
        left = (self.means[:, kept], self.squares[:, kept], self.mean[kept], self.variance[kept])
        return Seen(*left, self.images, self.stands_for)


def recovery_images(data: LabelledImages, count: int, seed: int = 0) -> Tensor:
    """Returns `count` training images in random order, `(count, c, h, w)`: a sorted set would show one class only."""
    order = np.random.default_rng(seed).permutation(len(data))[:count]
    return torch.from_numpy(data.images[order])


def check_images(data: LabelledImages, count: int, seed: int = 0) -> Checked:
    """Returns labelled training images, as far as there are enough others than the `count` of `recovery_images`."""
    order = np.random.default_rng(seed).permutation(len(data))
    chosen = np.concatenate([order[count:], order[:count]])[:CHECKED]
    return Checked(torch.from_numpy(data.images[chosen]), torch.from_numpy(data.labels[chosen]))


def correct_statistics(
    network: nn.Module,
    source: Mapping[str, Seen],
    dropped: Mapping[str, NDArray[np.int64]],
    images: Tensor,
    check: Checked,
) -> None:
    """Corrects running statistics by what cutting has changed, in place, unless the loss on `check` is higher then.

    A few images tell a mean badly; how a mean has moved they tell well, because the source saw the same images. Of a
    channel whose stored mean is `M`, and whose mean over these images is `d` in the source and `s` in the slice, the
    new mean is

        s + b * N / (N + n) * (M - d)

    with `n` images, `N` that stand behind the stored statistics, and `b` the slope of the slice's means of single
    images over the source's, held between 0 and 1. That is the estimate of least variance (a control variate). Where
    cutting has changed little, `b` is 1, and it is the mean of both weighted by the images behind each; where the
    features have nothing in common with what they were, `b` is 0, and only what was measured counts. A channel whose
    features are the same in both keeps what is stored. Variances go by the same rule on a logarithmic scale, on which
    they stay positive. Positions in an image are not counted: they are too much alike. Where `check` says that what was
    measured alone is better still, that is kept: heavy cuts leave little in common with the source.

    Running averages with momentum `m` weigh batches by `m (1 - m)^i`, which is as good as the mean of `2 / m - 1`
    equal ones: 19 at 0.1. A batch of a training that nobody knows is taken to be of 128 images.
    Source: Li et al., EagleEye, 2020 (statistics after pruning); Glasserman, Monte Carlo Methods in Financial
    Engineering, 2003, 4.1 (control variates).

    Args:
        network: a slice of the source, in evaluation mode.
        source: what its norms saw of the same images.
        dropped: for each norm that lost channels, which.
        images: `(n, c, h, w)`.
        check: other images, where there are enough.
    """
    found = {
        name: (seen, source[name].without(dropped.get(name)))
        for name, seen in observed_by_norms(network, images).items()
    }
    norms = {name: _corrected(*pair) for name, pair in found.items()}
    changed = {name: new for name, new in norms.items() if new is not None}
    measured = {name: _measured(found[name][0]) for name in changed}
    _keep_best(network, [{}, changed, measured], check)


def refresh_statistics(network: nn.Module, images: Tensor, check: Checked) -> None:
    """Gives a network that was trained the better of two statistics, in place: its own, or what images show.

    A training keeps running averages, of more images than are measured here; but a short one hardly moves them, and
    one whose decisions were random saw other features than are deployed. So both are tried, and their means by the
    images behind each, as `correct_statistics` counts them.

    Args:
        network: in evaluation mode.
        images: `(n, c, h, w)`.
        check: other images, where there are enough.
    """
    seen = observed_by_norms(network, images)
    measured = {name: _measured(each) for name, each in seen.items()}
    _keep_best(network, [{}, {name: _pooled(each) for name, each in seen.items()}, measured], check)
    for norm in _norms(
        network
    ).values():  # a training that was interrupted has counted other batches than a straight one
        norm.get_buffer("num_batches_tracked").zero_()


def recalibrate_batch_norm(network: nn.Module, images: Tensor) -> None:
    """Replaces the running statistics of every batch normalisation that runs by those of `images`.

    Weights stay as they are. Images skip what blocks they will skip. Masks decide as they will, but features stay where
    training leaves them: statistics of positions that are masked away would be those of zeros.
    """
    seen = observed_by_norms(network, images)
    _store(network, {name: _measured(each) for name, each in seen.items()})


Statistics = tuple[Tensor, Tensor]
"""A norm's mean and variance, `(c,)` each."""


def _corrected(own: Seen, source: Seen) -> Statistics | None:
    """Returns the statistics of a norm of a slice; None where its features are those of the source."""
    unit = (source.variance + 1e-12).sqrt()
    moved = ((own.means - source.means) / unit).abs().amax(0)
    spread = ((own.squares - source.squares) / unit**2).abs().amax(0)
    changed = (moved > _SAME) | (spread > _SAME)
    if not changed.any():
        return None
    share = own.stands_for / (own.stands_for + own.images)
    mean = own.mean + own.shift - share * _slope(own.means, source.means) * source.shift
    own_variance, source_variance = own.spreads.mean(0), source.spreads.mean(0)
    known = (own_variance > 0) & (source_variance > 0) & (source.variance > 0)
    relative = (own.spreads / own_variance.clamp_min(1e-30), source.spreads / source_variance.clamp_min(1e-30))
    ratio = torch.where(known, source.variance / source_variance.clamp_min(1e-30), 1.0)
    variance = own_variance * ratio ** (share * _slope(*relative))
    return torch.where(changed, mean, own.mean), torch.where(changed, variance, own.variance)


def _slope(own: Tensor, source: Tensor) -> Tensor:
    """Returns the slope of one over the other, in each channel, from 0 to 1: `(k, c)` twice to `(c,)`."""
    own, source = own - own.mean(0), source - source.mean(0)
    power = (source**2).sum(0)
    slope = (own * source).sum(0) / power.clamp_min(1e-30)
    return torch.where(power > 0, slope, 0.0).clamp(0.0, 1.0)


def _measured(seen: Seen) -> Statistics:
    """Returns the statistics of the images that were seen, whatever is stored."""
    return seen.mean + seen.shift, seen.spreads.mean(0)


def _pooled(seen: Seen) -> Statistics:
    """Returns the mean of stored and measured statistics, by the images that stand behind each."""
    share = seen.images / (seen.stands_for + seen.images)
    apart = share * (1 - share) * seen.shift**2
    return seen.mean + share * seen.shift, (1 - share) * seen.variance + share * seen.spreads.mean(0) + apart


def _keep_best(network: nn.Module, choices: Sequence[Mapping[str, Statistics]], check: Checked) -> None:
    """Leaves a network with those statistics that give the least loss, each choice having to better those before it."""
    if not any(choices):
        return
    stored = {name: _stored(norm) for name, norm in _norms(network).items()}
    best, least = choices[0], np.inf
    for choice in choices:
        _store(network, {**stored, **choice})
        loss = check.loss(network)
        if loss < (1 - _CLEARLY) * least:
            best, least = choice, loss
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
    """Gives a network the statistics that it would be recalibrated to, and changes nothing that it computes.

    Weights that learned with fixed statistics have no longer those of their features, and recalibration would undo what
    they learned. In `scale * (x - mean) / std + shift` another scale and shift make up for another mean and std.

    Args:
        network: in evaluation mode.
        images: `(n, c, h, w)`, better those that it is recalibrated on later.
    """
    norms = {name: norm for name, norm in _norms(network).items() if norm.affine}
    seen = _seen(network, norms, images)
    with torch.no_grad():
        for name, each in seen.items():
            norm, variance = norms[name], each.spreads.mean(0)
            unit = norm.weight / (each.variance + norm.eps).sqrt()
            norm.bias.add_(unit * each.shift)
            norm.weight.copy_(unit * (variance + norm.eps).sqrt())
    _store(network, {name: _measured(each) for name, each in seen.items()})


def _norms(network: nn.Module) -> dict[str, _BatchNorm]:
    """Returns the batch norms that keep statistics, by their paths."""
    found = {name: module for name, module in network.named_modules() if isinstance(module, _BatchNorm)}
    return {name: norm for name, norm in found.items() if norm.running_mean is not None}


def observed_by_norms(network: nn.Module, images: Tensor) -> dict[str, Seen]:
    """Returns what each norm that runs sees, where all of them normalise by what they see, as in training."""
    norms = _norms(network)
    with _normalising_batches(list(norms.values())):
        return _seen(network, norms, images) if norms else {}


@contextmanager
def _normalising_batches(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Lets norms normalise by the statistics of their batches and keep their own."""
    for norm in norms:
        norm.train()
        norm.track_running_stats = False
    yield
    for norm in norms:
        norm.track_running_stats = True
        norm.eval()


def _seen(network: nn.Module, norms: Mapping[str, _BatchNorm], images: Tensor) -> dict[str, Seen]:
    batches = _batches(images)
    groups = max(_GROUPS // len(batches), 1)
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in norms}
    hooks = [norm.register_forward_pre_hook(_collector(parts[name], groups)) for name, norm in norms.items()]
    _run_unmasked(network, batches)
    for hook in hooks:
        hook.remove()
    found = {}
    for name, collected in parts.items():
        if collected:
            means, squares = (torch.cat(each) for each in zip(*collected, strict=True))
            found[name] = Seen(means, squares, *_stored(norms[name]), len(images), _stands_for(norms[name]))
    return found


def _collector(into: list[tuple[Tensor, Tensor]], groups: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """Returns a hook that appends means and mean squares of so many groups of images, about the stored mean."""

    def see(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        images = args[0].detach().float()
        away = images.flatten(2) if images.ndim > 2 else images[:, :, None]
        away = away - norm.get_buffer("running_mean")[:, None]
        squares = torch.linalg.vector_norm(away, dim=2) ** 2 / away.shape[2]  # many times faster than a variance
        into.append((_grouped(away.mean(2), groups), _grouped(squares, groups)))

    return see


def _grouped(rows: Tensor, groups: int) -> Tensor:
    """Returns the means of so many groups of rows, at most as many as there are."""
    return torch.stack([part.mean(0) for part in rows.tensor_split(min(groups, len(rows)))])


def _stands_for(norm: _BatchNorm) -> float:
    """Returns how many images the stored statistics of a norm are as good as."""
    momentum = norm.momentum or 0.1  # without one, all batches count alike, and nobody knows how many there were
    return (2 / momentum - 1) * _TRAINED_BATCH


def _batches(images: Tensor) -> list[Tensor]:
    """Returns images in batches of about equal size, because the statistics of a small rest are bad ones."""
    return list(images.tensor_split(max(-(-len(images) // BATCH), 1)))


def _logits(network: nn.Module, images: Tensor) -> list[Tensor]:
    """Returns the logits of each exit and of the network's end, where images skip what they may."""
    return all_logits(network, images) if isinstance(network, ExitNetwork) else [network(images).float()]


def _run_unmasked(network: nn.Module, batches: Sequence[Tensor]) -> None:
    """Runs images through the network, where masks decide but hidden features stay where training leaves them."""
    for mask in masks_of(network):
        mask.training = True
    with torch.no_grad():
        for batch in batches:
            _logits(network, batch)
    for mask in masks_of(network):
        mask.training = False
