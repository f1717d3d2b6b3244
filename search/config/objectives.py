"""The objectives of a search: accuracy, and the costs that it is weighed against."""

from collections.abc import Sequence
from typing import Literal, get_args

from evaluators.measurement import METRICS
from spaces.registry import nearest

Objective = Literal["accuracy", "latency", "flops", "params", "size"]
Objectives = tuple[Objective, ...]
OBJECTIVES: Objectives = get_args(Objective)
"""What is measured of every version, in the order in which objectives are written."""
DEFAULT: Objectives = ("accuracy", "latency")
BEFORE: Objectives = ("accuracy", "latency", "flops")
"""Those of every search that began before there was a choice."""
_NO_WORSE = {
    "latency": "no slower",
    "flops": "with no more FLOPs",
    "params": "with no more parameters",
    "size": "no larger",
}


def known_objectives(names: object) -> object:
    """Returns the objectives that are named, in their own order, each once.

    Raises:
        ValueError: one of them is not measured, or accuracy or every cost is missing.
    """
    if not isinstance(names, list | tuple):
        return names
    unknown = [str(name) for name in names if name not in OBJECTIVES]
    chosen = tuple(name for name in OBJECTIVES if name in names)
    if unknown or chosen[:1] != ("accuracy",) or len(chosen) < 2:
        near = nearest(unknown[0], OBJECTIVES) if unknown else None
        meant = f" (did you mean {near!r}?)" if near else ""
        raise ValueError(f"accuracy and at least one of {', '.join(OBJECTIVES[1:])}{meant}")
    return chosen


def together(names: Sequence[str]) -> str:
    """Returns objectives in words: `accuracy, latency and FLOPs`."""
    *others, last = (METRICS[name].title for name in names)
    return f"{', '.join(others)} and {last}"


def no_worse(names: Sequence[str]) -> str:
    """Returns in words that no cost among some objectives is higher: `no slower and with no more FLOPs`."""
    return " and ".join(_NO_WORSE[name] for name in names if name in _NO_WORSE)
