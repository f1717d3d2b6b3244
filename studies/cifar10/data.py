"""How CIFAR's training images are varied."""

import torch
import torch.nn.functional as F
from torch import Tensor

_BORDER = 4


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Returns images `(n, c, h, w)`, each shifted by up to 4 pixels and half of them mirrored.

    Source: He et al., Deep Residual Learning for Image Recognition, 2016, section 4.2.
    """
    n, channels, height, width = images.shape
    mirrored = torch.rand(n, generator=generator) < 0.5
    images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    padded = F.pad(images, (_BORDER,) * 4)
    down = torch.randint(0, 2 * _BORDER + 1, (n, 1), generator=generator) + torch.arange(height)
    right = torch.randint(0, 2 * _BORDER + 1, (n, 1), generator=generator) + torch.arange(width)
    every = torch.arange(n)[:, None, None, None], torch.arange(channels)[None, :, None, None]
    return padded[*every, down[:, None, :, None], right[:, None, None, :]]
