"""When an input may leave early or pass a block by: one threshold per exit and per gate."""

from collections.abc import Mapping, Sequence

from spaces.candidate import ALWAYS_RUN, NEVER_EXIT, OPEN_EXIT, SKIP
from spaces.space import Dimension, Real, Value

PREFIX = "threshold."
TRAINED = 0.0
"""The logit from which a gate was trained to run its block."""
_HIGHEST, _STEP = 4.0, 0.5


class GateSpace:
    """The confidence at which each exit answers; at 1.0 it never does. And the logit from which each block is run.

    Gates go from always run, which is at the lower end, to skipped with a probability of at least 98%.

    Args:
        exits: their names, by depth.
        lowest: the lowest threshold on offer, above 1 / classes.
        step: how far apart thresholds are.
        solved: whether nobody has to choose how sure exits are: their thresholds are found for each candidate from what
            its exits say.
        skips: paths of the blocks that may be skipped.
    """

    def __init__(
        self, exits: Sequence[str], lowest: float, step: float, solved: bool = False, skips: Sequence[str] = ()
    ) -> None:
        self.exits = tuple(exits)
        self.skips = tuple(skips)
        self.lowest = lowest
        self.step = step
        self.solved = solved

    def dimensions(self) -> dict[str, Dimension]:
        """Returns one threshold per gate, and one per exit unless they are solved."""
        exits = () if self.solved else self.exits
        return {
            **{PREFIX + name: Real(self.lowest, NEVER_EXIT, self.step) for name in exits},
            **{PREFIX + SKIP + block: Real(ALWAYS_RUN, _HIGHEST, _STEP) for block in self.skips},
        }

    def read(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """Returns the threshold of every exit and gate, rounded to where a sum of steps belongs; open where solved."""
        chosen = {name.removeprefix(PREFIX): round(float(values[name]), 6) for name in self.dimensions()}
        return {**dict.fromkeys(self.exits, OPEN_EXIT), **chosen}

    def off(self) -> dict[str, float]:
        """Returns the thresholds with which no exit answers and every block is run."""
        gates = {SKIP + block: ALWAYS_RUN for block in self.skips}
        return dict.fromkeys(self.exits, NEVER_EXIT) | gates

    @staticmethod
    def owner(name: str, threshold: float) -> str | None:
        """Returns the prefix of the layers that are not deployed at this threshold; None where they are."""
        if name.startswith(SKIP):
            return f"skips.{name.removeprefix(SKIP)}." if threshold <= ALWAYS_RUN else None
        return f"exits.{name}." if threshold >= NEVER_EXIT else None
