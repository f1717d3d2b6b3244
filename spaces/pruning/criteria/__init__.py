"""Importance criteria for channels: one file each, and a line in the table."""

from typing import TYPE_CHECKING

from spaces.registry import Registry

if TYPE_CHECKING:
    from spaces.pruning.criteria.base import Criterion

CRITERIA: "Registry[Criterion]" = Registry(
    "a criterion",
    {
        "l1": "spaces.pruning.criteria.l1:scores",
        "l2": "spaces.pruning.criteria.l2:scores",
        "fpgm": "spaces.pruning.criteria.fpgm:scores",
        "bn_scale": "spaces.pruning.criteria.bn_scale:scores",
        "taylor": "spaces.pruning.criteria.taylor:scores",
        "hrank": "spaces.pruning.criteria.hrank:scores",
        "obd": "spaces.pruning.criteria.obd:scores",
        "random": "spaces.pruning.criteria.random:scores",
    },
)
"""Every criterion, by its name in `[space] criterion`."""
