"""Gates that decide for each input whether a block is run: a file and a table line each."""

from typing import TYPE_CHECKING

from spaces.registry import Registry

if TYPE_CHECKING:
    from spaces.dynamic.block_gates.base import BlockGate

BLOCK_GATES: "Registry[BlockGate]" = Registry(
    "a gate of blocks",
    {
        "aig": "spaces.dynamic.block_gates.aig:AigGate",
        "skipnet": "spaces.dynamic.block_gates.skipnet:SkipNetGate",
    },
)
"""Every kind of gate, by the name that `[skips] gate` gives it."""
