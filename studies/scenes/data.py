"""Scenes of scikit-learn's handwritten digits in four splits of which no two share a digit."""

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluators.data import LabelledImages, Splits
from studies.digits.data import splits as digit_splits
from studies.scenes.composition import Scenes, compose

COUNTS = {"train": 8000, "calibration": 200, "validation": 3000, "test": 2000}
"""Scenes in each split."""
SIZE = 48
"""Height and width of a scene in pixels."""
SEEDS = {name: seed for seed, name in enumerate(COUNTS)}
"""Of each split's scenes."""
_SHIFT = 4


def splits() -> Splits:
    """Returns 8,000 scenes to train on, 200 to calibrate, 3,000 to search with and 2,000 to test.

    Those of a split show its own digits alone, in the middle and in the clutter: 1,000, 97, 350 and 350 of them.
    Images are `(n, 1, 48, 48)` from 0 to 1.
    """
    parts = {name: scenes(name) for name in COUNTS}
    images = {name: LabelledImages(part.images, part.labels) for name, part in parts.items()}
    return Splits(**images, classes=10, names=tuple("0123456789"))


def scenes(split: str, count: int | None = None) -> Scenes:
    """Returns the scenes of a split with masks and boxes of their digits.

    Args:
        split: `train`, `calibration`, `validation` or `test`.
        count: so many scenes of the split's digits instead of the split's own.

    Raises:
        ValueError: there is no such split.
    """
    if split not in COUNTS:
        raise ValueError(f"a split is one of {', '.join(COUNTS)}, got {split!r}")
    return compose(getattr(digit_splits(8), split), count or COUNTS[split], SEEDS[split], SIZE)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Returns images `(n, c, h, w)`, each shifted by up to 4 pixels, edges repeated, and darker or brighter by 20%."""
    n, channels, height, width = images.shape
    padded = F.pad(images, (_SHIFT,) * 4, mode="replicate")
    down = torch.randint(0, 2 * _SHIFT + 1, (n, 1), generator=generator) + torch.arange(height)
    right = torch.randint(0, 2 * _SHIFT + 1, (n, 1), generator=generator) + torch.arange(width)
    every = torch.arange(n)[:, None, None, None], torch.arange(channels)[None, :, None, None]
    brightness = 0.8 + 0.4 * torch.rand(n, 1, 1, 1, generator=generator)
    return (padded[*every, down[:, None, :, None], right[:, None, None, :]] * brightness).clamp(0, 1)
