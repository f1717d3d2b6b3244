"""Gates that learn which positions and channels an input needs: where they are, and how they decide, a file each."""

import importlib
from collections.abc import Mapping
from typing import cast

from spaces.dynamic.masks.base import Mask

MASKS: Mapping[str, str] = {
    "cgnet": "spaces.dynamic.masks.cgnet:PartialSumMask",
    "dgc": "spaces.dynamic.masks.dgc:GroupMask",
    "dgnet": "spaces.dynamic.masks.dgnet:DualMask",
    "dynconv": "spaces.dynamic.masks.dynconv:PixelMask",
    "lccl": "spaces.dynamic.masks.lccl:CollaborativeMask",
}
"""Every kind of mask, by the name that a study gives it; loaded when asked for."""


def mask_class(kind: str) -> type[Mask]:
    """Returns the class of a kind of mask: one mask sits in one residual block."""
    module, _, attribute = MASKS[kind].partition(":")
    return cast(type[Mask], getattr(importlib.import_module(module), attribute))
