"""A Gaussian process whose kernel and noise are chosen by leave-one-out errors.

Notation of Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006: features `X` `(n, k)`, standardized
measurements `y` `(n,)` with noise variances `D`, kernel matrix `K`. The posterior mean at features `Z` is
`k(Z, X) (K + D)⁻¹ y`, its covariance `k(Z, Z) - k(Z, X) (K + D)⁻¹ k(X, Z)` (equations 2.25 and 2.26).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from scipy.linalg import lapack
from scipy.stats import spearmanr

from search.samplers.hypervolume.encoding import Array

FORMS = ("additive", "pairwise", "local")
"""Linear in features; with products of two of them; with radial basis functions."""
_NOISE_VARIANCES = (1e-3, 1e-2, 0.05, 0.3, 1.5)
"""Of a typical measurement, against the variance of the function."""
_RANDOM_FEATURES = 64
_NONLINEAR_VARIANCE = 0.3
"""Of what is not linear in features, where there is any, against what is."""
_LOCAL_NOISE_SHARE = 0.9
"""The share of what looks like noise that neighbouring rows may have in common."""
_LOCAL_LENGTHSCALE = 0.1
"""The squared length scale of that, as a share of the median squared distance."""
_CLEARLY_BETTER = 0.93
"""Neighbours have something in common where leave-one-out errors fall below this share; a little less may be chance."""
_MEDIAN_OF_SQUARED_NORMAL = 0.455
_LEAST_VARIANCE = 1e-9


@dataclass(frozen=True)
class HeldOutErrors:
    """How well each measurement is predicted from all others.

    Args:
        form: of the kernel.
        count: measurements.
        r2: coefficient of determination; 1 is perfect, 0 no better than the mean.
        spearman: correlation of ranks.
        mape: mean absolute error as a share of the value.
    """

    form: str
    count: int
    r2: float
    spearman: float
    mape: float


@dataclass(frozen=True)
class Kernel:
    """A covariance function `k(x, z)` of features, computed from inner products `x·z`.

    With `s` the scale, `d² = |x - z|²`, `ℓ²` the squared length scale and `v` the local variance:
    `k = 1 + x·z/s + [pairwise] 0.3 (x·z/s)² + [local] 0.3 exp(-d²/ℓ²) + v exp(-d²/(0.1 ℓ²))`.

    Args:
        form: one of `FORMS`.
        scale: a typical row's squared norm.
        squared_lengthscale: squared distance over which radial basis functions fall off.
        local_variance: of what only neighbouring rows have in common: a network with one channel less mostly fails on
            the same images. Measured again next to each other, versions are then not hoped to do better.
    """

    form: str
    scale: float
    squared_lengthscale: float
    local_variance: float = 0.0

    def __call__(self, inner: Array, left: Array, right: Array) -> Array:
        """Returns covariances, `(n, m)`.

        Args:
            inner: inner products of two sets of features, `(n, m)`.
            left: squared norms of the first set, `(n,)`.
            right: squared norms of the second set, `(m,)`.
        """
        covariance = inner / self.scale
        if self.form == "pairwise":
            covariance = covariance + _NONLINEAR_VARIANCE * covariance**2
        if self.form == "local" or self.local_variance:
            distance = np.maximum(left[:, None] + right[None, :] - 2 * inner, 0.0)
            if self.form == "local":
                covariance = covariance + _NONLINEAR_VARIANCE * np.exp(-distance / self.squared_lengthscale)
            if self.local_variance:
                short = _LOCAL_LENGTHSCALE * self.squared_lengthscale
                covariance = covariance + self.local_variance * np.exp(-distance / short)
        return covariance + 1.0  # a constant, as uncertain as the rest

    def draw(self, width: int, rng: np.random.Generator) -> Callable[[Array], Array]:
        """Returns a function of features `(n, width)` drawn from the prior, `(n,)`, by random features.

        Source: Rahimi and Recht, Random Features for Large-Scale Kernel Machines, 2007.
        """
        slopes = rng.standard_normal(width) / np.sqrt(self.scale)
        constant = rng.standard_normal()
        left, right = rng.standard_normal((2, width, _RANDOM_FEATURES))
        heights = rng.standard_normal(_RANDOM_FEATURES) * np.sqrt(_NONLINEAR_VARIANCE / _RANDOM_FEATURES)
        variance = _NONLINEAR_VARIANCE if self.form == "local" else 0.0
        short = _LOCAL_LENGTHSCALE * self.squared_lengthscale
        rbf_features = RandomFourierFeatures.draw(width, self.squared_lengthscale, variance, rng)
        short_rbf_features = RandomFourierFeatures.draw(width, short, self.local_variance, rng)

        def sample(features: Array) -> Array:
            values = features @ slopes + constant + rbf_features(features) + short_rbf_features(features)
            if self.form == "pairwise":
                values = values + ((features @ left) * (features @ right) / self.scale) @ heights
            return np.asarray(values)

        return sample


@dataclass(frozen=True)
class RandomFourierFeatures:
    """A function drawn from a Gaussian process with a radial basis kernel, as a sum of cosines.

    Source: Rahimi and Recht, Random Features for Large-Scale Kernel Machines, 2007.

    Args:
        frequencies: `(k, cosines)`.
        phases: `(cosines,)`.
        heights: `(cosines,)`.
    """

    frequencies: Array
    phases: Array
    heights: Array

    @classmethod
    def draw(
        cls, width: int, squared_lengthscale: float, variance: float, rng: np.random.Generator
    ) -> "RandomFourierFeatures":
        """Returns one with covariance `variance * exp(-d² / squared_lengthscale)`."""
        frequencies = rng.standard_normal((width, _RANDOM_FEATURES)) * np.sqrt(2 / squared_lengthscale)
        heights = rng.standard_normal(_RANDOM_FEATURES) * np.sqrt(2 * variance / _RANDOM_FEATURES)
        return cls(frequencies, rng.uniform(0, 2 * np.pi, _RANDOM_FEATURES), heights)

    def __call__(self, features: Array) -> Array:
        """Returns its values for features `(n, k)`, `(n,)`."""
        return np.asarray(np.cos(features @ self.frequencies + self.phases) @ self.heights)


@dataclass(frozen=True)
class GaussianProcess:
    """A Gaussian process that was fitted to measurements.

    Args:
        kernel: its covariance function.
        features: `X`, of what it was fitted to, `(n, k)`.
        squared_norms: of the rows of `X`, `(n,)`.
        weights: `(K + D)⁻¹ y`, `(n,)`.
        inverse_covariance: `(K + D)⁻¹`, `(n, n)`.
        mean: of the measurements, weighted by their precision.
        scale: their standard deviation.
        std_factor: what posterior standard deviations are multiplied by, so that leave-one-out errors agree with them.
        left_out_means: each measurement predicted from all others, `(n,)`.
        targets: `y`, the measurements without mean and scale, `(n,)`.
        noise_variances: the diagonal of `D`, `(n,)`.
        noise_factor: the standard deviation of a measurement's own noise, against the `noise_std` of `fit_gp`.
    """

    kernel: Kernel
    features: Array
    squared_norms: Array
    weights: Array
    inverse_covariance: Array
    mean: float
    scale: float
    std_factor: float
    left_out_means: Array
    targets: Array
    noise_variances: Array
    noise_factor: float

    def means(self, features: Array) -> Array:
        """Returns posterior means at features `(m, k)`, `(m,)`."""
        return self.mean + self.scale * (self._covariance(features) @ self.weights)

    def means_and_stds(self, features: Array) -> tuple[Array, Array]:
        """Returns posterior means and standard deviations, without noise, at features `(m, k)`, `(m,)` each."""
        across = self._covariance(features)
        norms = np.einsum("ij,ij->i", features, features)
        own = np.array([self.kernel(np.array([[norm]]), np.array([norm]), np.array([norm]))[0, 0] for norm in norms])
        explained = np.einsum("ij,jk,ik->i", across, self.inverse_covariance, across, optimize=True)
        stds = np.sqrt(np.maximum(own - explained, _LEAST_VARIANCE))
        return self.mean + self.scale * (across @ self.weights), self.std_factor * self.scale * stds

    def draw(self, rng: np.random.Generator) -> Callable[[Array], Array]:
        """Returns a function of features `(m, k)` drawn from the posterior, `(m,)`, by pathwise conditioning.

        Matheron's rule turns a function `f` of the prior and noise `ε ~ N(0, D)` into one of the posterior:
        `f(Z) + k(Z, X) (K + D)⁻¹ (y - f(X) - ε)`. The part in `y` is the posterior mean; here what is left, the
        deviation from it, is multiplied by `std_factor`.

        Source: Wilson et al., Efficiently Sampling Functions from Gaussian Process Posteriors, 2020.
        """
        prior = self.kernel.draw(self.features.shape[1], rng)
        noise = np.sqrt(self.noise_variances) * rng.standard_normal(len(self.noise_variances))
        update_weights = self.inverse_covariance @ (-prior(self.features) - noise)

        def sample(features: Array) -> Array:
            across = self._covariance(features)
            deviation = prior(features) + across @ update_weights
            return self.mean + self.scale * (across @ self.weights + self.std_factor * deviation)

        return sample

    def _covariance(self, features: Array) -> Array:
        """Returns `k(Z, X)`, `(m, n)`."""
        norms = np.einsum("ij,ij->i", features, features)
        return self.kernel(features @ self.features.T, norms, self.squared_norms)


@dataclass(frozen=True)
class _Attempt:
    """One kernel and noise, and how they predict measurements that were left out.

    Args:
        loss: mean squared leave-one-out error, in multiples of `noise_std`.
        kernel: the covariance function.
        noise: variance of a typical measurement's own noise.
        noise_variances: of each measurement, `(n,)`.
        inverse_covariance: `(n, n)`.
        errors: leave-one-out errors, `(n,)`.
    """

    loss: float
    kernel: Kernel
    noise: float
    noise_variances: Array
    inverse_covariance: Array
    errors: Array


def fit_gp(features: Array, values: Array, noise_std: Array) -> GaussianProcess:
    """Returns the Gaussian process of the kernel and noise with the least leave-one-out error.

    Leaving one out needs no new fit: the error is `[(K + D)⁻¹ y]ᵢ / [(K + D)⁻¹]ᵢᵢ` (Rasmussen and Williams, Gaussian
    Processes for Machine Learning, 2006, equation 5.12).

    Args:
        features: of what was measured, `(n, k)`, n at least 2.
        values: that were measured, `(n,)`, no NaN.
        noise_std: standard deviations of their noise in any unit, `(n,)`: errors count in multiples of them.
    """
    typical = np.exp(np.mean(np.log(noise_std)))
    relative = noise_std / typical
    precisions = 1 / relative**2
    mean = float(np.average(values, weights=precisions))
    scale = float(np.sqrt(np.average((values - mean) ** 2, weights=precisions))) or 1.0
    targets = (values - mean) / scale
    inner = features @ features.T
    squared_norms = np.diag(inner).copy()
    best = _best_attempt(inner, squared_norms, targets, relative)
    std_factor = _std_factor(best)
    return GaussianProcess(
        kernel=best.kernel,
        features=features,
        squared_norms=squared_norms,
        weights=best.inverse_covariance @ targets,
        inverse_covariance=best.inverse_covariance,
        mean=mean,
        scale=scale,
        std_factor=std_factor,
        left_out_means=mean + scale * (targets - best.errors),
        targets=targets,
        noise_variances=best.noise_variances,
        noise_factor=float(std_factor * scale * np.sqrt(best.noise) / typical),
    )


def _best_attempt(inner: Array, squared_norms: Array, targets: Array, relative: Array) -> _Attempt:
    distances = squared_norms[:, None] + squared_norms[None, :] - 2 * inner
    squared_lengthscale = float(np.median(distances[np.triu_indices(len(targets), 1)])) or 1.0
    unit_variances = np.minimum(relative, 30.0) ** 2

    def attempt(kernel: Kernel, covariance: Array, noise: float, local_share: float) -> _Attempt:
        noise_variances = noise * (unit_variances - local_share * np.minimum(unit_variances, 1.0)) + 1e-8
        inverse = _inverse(covariance + np.diag(noise_variances))
        errors = (inverse @ targets) / np.diag(inverse)
        loss = float(np.mean((errors / relative) ** 2))
        return _Attempt(loss, kernel, noise * (1 - local_share), noise_variances, inverse, errors)

    attempts = []
    for form in FORMS:
        kernel = Kernel(form, float(squared_norms.mean()) or 1.0, squared_lengthscale)
        covariance = kernel(inner, squared_norms, squared_norms)
        attempts += [attempt(kernel, covariance, noise, 0.0) for noise in _NOISE_VARIANCES]
    best = min(attempts, key=lambda tested: tested.loss)
    for noise in _NOISE_VARIANCES:
        kernel = replace(best.kernel, local_variance=_LOCAL_NOISE_SHARE * noise)
        covariance = kernel(inner, squared_norms, squared_norms)
        attempts.append(attempt(kernel, covariance, noise, _LOCAL_NOISE_SHARE))
    best_of_all = min(attempts, key=lambda tested: tested.loss)
    return best_of_all if best_of_all.loss < _CLEARLY_BETTER * best.loss else best


def _std_factor(attempt: _Attempt) -> float:
    """Returns what brings leave-one-out variances, `1 / [(K + D)⁻¹]ᵢᵢ`, in line with the errors, 0.1 to 10."""
    expected = 1 / np.diag(attempt.inverse_covariance)
    factor = float(np.sqrt(np.median(attempt.errors**2 / expected) / _MEDIAN_OF_SQUARED_NORMAL))
    return min(max(factor, 0.1), 10.0)


def held_out_errors(form: str, predicted: Array, measured: Array) -> HeldOutErrors:
    """Returns the errors of predictions `(n,)`, in the unit that was measured.

    Args:
        form: of the kernel, or what else the predictions are from.
        predicted: without knowledge of the measurement, `(n,)`, no NaN.
        measured: `(n,)`, no NaN.
    """
    total = float(((measured - measured.mean()) ** 2).sum())
    residual = float(((predicted - measured) ** 2).sum())
    ranks = float(spearmanr(predicted, measured).statistic) if np.ptp(predicted) > 0 and total > 0 else 0.0
    shares = np.abs(predicted - measured) / np.maximum(np.abs(measured), 1e-12)
    r2 = 1 - residual / total if total > 0 else 0.0
    return HeldOutErrors(form, len(measured), r2, ranks, float(shares.mean()))


def _inverse(matrix: Array) -> Array:
    """Returns the inverse of a symmetric positive definite matrix."""
    lower, failed = lapack.dpotrf(matrix, lower=1)
    if failed:
        return np.asarray(np.linalg.pinv(matrix, hermitian=True))
    half, _ = lapack.dpotri(lower, lower=1)
    return np.asarray(np.tril(half) + np.tril(half, -1).T)
