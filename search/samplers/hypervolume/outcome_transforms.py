"""Transforms of costs under which a Gaussian process fits them: what layers add becomes a sum."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from search.samplers.hypervolume.encoding import Array
from search.samplers.hypervolume.prior import CostTarget


@dataclass(frozen=True)
class OutcomeTransform:
    """An increasing function of a cost.

    Args:
        forward: from costs, less being better, to transformed ones, in any shape.
        inverse: back to costs.
        noise_std: how far off a measurement may be, from its transformed value, in any unit.
    """

    forward: Callable[[Array], Array]
    inverse: Callable[[Array], Array]
    noise_std: Callable[[Array], Array]

    def forward_or_keep(self, costs: Array) -> Array:
        """Returns transformed costs; what is infinite or NaN stays so."""
        is_usable = np.isfinite(costs)
        return np.asarray(np.where(is_usable, self.forward(np.where(is_usable, costs, 1.0)), costs))


def damage_transform(target: CostTarget) -> OutcomeTransform:
    """Returns `-log` of the share of accuracy above chance that is left: damages of layers multiply what is left."""
    span = target.dense - target.chance

    def forward(costs: Array) -> Array:
        return np.asarray(-np.log(np.maximum((-costs - target.chance) / span, 0.02)))

    def inverse(damage: Array) -> Array:
        return np.asarray(-(target.chance + span * np.exp(-damage)))

    return OutcomeTransform(forward, inverse, lambda damage: 0.03 + np.maximum(damage, 0.0))


def relative_transform() -> OutcomeTransform:
    """Returns costs as they are, measured to within a share of them."""
    return OutcomeTransform(lambda costs: costs, lambda costs: costs, lambda costs: np.maximum(np.abs(costs), 1e-12))


def log_transform() -> OutcomeTransform:
    """Returns logarithms of costs."""
    return OutcomeTransform(lambda costs: np.log(np.maximum(costs, 1e-12)), np.exp, np.ones_like)


def identity_transform(costs: Array) -> OutcomeTransform:
    """Returns costs as they are; the fit follows the better ones among `costs` `(n,)` more closely."""
    low, median = np.quantile(costs, (0.05, 0.5)) if len(costs) else (0.0, 1.0)
    span = max(float(median - low), 1e-12)
    return OutcomeTransform(
        lambda costs: costs, lambda costs: costs, lambda costs: 1 + 2 * np.maximum((costs - median) / span, 0.0)
    )
