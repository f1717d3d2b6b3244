"""One version of a network, as data."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, Self

from spaces import cache

NEVER_EXIT = 1.0
"""The threshold that turns an exit off: its head is not part of the artifact."""
UNRESOLVED = -1.0
"""The threshold of an active exit whose confidence threshold has not been solved yet."""
ALWAYS_RUN = -4.0
"""The threshold that turns a gate off: its block is always run, and the gate is not part of the artifact."""
SKIP = "skip."
"""The prefix of the name of a gate's threshold; its block's path follows."""
MASK = "mask."
"""The prefix of the name of a mask's threshold; its block's path follows. At `ALWAYS_RUN` nothing is masked."""
FRAMES = "frames"
"""The name of the threshold of frame reuse in streams; 0 turns reuse off: every frame is computed."""


@dataclass(frozen=True)
class Candidate:
    """Channels kept per group, precision per layer, thresholds, and the sparsity pattern of some layers.

    Candidate({"stage1.0.conv1": 8}, {"stage1.0.conv1": "int8"}, {"exit1": 0.9})

    Candidates are compared by content; `key` identifies the content.
    """

    channels: Mapping[str, int]
    precision: Mapping[str, str]
    thresholds: Mapping[str, float]
    patterns: Mapping[str, str] = field(default_factory=dict)
    """The sparsity pattern of some layers, by name; other layers are dense."""

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
        """All exits of the network, active or not: the thresholds that are not of frames, gates or masks."""
        return [name for name in self.thresholds if name != FRAMES and not name.startswith((SKIP, MASK))]

    @property
    def masks(self) -> dict[str, float]:
        """For each block with a mask, by path, the logit from which the mask's gates are open."""
        return {name.removeprefix(MASK): value for name, value in self.mask_thresholds.items()}

    @property
    def mask_thresholds(self) -> dict[str, float]:
        """The thresholds of masks, by full name. They act in the torch network, others only at run time."""
        return {name: value for name, value in self.thresholds.items() if name.startswith(MASK)}

    @property
    def active_exits(self) -> tuple[str, ...]:
        """The exits that may answer, in order of depth."""
        names = sorted(self.exits, key=lambda name: (len(name), name))  # exit2 before exit10
        return tuple(name for name in names if self.thresholds[name] < NEVER_EXIT)

    @property
    def active_skips(self) -> dict[str, float]:
        """For each block that may be skipped, by path, the gate's logit from which the block is run."""
        gates = {name.removeprefix(SKIP): value for name, value in self.thresholds.items() if name.startswith(SKIP)}
        return {block: threshold for block, threshold in gates.items() if threshold > ALWAYS_RUN}

    @property
    def is_unresolved(self) -> bool:
        """Whether the threshold of an active exit has not been solved yet; then this cannot be deployed."""
        return any(self.thresholds[name] == UNRESOLVED for name in self.active_exits)

    def without_skips(self) -> Self:
        """Returns the same candidate with every block run."""
        return replace(
            self, thresholds={**self.thresholds, **{SKIP + block: ALWAYS_RUN for block in self.active_skips}}
        )

    def unresolved(self) -> Self:
        """Returns the same candidate with the thresholds of all active exits unresolved."""
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
