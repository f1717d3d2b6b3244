"""One version of a network, as data."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, Self

from spaces import cache
from spaces.thresholds import Thresholds


@dataclass(frozen=True)
class Candidate:
    """Channels per group, precision per layer, thresholds, sparsity patterns, blocks that are left out, input size.

    Candidate({"stage1.0.conv1": 8}, {"stage1.0.conv1": "int8"}, Thresholds({"exit1": 0.9}))

    Candidates are compared by content; `key` identifies the content.
    """

    channels: Mapping[str, int]
    precision: Mapping[str, str]
    thresholds: Thresholds = field(default_factory=Thresholds)
    patterns: Mapping[str, str] = field(default_factory=dict)
    """The sparsity pattern of some layers, by name; other layers are dense."""
    removed_blocks: tuple[str, ...] = ()
    """The paths of the residual blocks that are left out, sorted."""
    input_size: int | None = None
    """Height and width that images are resized to; None for their own."""

    def __post_init__(self) -> None:
        for part in ("channels", "precision", "patterns"):
            object.__setattr__(self, part, MappingProxyType(dict(getattr(self, part))))
        object.__setattr__(self, "removed_blocks", tuple(sorted(set(self.removed_blocks))))

    def __hash__(self) -> int:
        return hash(self.key)

    @cached_property
    def key(self) -> str:
        """The first 16 hexadecimal digits of the SHA-256 of the candidate's canonical JSON."""
        return cache.key(json.dumps(self.to_dict(), sort_keys=True))

    @property
    def active_exits(self) -> tuple[str, ...]:
        """The exits that may answer, in order of depth."""
        return self.thresholds.active_exits

    @property
    def active_skips(self) -> dict[str, float]:
        """For each block that may be skipped, by path, the gate's logit from which the block is run."""
        return self.thresholds.active_blocks

    @property
    def is_unsolved(self) -> bool:
        """Whether the threshold of an exit is still to be solved for."""
        return self.thresholds.is_unsolved

    def lacks(self, layer: str) -> bool:
        """Returns whether a layer, a block or a group of channels is left out, with the block that it is in."""
        return f"{layer}.".startswith(tuple(f"{block}." for block in self.removed_blocks))

    def without_skips(self) -> Self:
        """Returns the same candidate with every block run."""
        return replace(self, thresholds=self.thresholds.without_skips())

    def unsolved(self) -> Self:
        """Returns the same candidate with the thresholds of all active exits still to be solved for."""
        return replace(self, thresholds=self.thresholds.unsolved())

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready copy."""
        return {
            "channels": dict(self.channels),
            "precision": dict(self.precision),
            "thresholds": self.thresholds.to_dict(),
            "patterns": dict(self.patterns),
            # Others keep the content, and so the key, that they had before there were these choices.
            **({"removed_blocks": list(self.removed_blocks)} if self.removed_blocks else {}),
            **({"input_size": self.input_size} if self.input_size else {}),
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
            Thresholds.from_dict({str(name): float(value) for name, value in content["thresholds"].items()}),
            {str(name): str(pattern) for name, pattern in content.get("patterns", {}).items()},
            tuple(map(str, content.get("removed_blocks", ()))),
            int(content["input_size"]) if content.get("input_size") else None,
        )
