"""The images. Put your own here, or name a folder in study.toml and delete this file."""

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from evaluators.data import LabelledImages, Splits


def splits() -> Splits:
    """Returns scikit-learn's 1,797 handwritten digits in four sets that share no image.

    Images are float32 `(n, channels, height, width)`, as the network wants them; labels are int64 `(n,)`.
    """
    digits = load_digits()
    images = np.kron((digits.images / 16).astype(np.float32)[:, None], np.ones((2, 2), np.float32))  # 8x8 to 16x16
    labels = digits.target.astype(np.int64)
    parts, rest = [], np.arange(len(labels))
    for count in (350, 350, 100):
        rest, part = train_test_split(rest, test_size=count, stratify=labels[rest], random_state=0)
        parts.append(LabelledImages(images[part], labels[part]))
    test, validation, calibration = parts
    return Splits(_shuffled(images, labels, rest), calibration, validation, test, classes=10)


def _shuffled(images: NDArray[np.float32], labels: NDArray[np.int64], rest: NDArray[np.int64]) -> LabelledImages:
    order = np.random.default_rng(0).permutation(rest)
    return LabelledImages(images[order], labels[order])


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Returns training images, shifted by up to three pixels: whatever leaves the label true will do."""
    down, across = torch.randint(-3, 4, (2,), generator=generator).tolist()
    return torch.roll(images, (down, across), dims=(2, 3))
