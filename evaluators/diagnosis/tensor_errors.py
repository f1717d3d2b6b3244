"""Error statistics of a version's tensors against a reference, accumulated batch by batch.

Signal-to-noise ratios are in dB: the reference's sum of squares over that of the difference. At 20 dB the error is a
tenth of the signal's amplitude; each bit of precision adds 6 dB.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

Floats = NDArray[np.float64]

MOST_CHANNELS = 1024
"""Wider tensors are not searched for a permutation, because the products of all pairs of channels need much memory."""
_SAMPLED_VALUES = 4096
"""The number of values of a channel in a batch that are enough to identify the channel."""
_SEARCHED_BELOW_DB = 20.0
"""At higher ratios the error is too small for a permutation of channels."""
_SHUFFLE_TOLERANCE = 0.01
"""A channel shuffle that explains as much of the error as the best permutation, less this share, is taken for it."""


@dataclass(frozen=True)
class Permutation:
    """The order of a version's channels that is closest to the reference.

    Args:
        order: for each channel of the reference, the index of the matching channel of the version.
        explained: the share of the squared error that this order removes.
        groups: number of groups if the order is a channel shuffle; else None.
    """

    order: tuple[int, ...]
    explained: float
    groups: int | None

    @property
    def is_identity(self) -> bool:
        """Whether every channel is in its place."""
        return self.order == tuple(range(len(self.order)))


@dataclass(frozen=True)
class TensorErrors:
    """The error statistics of one tensor.

    Args:
        name: of the layer or node.
        input_db: the lowest signal-to-noise ratio of its inputs; infinite if they are exact.
        sqnr_db: its signal-to-noise ratio; infinite if nothing differs, minus infinity if a value is not finite.
        cosine: cosine similarity of the two tensors, -1 to 1.
        largest: the largest magnitude in the reference.
        not_finite: the number of values of the version that are infinite or not a number.
        not_finite_before: the same for the reference.
        channels: the number of channels.
        dead: the number of channels that are constant in the reference, over all images and positions.
        died: the number of channels that vary in the reference and are constant in the version.
        permutation: the order of channels that explains most of the error; None if the error is small.
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
        """The ratio that the tensor would have with exact inputs, if the noises are independent."""
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
    """Accumulates the error statistics of one tensor.

    Args:
        axis: of its channels.
    """

    def __init__(self, axis: int) -> None:
        self._axis = axis
        self._signal = self._noise = self._product = self._actual_signal = self._largest = 0.0
        self._not_finite = self._not_finite_before = 0
        self._extremes: list[tuple[Floats, Floats]] = []
        self._pairs: _ChannelPairs | None = None

    def add(self, expected: NDArray[np.float32], actual: NDArray[np.float32]) -> None:
        """Adds one batch: the tensor of the reference and that of the version, of the same shape, images first."""
        self._not_finite_before += int(expected.size - np.isfinite(expected).sum())
        self._not_finite += int(actual.size - np.isfinite(actual).sum())
        self._largest = max(self._largest, float(np.fmax.reduce(np.abs(expected), axis=None, initial=0)))
        ours, theirs = (_by_channel(tensor, self._axis) for tensor in (expected, actual))
        self._signal += float(np.vdot(ours, ours))
        self._actual_signal += float(np.vdot(theirs, theirs))
        self._product += float(np.vdot(ours, theirs))
        self._noise += float(np.square(ours - theirs).sum())
        self._extremes.append((_lows_and_highs(ours), _lows_and_highs(theirs)))
        if len(ours) <= MOST_CHANNELS:
            self._pairs = self._pairs or _ChannelPairs(len(ours))
            self._pairs.add(ours, theirs)

    @property
    def sqnr_db(self) -> float:
        """The signal-to-noise ratio; minus infinity if a value is not finite."""
        if self._not_finite or self._not_finite_before:
            return -np.inf
        return decibels(self._signal, self._noise)

    @property
    def _cosine(self) -> float:
        if self._not_finite or self._not_finite_before:
            return 0.0
        norms = np.sqrt(self._signal) * np.sqrt(self._actual_signal)
        return min(float(self._product / norms), 1.0) if norms else float(self._signal == self._actual_signal)

    def errors(self, name: str, input_db: float) -> TensorErrors:
        """Returns the error statistics.

        Args:
            name: of the layer or node.
            input_db: the lowest signal-to-noise ratio of its inputs.
        """
        constant, actual_constant = (_constant([pair[side] for pair in self._extremes]) for side in (0, 1))
        searched = self._pairs is not None and self.sqnr_db < _SEARCHED_BELOW_DB and not self._not_finite
        return TensorErrors(
            name=name,
            input_db=input_db,
            sqnr_db=self.sqnr_db,
            cosine=self._cosine,
            largest=self._largest,
            not_finite=self._not_finite,
            not_finite_before=self._not_finite_before,
            channels=len(constant),
            dead=int(constant.sum()),
            died=int((actual_constant & ~constant).sum()),
            permutation=self._pairs.permutation() if self._pairs is not None and searched else None,
        )


