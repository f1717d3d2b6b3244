"""When an input may leave early, one confidence threshold per exit; and when a frame need not be computed at all."""

from collections.abc import Mapping, Sequence

from spaces.candidate import FRAMES, NEVER_EXIT, OPEN_EXIT
from spaces.space import Dimension, Real, Value

PREFIX = "threshold."
FRAMES_THRESHOLD = PREFIX + FRAMES


class GateSpace:
    """The confidence at which each exit answers; at 1.0 it never does.

    Args:
        exits: their names, by depth.
        lowest: the lowest threshold on offer, above 1 / classes.
        step: how far apart thresholds are.
        frames: from 0 on, the differences from the last key frame below which a frame of a stream gets its answer; none
            where inputs come alone.
        solved: whether nobody has to choose the exits' thresholds: they are found for each candidate from what its
            exits say.
    """

    def __init__(
        self, exits: Sequence[str], lowest: float, step: float, frames: Real | None = None, solved: bool = False
    ) -> None:
        self.exits = tuple(exits)
        self.lowest = lowest
        self.step = step
        self.frames = frames
        self.solved = solved

    def dimensions(self) -> dict[str, Dimension]:
        """Returns one threshold per gate; none of the exits' where they are solved."""
        searched = () if self.solved else self.exits
        exits: dict[str, Dimension] = {PREFIX + name: Real(self.lowest, NEVER_EXIT, self.step) for name in searched}
        return exits | ({FRAMES_THRESHOLD: self.frames} if self.frames else {})

    def read(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """Returns the threshold of every gate, rounded to where a sum of steps belongs; open where it is solved."""
        solved: dict[str, Value] = dict.fromkeys(self.exits if self.solved else (), OPEN_EXIT)
        return solved | {name.removeprefix(PREFIX): round(float(values[name]), 6) for name in self.dimensions()}

    def closed(self) -> dict[str, float]:
        """Returns the thresholds at which no exit answers and every frame is computed."""
        return dict.fromkeys(self.exits, NEVER_EXIT) | ({FRAMES: 0.0} if self.frames else {})

    def as_open(self, threshold: float) -> float:
        """Returns the threshold of frames that is as far from closed, as a share of its grid, as one of exits is."""
        openness = (NEVER_EXIT - threshold) / (NEVER_EXIT - self.lowest)
        return openness * self.frames.high if self.frames else 0.0
