"""The objectives of a search: accuracy, and the costs that it is weighed against."""

from collections.abc import Sequence
from typing import Literal, get_args

from evaluators.measurement import METRICS
from search.config.metric_names import meant
from spaces.errors import UserError

Objective = Literal["accuracy", "latency", "flops", "params", "size"]
Objectives = tuple[Objective, ...]
OBJECTIVES: Objectives = get_args(Objective)
"""What is measured of every version, in the order in which objectives are written."""
PREFERENCES = (*OBJECTIVES, "knee")
"""What a version may be picked for."""
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
        remedy = meant(unknown[0], OBJECTIVES) if unknown else None
        hint = f" ({remedy})" if remedy else ""
        raise ValueError(f"accuracy and at least one of {', '.join(OBJECTIVES[1:])}{hint}")
    return chosen


def check_preference(name: str) -> None:
    """Checks that a version may be picked for this.

    Raises:
        UserError: it may not.
    """
    if name not in PREFERENCES:
        remedy = meant(name, PREFERENCES) or "leave it out for accuracy"
        raise UserError(f"a preference is one of {', '.join(PREFERENCES)}, got {name!r}; {remedy}")


def together(names: Sequence[str]) -> str:
    """Returns objectives in words: `accuracy, latency and FLOPs`."""
    *others, last = (METRICS[name].title for name in names)
    return f"{', '.join(others)} and {last}"


def no_worse(names: Sequence[str]) -> str:
    """Returns in words that no cost among some objectives is higher: `no slower and with no more FLOPs`."""
    return " and ".join(_NO_WORSE[name] for name in names if name in _NO_WORSE)
