"""Which version is trained next after a search, and for how long: where the forecast wins most for its time."""

from collections.abc import Sequence
from dataclasses import dataclass

from search.config.objectives import Objectives
from search.config.study import FinalSection, FinetuneSection
from search.results.pareto import Version, pareto
from search.results.rounds import Rounds, decay, forecast

PAYS = 0.001
"""Accuracy that a further round has to win by its forecast; less than a tenth of a point is no reason to train on."""
_FIRST = 1 / 3
"""Share of the time for first rounds, which tell what further ones win."""
_SHORTEST_S = 2.0
"""Seconds of the shortest round: shorter ones tell nothing."""


@dataclass(frozen=True)
class Training:
    """A training that is due.

    Args:
        version: to be trained.
        settings: all of its rounds together.
        gain: of accuracy that is expected; None where nothing is known.
    """

    version: Version
    settings: FinetuneSection
    gain: float | None = None

    def __str__(self) -> str:
        """Returns what is about to happen, as a sentence for the user without its end."""
        trial = f"Recovering trial {self.version.number} in full"
        if self.settings.rounds == 1:
            return trial
        return f"{trial}, round {self.settings.rounds}: {100 * (self.gain or 0):.1f} points more are expected"


def next_training(
    promising: Sequence[Version], rounds: Rounds, final: FinalSection, search_seconds: float, objectives: Objectives
) -> Training | None:
    """Returns what to train next; None where all is done, the time is spent, or nothing is won any more.

    Without `of_search` every version is trained once, as long as `final` says. With it, a third of the time goes to a
    first round of each version; then those go on for which the forecast wins most accuracy per second, each round twice
    as long as the one before. A version is done that won nothing, or that another would still beat.

    Args:
        promising: the versions that training may improve, the most promising first, as they are by now.
        rounds: what was trained before.
        final: how.
        search_seconds: processor time of the search.
        objectives: of the search.
    """
    fixed = FinetuneSection.model_validate(final.model_dump(include=set(FinetuneSection.model_fields)))
    fresh = [version for version in promising if version.number not in rounds][: max(final.versions - len(rounds), 0)]
    if final.of_search is None:
        return Training(fresh[0], fixed) if fresh else None
    in_all = final.of_search * search_seconds
    left = in_all - sum(trained[-1].seconds for trained in rounds.values())
    if fresh and left > 0:
        first = max(_FIRST * in_all / (len(rounds) + len(fresh)), _SHORTEST_S)
        return Training(fresh[0], fixed.model_copy(update={"minutes": float(f"{first / 60:.2g}")}))
    return _further(promising, rounds, left, objectives)


def _further(promising: Sequence[Version], rounds: Rounds, left: float, objectives: Objectives) -> Training | None:
    """Returns the further round that wins most per second, of those that pay and take no longer than `left`."""
    due = [
        (gain / seconds, Training(version, _one_more(version), gain))
        for version in promising
        if version.number in rounds and version.evaluation.finetune
        for gain in [forecast(rounds[version.number], decay(rounds))]
        for seconds in [_seconds(_one_more(version))]
        if gain >= PAYS and seconds <= left and _counts(version.more_accurate(gain), promising, objectives)
    ]
    return max(due, key=lambda pair: pair[0])[1] if due else None


def _counts(version: Version, promising: Sequence[Version], objectives: Objectives) -> bool:
    """Returns whether no other version would beat it."""
    others = [other for other in promising if other.number != version.number]
    return version in pareto([version, *others], objectives)


def _one_more(version: Version) -> FinetuneSection:
    settings = FinetuneSection.model_validate(version.evaluation.finetune)
    return settings.model_copy(update={"rounds": settings.rounds + 1})


def _seconds(settings: FinetuneSection) -> float:
    """Returns the processor time of the last round."""
    *_, last = settings.each_round()
    return 60 * (last.minutes or 0.0)
