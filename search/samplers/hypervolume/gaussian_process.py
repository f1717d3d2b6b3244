"""A Gaussian process whose form is chosen by its error on what it was not fitted to."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from scipy.linalg import lapack
from scipy.stats import spearmanr

from search.samplers.hypervolume.encoding import Array

FORMS = ("additive", "pairwise", "local")
"""Sums over columns; with products of two of them; with bumps around what was measured."""
_NOISES = (1e-3, 1e-2, 0.05, 0.3, 1.5)
"""Of a typical measurement, against how much the function varies."""
_RANDOM = 64
_EXTRA = 0.3
"""How much of the function what is not additive makes up, where there is any."""
_COMMON = 0.9
"""The share of what looks like noise that rows next to each other may have in common."""
_NEXT = 0.1
"""How far that reaches, as a share of the median squared distance."""
_CLEARLY = 0.93
"""Neighbours have something in common where held-out errors fall below this share; a little less may be chance."""


@dataclass(frozen=True)
class HeldOut:
    """How well each measurement is told from all others.

    Args:
        form: of the surrogate.
        count: measurements.
        r2: share of the variance that is told; 1 is perfect, 0 no better than the mean.
        spearman: correlation of ranks.
        mape: mean error as a share of the value.
    """

    form: str
    count: int
    r2: float
    spearman: float
    mape: float


@dataclass(frozen=True)
class _Kernel:
    """Covariances from inner products of columns.

    Args:
        form: of the function.
        scale: a typical row's inner product with itself.
        reach: squared distance over which bumps fall off.
        common: variance of what only rows next to each other have in common: a network with one channel less mostly
            fails on the same images. Measured again next to each other, versions are then not hoped to do better.
    """

    form: str
    scale: float
    reach: float
    common: float = 0.0

    def __call__(self, inner: Array, left: Array, right: Array) -> Array:
        """Returns covariances `(n, m)` from inner products, and those of the rows with themselves."""
        found = inner / self.scale
        if self.form == "pairwise":
            found = found + _EXTRA * found**2
        if self.form == "local" or self.common:
            distance = np.maximum(left[:, None] + right[None, :] - 2 * inner, 0.0)
            if self.form == "local":
                found = found + _EXTRA * np.exp(-distance / self.reach)
            if self.common:
                found = found + self.common * np.exp(-distance / (_NEXT * self.reach))
        return found + 1.0  # a constant, as uncertain as the rest

    def draw(self, width: int, rng: np.random.Generator) -> Callable[[Array], Array]:
        """Returns a function of columns `(n, width)` that has these covariances, by random features.

        Source: Rahimi and Recht, Random Features for Large-Scale Kernel Machines, 2007.
        """
        slopes, constant = rng.standard_normal(width) / np.sqrt(self.scale), rng.standard_normal()
        left, right = rng.standard_normal((2, width, _RANDOM))
        heights = rng.standard_normal(_RANDOM) * np.sqrt(_EXTRA / _RANDOM)
        bumps = _Waves.of(width, self.reach, _EXTRA if self.form == "local" else 0.0, rng)
        ripples = _Waves.of(width, _NEXT * self.reach, self.common, rng)

        def drawn(columns: Array) -> Array:
            found = columns @ slopes + constant + bumps(columns) + ripples(columns)
            if self.form == "pairwise":
                found = found + ((columns @ left) * (columns @ right) / self.scale) @ heights
            return np.asarray(found)

        return drawn


@dataclass(frozen=True)
class _Waves:
    """A function of columns whose covariance falls off with the squared distance."""

    slopes: Array
    phases: Array
    heights: Array

    @classmethod
    def of(cls, width: int, reach: float, variance: float, rng: np.random.Generator) -> "_Waves":
        """Returns one at random: `reach` is the squared distance over which it falls to a third."""
        slopes = rng.standard_normal((width, _RANDOM)) * np.sqrt(2 / reach)
        heights = rng.standard_normal(_RANDOM) * np.sqrt(2 * variance / _RANDOM)
        return cls(slopes, rng.uniform(0, 2 * np.pi, _RANDOM), heights)

    def __call__(self, columns: Array) -> Array:
        return np.asarray(np.cos(columns @ self.slopes + self.phases) @ self.heights)


@dataclass(frozen=True)
class Surrogate:
    """A fitted Gaussian process.

    Args:
        kernel: its covariance.
        columns: of what it was fitted to, `(n, k)`.
        lengths: their inner products with themselves.
        weights: of each measurement in a prediction's mean.
        inverse: of the covariance of the measurements.
        mean: of them, weighted.
        scale: of them.
        spread: what the process's own standard deviation has to be multiplied by, from held-out errors.
        predicted: each measurement told from all others, `(n,)`.
        target: the measurements without mean and scale.
        noise: variances of their errors, on that scale.
        error: standard deviation of a measurement's own error, as a share of the doubts that `fit` was given.
    """

    kernel: _Kernel
    columns: Array
    lengths: Array
    weights: Array
    inverse: Array
    mean: float
    scale: float
    spread: float
    predicted: Array
    target: Array
    noise: Array
    error: float

    def means(self, columns: Array) -> Array:
        """Returns what is expected of rows with these columns, `(m,)`."""
        return self.mean + self.scale * (self._covariance(columns) @ self.weights)

    def means_and_deviations(self, columns: Array) -> tuple[Array, Array]:
        """Returns what is expected, and its standard deviation, `(m,)` each."""
        across = self._covariance(columns)
        lengths = np.einsum("ij,ij->i", columns, columns)
        own = np.array([self.kernel(np.array([[each]]), np.array([each]), np.array([each]))[0, 0] for each in lengths])
        variance = np.maximum(own - np.einsum("ij,jk,ik->i", across, self.inverse, across, optimize=True), 1e-9)
        return self.mean + self.scale * (across @ self.weights), self.spread * self.scale * np.sqrt(variance)

    def draw(self, rng: np.random.Generator) -> Callable[[Array], Array]:
        """Returns one of the functions of columns that agree with what was measured.

        Source: Wilson et al., Efficiently Sampling Functions from Gaussian Process Posteriors, 2020.
        """
        prior = self.kernel.draw(self.columns.shape[1], rng)
        errors = np.sqrt(self.noise) * rng.standard_normal(len(self.noise))
        update = self.inverse @ (-prior(self.columns) - errors)

        def drawn(columns: Array) -> Array:
            across = self._covariance(columns)
            off = prior(columns) + across @ update
            return self.mean + self.scale * (across @ self.weights + self.spread * off)

        return drawn

    def _covariance(self, columns: Array) -> Array:
        lengths = np.einsum("ij,ij->i", columns, columns)
        return self.kernel(columns @ self.columns.T, lengths, self.lengths)


@dataclass(frozen=True)
class _Attempt:
    """One kernel and noise, and how they tell measurements that were left out."""

    error: float
    kernel: _Kernel
    noise: float
    variances: Array
    inverse: Array
    errors: Array


def fit(columns: Array, values: Array, doubts: Array) -> Surrogate:
    """Returns the form and noise with the least error on measurements that were left out, one at a time.

    Leaving one out needs no new fit: Rasmussen and Williams, Gaussian Processes for Machine Learning, 5.4.2.

    Args:
        columns: of what was measured, `(n, k)`, n at least 2.
        values: that were measured, `(n,)`.
        doubts: standard deviations of them in any unit: errors count in multiples of them.
    """
    usual = np.exp(np.mean(np.log(doubts)))
    relative = doubts / usual
    weights = 1 / relative**2
    mean = float(np.average(values, weights=weights))
    scale = float(np.sqrt(np.average((values - mean) ** 2, weights=weights))) or 1.0
    target = (values - mean) / scale
    inner = columns @ columns.T
    lengths = np.diag(inner).copy()
    distances = lengths[:, None] + lengths[None, :] - 2 * inner
    reach = float(np.median(distances[np.triu_indices(len(values), 1)])) or 1.0
    own = np.minimum(relative, 30.0) ** 2

    def attempt(kernel: _Kernel, covariance: Array, noise: float, common: float) -> _Attempt:
        variances = noise * (own - common * np.minimum(own, 1.0)) + 1e-8
        inverse = _inverse(covariance + np.diag(variances))
        errors = (inverse @ target) / np.diag(inverse)
        error = float(np.mean((errors / relative) ** 2))
        return _Attempt(error, kernel, noise * (1 - common), variances, inverse, errors)

    attempts = []
    for kernel in (_Kernel(form, float(lengths.mean()) or 1.0, reach) for form in FORMS):
        covariance = kernel(inner, lengths, lengths)
        attempts += [attempt(kernel, covariance, noise, 0.0) for noise in _NOISES]
    best = min(attempts, key=lambda each: each.error)
    for noise in _NOISES:
        kernel = replace(best.kernel, common=_COMMON * noise)
        attempts.append(attempt(kernel, kernel(inner, lengths, lengths), noise, _COMMON))
    closest = min(attempts, key=lambda each: each.error)
    best = closest if closest.error < _CLEARLY * best.error else best
    kernel = best.kernel
    inverse = best.inverse
    errors = best.errors
    expected = 1 / np.diag(inverse)
    spread = float(np.sqrt(np.median(errors**2 / expected) / 0.455))  # the median of a squared normal number
    spread = min(max(spread, 0.1), 10.0)
    return Surrogate(
        kernel,
        columns,
        lengths,
        inverse @ target,
        inverse,
        mean,
        scale,
        spread,
        mean + scale * (target - errors),
        target,
        best.variances,
        float(spread * scale * np.sqrt(best.noise) / usual),
    )


def held_out(form: str, predicted: Array, measured: Array) -> HeldOut:
    """Returns the errors of predictions, in the unit that was measured."""
    varying = float(((measured - measured.mean()) ** 2).sum())
    error = float(((predicted - measured) ** 2).sum())
    ranks = float(spearmanr(predicted, measured).statistic) if np.ptp(predicted) > 0 and varying > 0 else 0.0
    share = np.abs(predicted - measured) / np.maximum(np.abs(measured), 1e-12)
    return HeldOut(form, len(measured), 1 - error / varying if varying > 0 else 0.0, ranks, float(share.mean()))


def _inverse(matrix: Array) -> Array:
    """Returns the inverse of a symmetric positive definite matrix."""
    lower, failed = lapack.dpotrf(matrix, lower=1)
    if failed:
        return np.asarray(np.linalg.pinv(matrix, hermitian=True))
    half, _ = lapack.dpotri(lower, lower=1)
    return np.asarray(np.tril(half) + np.tril(half, -1).T)
