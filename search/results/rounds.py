"""What each training after a search came to: accuracy, images and processor time."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

import optuna

_ROUNDS = "rounds."
_USUAL_DECAY = 0.5
"""What a round, twice as long as the one before, wins of what that one won, until this is known."""
_WEIGHT = 0.01
"""Accuracy won in how many points `_USUAL_DECAY` counts for."""


@dataclass(frozen=True)
class Round:
    """How far a version's training after the search has come.

    Args:
        accuracy: 0 to 1, on the validation images.
        images: that were shown to it since the search, each as often as it was.
        seconds: of processor time that it was trained for since the search.
    """

    accuracy: float
    images: int = 0
    seconds: float = 0.0


Rounds = Mapping[int, Sequence[Round]]
"""What is known of each version's trainings after the search, by trial: its accuracy before them, and after each."""


def store_rounds(journal: optuna.Study, number: int, rounds: list[Round]) -> None:
    """Stores a version's rounds; the first is the search's own accuracy."""
    journal.set_user_attr(f"{_ROUNDS}{number}", [asdict(each) for each in rounds])


def rounds_of(attributes: Mapping[str, object]) -> dict[int, list[Round]]:
    """Returns the rounds of each version in a journal's attributes, by the number of its trial."""
    return {
        int(name.removeprefix(_ROUNDS)): [Round(**each) for each in content]
        for name, content in attributes.items()
        if name.startswith(_ROUNDS) and isinstance(content, list)
    }


def forecast(trained: Sequence[Round], share: float) -> float:
    """Returns the accuracy that one more round wins: `share` of what the last one won."""
    return share * (trained[-1].accuracy - trained[-2].accuracy) if len(trained) > 1 else 0.0


def decay(rounds: Rounds) -> float:
    """Returns what share of a round's gain the next one, twice as long, wins: over all versions, from 0 to 1."""
    before, after = _WEIGHT, _WEIGHT * _USUAL_DECAY
    for trained in rounds.values():
        gains = [later.accuracy - earlier.accuracy for earlier, later in pairwise(trained)]
        before += sum(gains[:-1])
        after += sum(gains[1:])
    return min(max(after / before, 0.0), 1.0) if before > 0 else 0.0
