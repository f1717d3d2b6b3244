"""Masks: gates that learn which positions and channels of a block an input needs, a file and a table line each."""

from typing import TYPE_CHECKING

from spaces.registry import Registry

if TYPE_CHECKING:
    from spaces.dynamic.masks.base import Mask

MASKS: "Registry[type[Mask]]" = Registry(
    "a mask",
    {
        "cgnet": "spaces.dynamic.masks.cgnet:PartialSumMask",
        "dgc": "spaces.dynamic.masks.dgc:GroupMask",
        "dgnet": "spaces.dynamic.masks.dgnet:DualMask",
        "dynconv": "spaces.dynamic.masks.dynconv:PixelMask",
        "lccl": "spaces.dynamic.masks.lccl:CollaborativeMask",
    },
)
"""Every kind of mask, by its name in `[masks] method`; each residual block has a mask of its own."""
