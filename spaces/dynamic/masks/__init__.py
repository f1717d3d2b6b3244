"""Gates that learn which positions and channels an input needs: where they are, and how they decide, a file each."""

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
"""Every kind of mask, by the name that `[masks] method` gives it; one mask sits in one residual block."""
