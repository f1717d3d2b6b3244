"""Resizes images before a network whose input is smaller; numpy only, copied into bundles."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def resized(images: Floats, size: int | None) -> Floats:
    """Returns square images at another size, `(n, c, size, size)`: bilinear, with antialiasing as in torch and Pillow.

    Args:
        images: `(n, c, h, h)`.
        size: height and width; None for their own.
    """
    if size is None or images.shape[-2:] == (size, size):
        return images
    rows, columns = (_weights(int(side), size) for side in images.shape[-2:])
    return np.ascontiguousarray(rows @ images @ columns.T, dtype=np.float32)


@lru_cache(maxsize=16)
def _weights(before: int, after: int) -> Floats:
    """Returns the share of each of `before` pixels in each of `after` pixels, `(after, before)`.

    Each is a triangle as wide as two pixels of the coarser grid, as in `torch.nn.functional.interpolate` with
    `antialias=True`.
    """
    scale = before / after
    support = max(scale, 1.0)
    centres = (np.arange(after) + 0.5) * scale
    distance = np.abs(np.arange(before) + 0.5 - centres[:, None]) / support
    weights = np.maximum(1 - distance, 0)
    shares: Floats = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    return shares
