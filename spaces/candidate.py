"""One version of a network, as data."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, Self

from spaces import cache

NEVER_EXIT = 1.0
"""The threshold that turns an exit off: its head is not even part of the artifact."""
UNRESOLVED = -1.0
"""The threshold of an exit that takes part, while how confident it has to be is still to be found."""
ALWAYS_RUN = -4.0
"""The threshold that turns a gate off: its block is always run, and the gate is not even part of the artifact."""
SKIP = "skip."
"""What a gate's threshold is called, followed by its block's path."""
MASK = "mask."
"""What a mask's threshold is called, followed by its block's path; at `ALWAYS_RUN` all of the block is computed."""
FRAMES = "frames"
"""The gate that lets a frame of a stream be answered as the last key frame was; it is no exit, and 0 turns it off."""


@dataclass(frozen=True)
class Candidate:
    """Channels kept per group, precision per layer, threshold per gate, and the pattern of zeros of some layers.

    Candidate({"stage1.0.conv1": 8}, {"stage1.0.conv1": "int8"}, {"exit1": 0.9})

    Two candidates are equal when their content is; `key` names that content.
    """

    channels: Mapping[str, int]
    precision: Mapping[str, str]
    thresholds: Mapping[str, float]
    patterns: Mapping[str, str] = field(default_factory=dict)
    """Of layers that have zeros by choice; one that is not named is dense."""

    def __post_init__(self) -> None:
        for part in ("channels", "precision", "thresholds", "patterns"):
            object.__setattr__(self, part, MappingProxyType(dict(getattr(self, part))))

    def __hash__(self) -> int:
        return hash(self.key)

    @cached_property
    def key(self) -> str:
        """The first 16 hexadecimal digits of the SHA-256 of the candidate's canonical JSON."""
        return cache.key(json.dumps(self.to_dict(), sort_keys=True))

    @property
    def exits(self) -> list[str]:
        """The exits of the network, whether they can fire or not: what has a threshold and is no other gate."""
        return [name for name in self.thresholds if name != FRAMES and not name.startswith((SKIP, MASK))]

    @property
    def masks(self) -> dict[str, float]:
        """The blocks with masks, by their paths, each with the logit from which its gates are open."""
        return {name.removeprefix(MASK): value for name, value in self.mask_thresholds.items()}

    @property
    def mask_thresholds(self) -> dict[str, float]:
        """The thresholds of masks: part of the network in torch, as channels are, where others are of the runtime."""
        return {name: value for name, value in self.thresholds.items() if name.startswith(MASK)}

    @property
    def active_exits(self) -> tuple[str, ...]:
        """The exits that can fire, in order of depth."""
        names = sorted(self.exits, key=lambda name: (len(name), name))  # exit2 before exit10
        return tuple(name for name in names if self.thresholds[name] < NEVER_EXIT)

    @property
    def active_skips(self) -> dict[str, float]:
        """The blocks that may be skipped, by their paths, each with the logit from which its gate runs it."""
        gates = {name.removeprefix(SKIP): value for name, value in self.thresholds.items() if name.startswith(SKIP)}
        return {block: threshold for block, threshold in gates.items() if threshold > ALWAYS_RUN}

    @property
    def is_unresolved(self) -> bool:
        """Whether a threshold is still to be found, so that this is a choice of all else, and no version yet."""
        return any(self.thresholds[name] == UNRESOLVED for name in self.active_exits)

    def without_skips(self) -> Self:
        """Returns the same choices with every block run."""
        return replace(
            self, thresholds={**self.thresholds, **{SKIP + block: ALWAYS_RUN for block in self.active_skips}}
        )

    def unresolved(self) -> Self:
        """Returns the same choices with the threshold of each active exit still to be found."""
        thresholds = dict(self.thresholds) | dict.fromkeys(self.active_exits, UNRESOLVED)
        return replace(self, thresholds=thresholds)

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready copy."""
        return {
            "channels": dict(self.channels),
            "precision": dict(self.precision),
            "thresholds": dict(self.thresholds),
            "patterns": dict(self.patterns),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """Returns the candidate that `to_dict` described; without patterns, every layer is dense.

        Raises:
            ValueError: a part is missing.
        """
        missing = {"channels", "precision", "thresholds"} - set(content)
        if missing:
            raise ValueError(f"a candidate has channels, precision and thresholds, got none of {sorted(missing)}")
        return cls(
            {str(name): int(kept) for name, kept in content["channels"].items()},
            {str(name): str(precision) for name, precision in content["precision"].items()},
            {str(name): float(threshold) for name, threshold in content["thresholds"].items()},
            {str(name): str(pattern) for name, pattern in content.get("patterns", {}).items()},
        )
