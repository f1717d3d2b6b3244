"""scikit-learn's 1,797 handwritten digits, shown at 32x32, or as they are."""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from evaluators.data import LabelledImages, Splits

CALIBRATION = 97
VALIDATION = 350
TEST = 350
_SEED = 0


def splits(size: int = 32) -> Splits:
    """Returns 1,000 images to train on, 97 to calibrate, 350 to search with and 350 to test; stratified by class.

    Pixels run from 0 to 1, enlarged from 8x8 with bilinear interpolation: images are `(n, 1, size, size)`.
    """
    digits = load_digits()
    small = torch.from_numpy(digits.images / 16.0).float()[:, None]
    images = F.interpolate(small, size=size, mode="bilinear", align_corners=False).numpy()
    labels = digits.target.astype(np.int64)
    rest = np.arange(len(labels))
    parts = []
    for count in (TEST, VALIDATION, CALIBRATION):
        rest, part = train_test_split(rest, test_size=count, stratify=labels[rest], random_state=_SEED)
        parts.append(part)
    test, validation, calibration = (_take(images, labels, part) for part in parts)
    return Splits(_take(images, labels, rest), calibration, validation, test, classes=10)


def _take(images: NDArray[np.float32], labels: NDArray[np.int64], indices: NDArray[np.int64]) -> LabelledImages:
    return LabelledImages(np.ascontiguousarray(images[indices]), labels[indices])


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Returns images `(n, c, h, w)`, each turned by up to 10 degrees, scaled by 10% and shifted by an eighth."""
    n = len(images)
    angle, scale = _within(0.175, n, generator), 1 + _within(0.1, n, generator)
    shift = torch.stack([_within(0.125, n, generator), _within(0.125, n, generator)], dim=1)
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    rotation = torch.stack([torch.stack([cosine, -sine], 1), torch.stack([sine, cosine], 1)], 1)
    grid = F.affine_grid(torch.cat([rotation, shift[..., None]], 2), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def _within(limit: float, n: int, generator: torch.Generator) -> Tensor:
    return (torch.rand(n, generator=generator) * 2 - 1) * limit
