"""How the tensors of one version of a network differ from those of another: figures, gathered batch by batch.

Signal-to-noise ratios are in dB: the reference's sum of squares over that of the difference. 20 dB is a tenth in
amplitude, and each bit of a grid is worth 6 dB.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

Floats = NDArray[np.float64]

MOST_CHANNELS = 1024
"""Wider tensors are not searched for a permutation: products of all pairs of their channels take too much memory."""
_SAMPLED = 4096
"""So many values of a channel and batch are enough to tell which channel it is."""
_SEARCHED_BELOW_DB = 20.0
"""Where less is wrong, a permutation of channels is not what is wrong."""
_SAME_SHARE = 0.01
"""A regular shuffle that explains as much as the best permutation, but for this share, is taken to be it."""


@dataclass(frozen=True)
class Permutation:
    """An order of a version's channels that brings it closest to the reference.

    Args:
        order: which of the version's channels is each of the reference's.
        explained: the share of the squared error that is gone in this order.
        groups: of the channel shuffle that the order is; None where it is another.
    """

    order: tuple[int, ...]
    explained: float
    groups: int | None

    @property
    def is_identity(self) -> bool:
        """Whether no channel moves."""
        return self.order == tuple(range(len(self.order)))


@dataclass(frozen=True)
class Figures:
    """How one tensor of a version differs from the reference's.

    Args:
        name: of the layer or node.
        input_db: the lowest ratio among the tensors that it is computed from; infinite where those are exact.
        sqnr_db: the ratio of signal to noise; infinite where nothing differs, minus infinity where it is not finite.
        cosine: similarity of the two tensors, from -1 to 1.
        largest: magnitude in the reference.
        not_finite: values of the version that are infinite or not a number.
        not_finite_before: the same of the reference.
        channels: how many there are.
        dead: channels that never vary in the reference, over all images and places.
        died: channels that vary in the reference and never in the version.
        permutation: the order of channels that explains most of the error, where there is much.
    """

    name: str
    input_db: float
    sqnr_db: float
    cosine: float
    largest: float
    not_finite: int
    not_finite_before: int
    channels: int
    dead: int
    died: int
    permutation: Permutation | None

    @property
    def own_db(self) -> float:
        """The ratio that the tensor would have if what it is computed from were exact, noises being independent."""
        added = _noise_share(self.sqnr_db) - _noise_share(self.input_db)
        return decibels(1.0, added) if added > 0 else np.inf

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready copy, in which a ratio that is not finite is null."""
        finite = {name: value if np.isfinite(value) else None for name, value in self._ratios.items()}
        return asdict(self) | finite

    @property
    def _ratios(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in ("input_db", "sqnr_db", "own_db", "largest")}


class TensorComparison:
    """Gathers the figures of one tensor.

    Args:
        axis: of its channels.
    """

    def __init__(self, axis: int) -> None:
        self._axis = axis
        self._signal = self._noise = self._product = self._found_signal = self._largest = 0.0
        self._not_finite = self._not_finite_before = 0
        self._extremes: list[tuple[Floats, Floats]] = []
        self._pairs: _ChannelPairs | None = None

    def add(self, exact: NDArray[np.float32], found: NDArray[np.float32]) -> None:
        """Takes in one batch of the reference's tensor and the version's, of one shape, images first."""
        self._not_finite_before += int(exact.size - np.isfinite(exact).sum())
        self._not_finite += int(found.size - np.isfinite(found).sum())
        self._largest = max(self._largest, float(np.fmax.reduce(np.abs(exact), axis=None, initial=0)))
        ours, theirs = (_by_channel(tensor, self._axis) for tensor in (exact, found))
        self._signal += float(np.vdot(ours, ours))
        self._found_signal += float(np.vdot(theirs, theirs))
        self._product += float(np.vdot(ours, theirs))
        self._noise += float(np.square(ours - theirs).sum())
        self._extremes.append((_lows_and_highs(ours), _lows_and_highs(theirs)))
        if len(ours) <= MOST_CHANNELS:
            self._pairs = self._pairs or _ChannelPairs(len(ours))
            self._pairs.add(ours, theirs)

    @property
    def sqnr_db(self) -> float:
        """The ratio of signal to noise; minus infinity where anything is not finite."""
        if self._not_finite or self._not_finite_before:
            return -np.inf
        return decibels(self._signal, self._noise)

    @property
    def _cosine(self) -> float:
        if self._not_finite or self._not_finite_before:
            return 0.0
        lengths = np.sqrt(self._signal) * np.sqrt(self._found_signal)
        return min(float(self._product / lengths), 1.0) if lengths else float(self._signal == self._found_signal)

    def figures(self, name: str, input_db: float) -> Figures:
        """Returns what was gathered, under a name and with the lowest ratio at what it is computed from."""
        constant, found_constant = (_constant([pair[side] for pair in self._extremes]) for side in (0, 1))
        searched = self._pairs is not None and self.sqnr_db < _SEARCHED_BELOW_DB and not self._not_finite
        return Figures(
            name=name,
            input_db=input_db,
            sqnr_db=self.sqnr_db,
            cosine=self._cosine,
            largest=self._largest,
            not_finite=self._not_finite,
            not_finite_before=self._not_finite_before,
            channels=len(constant),
            dead=int(constant.sum()),
            died=int((found_constant & ~constant).sum()),
            permutation=self._pairs.permutation() if self._pairs is not None and searched else None,
        )


