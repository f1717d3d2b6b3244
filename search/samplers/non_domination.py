"""Non-domination: the one definition that fronts and samplers share."""

import numpy as np
from numpy.typing import NDArray


def is_non_dominated(costs: NDArray[np.float64], deduplicate: bool = False) -> NDArray[np.bool_]:
    """Returns which points no other one dominates, `(n,)`: none is at least as good in every cost and better in one.

    Source: the contract of BoTorch's function of this name, but costs are minimized.

    Args:
        costs: less being better, `(n, m)`. A point with a NaN counts as dominated, and dominates none.
        deduplicate: whether, of equal points, only the first one counts as non-dominated.
    """
    mask = np.zeros(len(costs), dtype=np.bool_)
    for index, cost in enumerate(costs):
        if np.isnan(cost).any():
            continue
        is_dominated = ((costs <= cost).all(axis=1) & (costs < cost).any(axis=1)).any()
        is_repeated = deduplicate and (costs[:index] == cost).all(axis=1).any()
        mask[index] = not is_dominated and not is_repeated
    return mask
