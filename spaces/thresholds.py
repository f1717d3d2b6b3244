"""Thresholds of exits, gates, masks and frames: of one version, and as dimensions of a search."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Final, Literal, Self

from spaces.dimensions import Real, Value

UNSOLVED: Final = "unsolved"
"""The threshold of an exit that may answer, but whose confidence threshold has not been solved for yet."""
ExitThreshold = float | Literal["unsolved"] | None
"""The confidence from which an exit answers; None for an exit that never answers."""

_FRAMES = "frames"
_SKIP = "skip."
_MASK = "mask."
PREFIX = "threshold."
FRAMES_THRESHOLD = PREFIX + _FRAMES
SKIP_THRESHOLD = PREFIX + _SKIP
MASK_THRESHOLD = PREFIX + _MASK
_NEVER_EXIT = 1.0
"""How files and dimensions write that an exit never answers."""
_ALWAYS_RUN = -4.0
"""How files and dimensions write that a block is always run, or that all gates of a mask are open."""
_UNSOLVED = -1.0
"""How files write `UNSOLVED`."""
_TRAINED = 0.0
"""The logit from which gates run their block, and masks' gates are open, as they were trained."""
_HIGHEST, _STEP = 4.0, 0.5


@dataclass(frozen=True)
class Thresholds:
    """From which values a version's exits answer, its blocks are run, its masks open, and frames are computed anew.

    Args:
        exits: for each exit of the network the confidence, 0 to 1, from which it answers; `UNSOLVED` if it is still to
            be solved for; None if the exit never answers: its head is not part of the artifact.
        blocks: for each block with a gate, by path, the gate's logit from which the block is run; None if it always is:
            its gate is not part of the artifact.
        masks: for each block with a mask, by path, the logit from which the mask's gates are open; None if all are.
        frames: the difference up to which a frame gets the last answer; 0 if every frame is computed, None for
            independent images.

    Raises:
        ValueError: an exit's threshold is 1 or more.
    """

    exits: Mapping[str, ExitThreshold] = field(default_factory=dict)
    blocks: Mapping[str, float | None] = field(default_factory=dict)
    masks: Mapping[str, float | None] = field(default_factory=dict)
    frames: float | None = None

    def __post_init__(self) -> None:
        for part in ("exits", "blocks", "masks"):
            object.__setattr__(self, part, MappingProxyType(dict(getattr(self, part))))
        never = {name: value for name, value in self.exits.items() if isinstance(value, float) and value >= _NEVER_EXIT}
        if never:
            raise ValueError(f"an exit's threshold is below 1, or None for an exit that never answers, got {never}")

    @property
    def active_exits(self) -> tuple[str, ...]:
        """The exits that may answer, in order of depth."""
        names = sorted(self.exits, key=lambda name: (len(name), name))  # exit2 before exit10
        return tuple(name for name in names if self.exits[name] is not None)

    @property
    def active_blocks(self) -> dict[str, float]:
        """For each block that may be skipped, by path, the gate's logit from which the block is run."""
        return {block: threshold for block, threshold in self.blocks.items() if threshold is not None}

    @property
    def is_unsolved(self) -> bool:
        """Whether the threshold of an exit is still to be solved for."""
        return UNSOLVED in self.exits.values()

    @property
    def confidences(self) -> tuple[float, ...]:
        """The thresholds of the active exits, in order of depth; 0, which all reach, for one to be solved for."""
        values = (self.exits[name] for name in self.active_exits)
        return tuple(0.0 if value is None or value == UNSOLVED else value for value in values)

    def with_exits(self, chosen: Mapping[str, ExitThreshold]) -> Self:
        """Returns the same thresholds but for some exits."""
        return replace(self, exits={**self.exits, **chosen})

    def without_exits(self) -> Self:
        """Returns the same thresholds with no exit that answers."""
        return replace(self, exits=dict.fromkeys(self.exits))

    def without_skips(self) -> Self:
        """Returns the same thresholds with every block run."""
        return replace(self, blocks=dict.fromkeys(self.blocks))

    def unsolved(self) -> Self:
        """Returns the same thresholds with those of all active exits still to be solved for."""
        return self.with_exits(dict.fromkeys(self.active_exits, UNSOLVED))

    def idle_layers(self) -> tuple[str, ...]:
        """Returns prefixes of the layers that are not deployed: heads of unused exits, gates of blocks that always run.

        Masks are deployed with all of their gates open.
        """
        exits = [f"exits.{name}." for name, threshold in self.exits.items() if threshold is None]
        return (*exits, *(f"skips.{block}." for block, threshold in self.blocks.items() if threshold is None))

    def to_dict(self) -> dict[str, float]:
        """Returns a JSON-ready copy, a number each.

        It is 1 for an exit that never answers, -1 for one to be solved for, -4 for a block that always runs, and for a
        mask with all gates open.
        """
        exits = {name: _NEVER_EXIT if value is None else value for name, value in self.exits.items()}
        written = {name: _UNSOLVED if value == UNSOLVED else float(value) for name, value in exits.items()}
        blocks = {_SKIP + block: _ALWAYS_RUN if value is None else value for block, value in self.blocks.items()}
        masks = {_MASK + block: _ALWAYS_RUN if value is None else value for block, value in self.masks.items()}
        return written | blocks | masks | ({} if self.frames is None else {_FRAMES: self.frames})

    @classmethod
    def from_dict(cls, content: Mapping[str, float]) -> Self:
        """Returns the thresholds that `to_dict` described."""
        gates = {name: _logit(value) for name, value in content.items()}
        exits = {name: value for name, value in content.items() if name != _FRAMES}
        return cls(
            {name: _confidence(value) for name, value in exits.items() if not name.startswith((_SKIP, _MASK))},
            {name.removeprefix(_SKIP): value for name, value in gates.items() if name.startswith(_SKIP)},
            {name.removeprefix(_MASK): value for name, value in gates.items() if name.startswith(_MASK)},
            content.get(_FRAMES),
        )


