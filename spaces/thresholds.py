"""Thresholds of exits, gates, masks and frames, as dimensions."""

from collections.abc import Mapping, Sequence

from spaces.candidate import ALWAYS_RUN, FRAMES, MASK, NEVER_EXIT, SKIP, UNRESOLVED
from spaces.dimensions import Dimension, Real, Value

PREFIX = "threshold."
FRAMES_THRESHOLD = PREFIX + FRAMES
SKIP_THRESHOLD = PREFIX + SKIP
MASK_THRESHOLD = PREFIX + MASK
TRAINED = 0.0
"""The logit from which gates run their block, and masks' gates are open, as they were trained."""
_HIGHEST, _STEP = 4.0, 0.5


class ThresholdSpace:
    """The thresholds of exits (confidences), of gates and masks (logits), and of frames (differences).

    An exit at 1.0 never answers. A gate's threshold ranges from `ALWAYS_RUN`, the lower end, to a logit of 4, at which
    a block is run only if its gate gives it a probability of at least 98%.

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

    def dimensions(self) -> dict[str, Dimension]:
        """Returns one dimension per threshold; none for exits if their thresholds are solved."""
        searched = () if self.solved else self.exits
        exits: dict[str, Dimension] = {PREFIX + name: Real(self.lowest, NEVER_EXIT, self.step) for name in searched}
        skips = {SKIP_THRESHOLD + block: Real(ALWAYS_RUN, _HIGHEST, _STEP) for block in self.skips}
        masks = {MASK_THRESHOLD + block: Real(ALWAYS_RUN, _HIGHEST, _STEP) for block in self.masks}
        return exits | skips | masks | ({FRAMES_THRESHOLD: self.frames} if self.frames else {})

    def read(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """Returns every threshold, rounded to 6 decimals; `UNRESOLVED` for exits if their thresholds are solved."""
        solved: dict[str, Value] = dict.fromkeys(self.exits if self.solved else (), UNRESOLVED)
        return solved | {name.removeprefix(PREFIX): round(float(values[name]), 6) for name in self.dimensions()}

    def closed(self) -> dict[str, float]:
        """Returns the thresholds at which everything is computed: no exit answers and nothing is skipped or reused."""
        skips = {SKIP + block: ALWAYS_RUN for block in self.skips} | {MASK + block: ALWAYS_RUN for block in self.masks}
        return dict.fromkeys(self.exits, NEVER_EXIT) | skips | ({FRAMES: 0.0} if self.frames else {})

    def as_open(self, threshold: float) -> float:
        """Returns the threshold of frames at the same relative position in its range as a threshold of exits."""
        openness = (NEVER_EXIT - threshold) / (NEVER_EXIT - self.lowest)
        return openness * self.frames.high if self.frames else 0.0

    @staticmethod
    def idle_layers(name: str, threshold: float) -> str | None:
        """Returns the prefix of the layers that are not deployed at a threshold; None if all are deployed."""
        if name.startswith(MASK):
            return None
        if name.startswith(SKIP):
            return f"skips.{name.removeprefix(SKIP)}." if threshold <= ALWAYS_RUN else None
        return f"exits.{name}." if threshold >= NEVER_EXIT else None
