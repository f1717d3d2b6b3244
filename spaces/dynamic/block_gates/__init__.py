"""Blocks that an input may pass by: where they are, and the gates that decide, a file and a table line each."""

import importlib
from collections.abc import Mapping

from torch import nn

GATES: Mapping[str, str] = {
    "aig": "spaces.dynamic.block_gates.aig:AigGate",
    "skipnet": "spaces.dynamic.block_gates.skipnet:SkipNetGate",
}
"""Every kind of gate, by the name that a study gives it; loaded when asked for."""

OPEN_BIAS = 1.9
"""Gates start with this logit, which is a probability of 87% to run the block."""


def gate(kind: str, channels: int) -> nn.Module:
    """Returns an untrained gate for feature maps of so many channels.

    It maps features `(n, channels, h, w)` to logits `(n, 1)`: how much more likely the block is run than skipped.
    """
    module, _, attribute = GATES[kind].partition(":")
    made: nn.Module = getattr(importlib.import_module(module), attribute)(channels)
    return made