class _ChannelPairs:
    """Products of each of the reference's channels with each of the version's, over a sample of their values."""

    def __init__(self, channels: int) -> None:
        self._products = np.zeros((channels, channels), dtype=np.float32)
        self._squares = 0.0

    def add(self, exact: Floats, found: Floats) -> None:
        step = max(exact.shape[1] // _SAMPLED, 1) | 1  # odd, so that it does not stay in one column of the maps
        ours, theirs = exact[:, ::step], found[:, ::step]
        self._products += (ours @ theirs.T).astype(np.float32)
        self._squares += float(np.vdot(ours, ours) + np.vdot(theirs, theirs))

    def permutation(self) -> Permutation | None:
        """Returns the order of least squared error; None where there is no error."""
        return closest_order(self._products, self._squares)


def closest_order(products: NDArray[np.floating[Any]], squares: float) -> Permutation | None:
    """Returns the order of a version's channels that leaves the least squared error; None where there is none.

    The squared distance of two sets of channels is the sum of their squares less twice the products of those that are
    paired, so the best pairing is a linear assignment.

    Args:
        products: of channel `i` of the reference with channel `j` of the version, `(channels, channels)`.
        squares: the sum of the squares of all of them.
    """
    gathered = products.astype(np.float64)
    before = squares - 2 * float(np.trace(gathered))
    if not before > 0:
        return None

    def explained(order: NDArray[np.int64]) -> float:
        return 1 - (squares - 2 * float(gathered[np.arange(len(order)), order].sum())) / before

    order = linear_sum_assignment(gathered, maximize=True)[1]
    share = explained(order)
    shuffles = {groups: shuffle_order(len(order), groups) for groups in _divisors(len(order))}
    regular = [groups for groups, shuffle in shuffles.items() if explained(shuffle) >= share - _SAME_SHARE]
    return Permutation(tuple(map(int, order)), share, regular[0] if regular else None)


def shuffle_order(channels: int, groups: int) -> NDArray[np.int64]:
    """Returns where each channel behind a channel shuffle comes from.

    Source: Zhang et al., ShuffleNet, 2018: reshape to `(groups, channels / groups)`, transpose, flatten.
    """
    return np.arange(channels).reshape(groups, -1).T.ravel()


def _divisors(number: int) -> Sequence[int]:
    return [divisor for divisor in range(2, number // 2 + 1) if number % divisor == 0]


def decibels(signal: float, noise: float) -> float:
    """Returns the ratio of two sums of squares in dB: infinite without noise, minus infinity without signal."""
    if not noise:
        return np.inf
    return float(10 * np.log10(signal / noise)) if signal and np.isfinite(noise) else -np.inf


def _noise_share(ratio_db: float) -> float:
    return float(10 ** (-ratio_db / 10))


def _by_channel(tensor: NDArray[np.float32], axis: int) -> Floats:
    """Returns a tensor as `(channels, values)`, with 0 for what is not finite."""
    finite = np.where(np.isfinite(tensor), tensor, 0).astype(np.float64)
    moved = np.moveaxis(finite, axis, 0)
    return np.ascontiguousarray(moved.reshape(len(moved), -1))


def _lows_and_highs(channels: Floats) -> Floats:
    return np.stack([channels.min(axis=1), channels.max(axis=1)])


def _constant(extremes: Sequence[Floats]) -> NDArray[np.bool_]:
    """Returns which channels never vary, from their lowest and highest values in each batch."""
    gathered = np.stack(extremes)
    never: NDArray[np.bool_] = gathered[:, 0].min(axis=0) == gathered[:, 1].max(axis=0)
    return never
