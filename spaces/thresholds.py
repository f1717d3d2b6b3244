"""When an input may leave early or pass a block by, a threshold each; and when a frame need not be computed at all."""

from collections.abc import Mapping, Sequence

from spaces.candidate import ALWAYS_RUN, FRAMES, MASK, NEVER_EXIT, SKIP, UNRESOLVED
from spaces.dimensions import Dimension, Real, Value

PREFIX = "threshold."
FRAMES_THRESHOLD = PREFIX + FRAMES
SKIP_THRESHOLD = PREFIX + SKIP
MASK_THRESHOLD = PREFIX + MASK
TRAINED = 0.0
"""The logit from which a gate was trained to run its block, or a mask's gates to be open."""
_HIGHEST, _STEP = 4.0, 0.5


class ThresholdSpace:
    """The confidence at which each exit answers; at 1.0 it never does. And the logit from which each block is run.

    Gates go from always run, which is at the lower end, to skipped with a probability of at least 98%.

    Args:
        exits: their names, by depth.
        lowest: the lowest threshold on offer, above 1 / classes.
        step: how far apart thresholds are.
        frames: from 0 on, the differences from the last key frame below which a frame of a stream gets its answer; none
            where inputs come alone.
        solved: whether nobody has to choose the exits' thresholds: they are found for each candidate from what its
            exits say.
        skips: paths of the blocks that may be skipped.
        masks: paths of the blocks whose masks have a threshold that can be moved.
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
        """Returns one threshold per gate; none of the exits' where they are solved."""
        searched = () if self.solved else self.exits
        exits: dict[str, Dimension] = {PREFIX + name: Real(self.lowest, NEVER_EXIT, self.step) for name in searched}
        skips = {SKIP_THRESHOLD + block: Real(ALWAYS_RUN, _HIGHEST, _STEP) for block in self.skips}
        masks = {MASK_THRESHOLD + block: Real(ALWAYS_RUN, _HIGHEST, _STEP) for block in self.masks}
        return exits | skips | masks | ({FRAMES_THRESHOLD: self.frames} if self.frames else {})

    def read(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """Returns the threshold of every gate, rounded to where a sum of steps belongs; open where it is solved."""
        solved: dict[str, Value] = dict.fromkeys(self.exits if self.solved else (), UNRESOLVED)
        return solved | {name.removeprefix(PREFIX): round(float(values[name]), 6) for name in self.dimensions()}

    def closed(self) -> dict[str, float]:
        """Returns the thresholds at which no exit answers, and all of every block and frame is computed."""
        skips = {SKIP + block: ALWAYS_RUN for block in self.skips} | {MASK + block: ALWAYS_RUN for block in self.masks}
        return dict.fromkeys(self.exits, NEVER_EXIT) | skips | ({FRAMES: 0.0} if self.frames else {})

    def as_open(self, threshold: float) -> float:
        """Returns the threshold of frames that is as far from closed, as a share of its grid, as one of exits is."""
        openness = (NEVER_EXIT - threshold) / (NEVER_EXIT - self.lowest)
        return openness * self.frames.high if self.frames else 0.0

    @staticmethod
    def idle_layers(name: str, threshold: float) -> str | None:
        """Returns the prefix of the layers that are not deployed at this threshold of a gate; None where all are."""
        if name.startswith(MASK):
            return None
        if name.startswith(SKIP):
            return f"skips.{name.removeprefix(SKIP)}." if threshold <= ALWAYS_RUN else None
        return f"exits.{name}." if threshold >= NEVER_EXIT else None