class _ChannelPairs:
    """Inner products of each channel of the reference with each of the version, over a sample of their values."""

    def __init__(self, channels: int) -> None:
        self._products = np.zeros((channels, channels), dtype=np.float32)
        self._squares = 0.0

    def add(self, expected: Floats, actual: Floats) -> None:
        """Adds one batch, each tensor as `(channels, values)`."""
        step = max(expected.shape[1] // _SAMPLED_VALUES, 1) | 1  # odd, so that samples are not all of one column
        ours, theirs = expected[:, ::step], actual[:, ::step]
        self._products += (ours @ theirs.T).astype(np.float32)
        self._squares += float(np.vdot(ours, ours) + np.vdot(theirs, theirs))

    def permutation(self) -> Permutation | None:
        """Returns the order with the least squared error; None if there is no error."""
        return closest_order(self._products, self._squares)


def closest_order(products: NDArray[np.floating[Any]], squares: float) -> Permutation | None:
    """Returns the order of a version's channels with the least squared error; None if there is no error.

    The squared distance of two sets of channels is the sum of their squares less twice the products of the pairs, so
    the best order is a linear assignment.

    Args:
        products: inner products of channel `i` of the reference and channel `j` of the version,
            `(channels, channels)`.
        squares: the sum of the squares of all channels of both.
    """
    exact_products = products.astype(np.float64)
    error = squares - 2 * float(np.trace(exact_products))
    if not error > 0:
        return None

    def explained(order: NDArray[np.int64]) -> float:
        return 1 - (squares - 2 * float(exact_products[np.arange(len(order)), order].sum())) / error

    order = linear_sum_assignment(exact_products, maximize=True)[1]
    share = explained(order)
    shuffles = {groups: shuffle_order(len(order), groups) for groups in _divisors(len(order))}
    matching = [groups for groups, shuffle in shuffles.items() if explained(shuffle) >= share - _SHUFFLE_TOLERANCE]
    return Permutation(tuple(map(int, order)), share, matching[0] if matching else None)


def shuffle_order(channels: int, groups: int) -> NDArray[np.int64]:
    """Returns for each channel after a channel shuffle its index before it.

    Source: Zhang et al., ShuffleNet, 2018: reshape to `(groups, channels / groups)`, transpose, flatten.
    """
    return np.arange(channels).reshape(groups, -1).T.ravel()


def _divisors(number: int) -> Sequence[int]:
    return [divisor for divisor in range(2, number // 2 + 1) if number % divisor == 0]


def decibels(signal: float, noise: float) -> float:
    """Returns the ratio of two sums of squares in dB: infinite if the noise is 0, minus infinity if the signal is."""
    if not noise:
        return np.inf
    return float(10 * np.log10(signal / noise)) if signal and np.isfinite(noise) else -np.inf


def _noise_share(ratio_db: float) -> float:
    return float(10 ** (-ratio_db / 10))


def _by_channel(tensor: NDArray[np.float32], axis: int) -> Floats:
    """Returns a tensor as `(channels, values)`, with 0 in place of values that are not finite."""
    finite = np.where(np.isfinite(tensor), tensor, 0).astype(np.float64)
    moved = np.moveaxis(finite, axis, 0)
    return np.ascontiguousarray(moved.reshape(len(moved), -1))


def _lows_and_highs(channels: Floats) -> Floats:
    return np.stack([channels.min(axis=1), channels.max(axis=1)])


def _constant(extremes: Sequence[Floats]) -> NDArray[np.bool_]:
    """Returns which channels are constant, `(channels,)`, from their lowest and highest values in each batch."""
    of_batches = np.stack(extremes)
    is_constant: NDArray[np.bool_] = of_batches[:, 0].min(axis=0) == of_batches[:, 1].max(axis=0)
    return is_constant