def _confidence(written: float) -> ExitThreshold:
    if written == _UNSOLVED:
        return UNSOLVED
    return None if written >= _NEVER_EXIT else float(written)


def _logit(written: float) -> float | None:
    return None if written <= _ALWAYS_RUN else float(written)


class ThresholdSpace:
    """The thresholds of exits (confidences), of gates and masks (logits), and of frames (differences).

    The highest threshold of an exit, 1, stands for none: the exit never answers. The lowest threshold of a gate, -4, is
    none as well; at its highest, 4, a block is run only if its gate gives it a probability of at least 98%.

    Args:
        exits: the names of the exits, by depth.
        lowest: the lowest confidence threshold, above 1 / classes.
        step: the step between confidence thresholds.
        frames: the thresholds of frame reuse, from 0 on; None for independent images.
        solved: whether the thresholds of exits are solved for each candidate instead of searched.
        skips: the paths of the blocks that may be skipped.
        masks: the paths of the blocks whose masks have an adjustable threshold.
    """

    def __init__(
        self,
        exits: Sequence[str],
        lowest: float,
        step: float,
        frames: Real | None = None,
        solved: bool = False,
        skips: Sequence[str] = (),
        masks: Sequence[str] = (),
    ) -> None:
        self.exits = tuple(exits)
        self.skips = tuple(skips)
        self.masks = tuple(masks)
        self.lowest = lowest
        self.step = step
        self.frames = frames
        self.solved = solved

    def dimensions(self) -> dict[str, Real]:
        """Returns one dimension per threshold; none for exits if their thresholds are solved."""
        searched = () if self.solved else self.exits
        exits = {PREFIX + name: Real(self.lowest, _NEVER_EXIT, self.step) for name in searched}
        skips = {SKIP_THRESHOLD + block: Real(_ALWAYS_RUN, _HIGHEST, _STEP) for block in self.skips}
        masks = {MASK_THRESHOLD + block: Real(_ALWAYS_RUN, _HIGHEST, _STEP) for block in self.masks}
        return exits | skips | masks | ({FRAMES_THRESHOLD: self.frames} if self.frames else {})

    def read(self, values: Mapping[str, Value]) -> Thresholds:
        """Returns the thresholds, rounded to 6 decimals; `UNSOLVED` for exits if their thresholds are solved.

        Raises:
            KeyError: a dimension has no value.
        """
        read = {name.removeprefix(PREFIX): round(float(values[name]), 6) for name in self.dimensions()}
        thresholds = Thresholds.from_dict(read)
        return thresholds.with_exits(dict.fromkeys(self.exits, UNSOLVED)) if self.solved else thresholds

    def closed(self) -> Thresholds:
        """Returns the thresholds at which everything is computed: no exit answers and nothing is skipped or reused."""
        exits, blocks, masks = (dict.fromkeys(names) for names in (self.exits, self.skips, self.masks))
        return Thresholds(exits, blocks, masks, 0.0 if self.frames else None)

    def alike(self, confidence: float | None) -> dict[str, Value]:
        """Returns a value of each dimension for the same confidence at all exits; None if everything is computed.

        Frames get the value at the same relative position in their range, gates and masks that of their training.
        """
        openness = 0.0 if confidence is None else (_NEVER_EXIT - confidence) / (_NEVER_EXIT - self.lowest)
        values: dict[str, Value] = {}
        for name, dimension in self.dimensions().items():
            if name.startswith((SKIP_THRESHOLD, MASK_THRESHOLD)):
                values[name] = _ALWAYS_RUN if confidence is None else _TRAINED
            elif name == FRAMES_THRESHOLD and self.frames:
                values[name] = dimension.nearest(openness * self.frames.high)
            else:
                values[name] = dimension.nearest(_NEVER_EXIT if confidence is None else confidence)
        return values
