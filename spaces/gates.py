"""When an input may leave early: one confidence threshold per exit."""

from collections.abc import Mapping, Sequence

from spaces.candidate import NEVER_EXIT, OPEN_EXIT
from spaces.space import Dimension, Real, Value

PREFIX = "threshold."


class GateSpace:
    """The confidence at which each exit answers; at 1.0 it never does.

    Args:
        exits: their names, by depth.
        lowest: the lowest threshold on offer, above 1 / classes.
        step: how far apart thresholds are.
        solved: whether nobody has to choose: thresholds are found for each candidate from what its exits say.
    """

    def __init__(self, exits: Sequence[str], lowest: float, step: float, solved: bool = False) -> None:
        self.exits = tuple(exits)
        self.lowest = lowest
        self.step = step
        self.solved = solved

    def dimensions(self) -> dict[str, Dimension]:
        """Returns one threshold per exit; nothing where they are solved."""
        if self.solved:
            return {}
        return {PREFIX + name: Real(self.lowest, NEVER_EXIT, self.step) for name in self.exits}

    def read(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """Returns the threshold of every exit, rounded to where a sum of steps belongs; open where it is solved."""
        if self.solved:
            return dict.fromkeys(self.exits, OPEN_EXIT)
        return {name: round(float(values[PREFIX + name]), 6) for name in self.exits}
