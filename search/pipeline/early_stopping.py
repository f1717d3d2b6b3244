"""Ends the evaluation of a version after some of the images, where the rest would hardly change what comes of it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from evaluators.accuracy import accuracy_of
from evaluators.data import LabelledImages
from evaluators.deployed import Answers, Subject
from evaluators.measurement import Measurement
from evaluators.statistics import Paired
from search.config.budget import Budget
from search.config.units import percent
from search.results.pareto import Version, feasible, pareto

ERROR = 0.01
"""So often, at most, is a version more accurate on all images than the bound that it was ended by."""
FEWEST = 200
"""So many images are asked at least."""
ENOUGH = 2 * FEWEST
"""With fewer in all, all of them are asked at once."""
SUBSET = "subset"
"""The step of an evaluation in which some of the images are asked."""
_WITHOUT_FRONT = 0.25
_OTHERS = ("latency", "flops")


@dataclass(frozen=True)
class Ended:
    """An evaluation that ends early.

    Args:
        accuracy: as far as it is known.
        reason: for people.
    """

    accuracy: Measurement
    reason: str


def mixed_if_many(images: LabelledImages) -> LabelledImages:
    """Returns images of which the first ones stand for all, where they are enough to be asked in two parts."""
    return images.mixed() if len(images) >= ENOUGH else images


def most_asked(total: int, batch: int) -> int:
    """Returns how many images a screen asks at most, in whole batches: from half of them on little is saved.

    It is 0 where they are asked at once.
    """
    count = batch * math.ceil(total / 2 / batch)
    return count if total >= ENOUGH and count < total else 0


class Screen:
    """Decides on the first of the scored images whether the others are asked: the same way whoever proposes.

    It asks as many as tell neighbours of the front apart: so many that the standard error of an accuracy is what they
    differ by. An evaluation ends where even the highest accuracy that is likely breaks a limit, or where a version that
    was measured in full is as accurate as that, no slower, and has no more FLOPs.

    Args:
        budget: of the search.
        dense: the dense network's measurements.
        right: whether it has the first images right: as many as are asked at most.
        versions: what was measured, by key; grows as the search goes on.
        total: how many images are scored.
        batch: that is deployed; a subset is made of whole ones.
        reach: so much accuracy may be won back after the search, so that a version that lacks less is not hopeless.
    """

    def __init__(
        self,
        budget: Budget,
        dense: Mapping[str, Measurement],
        right: NDArray[np.bool_],
        versions: Mapping[str, Version],
        total: int,
        batch: int,
        reach: float = 0.0,
    ) -> None:
        self._budget = budget
        self._dense = dense
        self._right = right
        self._versions = versions
        self._total = total
        self._batch = batch
        self._floor = budget.accuracy_floor(dense)
        self._reach = reach

    def judge(self, subject: Subject, measured: Mapping[str, Measurement]) -> Ended | None:
        """Returns why an evaluation ends here, and the accuracy so far; None where it goes on.

        Args:
            subject: whose first images are asked; those that are asked later add to them.
            measured: what is known already; without latency and FLOPs only a limit can end it.
        """
        front = pareto(feasible(list(self._versions.values()), self._budget, self._dense))
        answers = subject.first_answers(self.images(front))
        pair = Paired.of(answers.correct, self._right, self._dense["accuracy"].value, self._total)
        highest = pair.most_accurate(ERROR)
        why = self._broken(highest) or _dominated(highest, measured, front)
        if not why:
            return None
        told = f"at most {percent(highest)} accurate ({1 - ERROR:.0%}) by {pair.asked} of {self._total} images, {why}"
        return Ended(_estimate(pair, answers, subject, highest), told)

    def images(self, front: Sequence[Version]) -> int:
        """Returns how many images are asked first, in whole batches, where this is the front so far."""
        wanted = subset_size(
            [version.measured["accuracy"].value for version in front],
            self._total,
            self._dense["accuracy"].value,
            self._floor,
        )
        return min(self._batch * math.ceil(wanted / self._batch), len(self._right))

    def _broken(self, highest: float) -> str:
        if self._floor is None or highest >= self._floor - self._reach:
            return ""
        more = f", or {percent(self._floor - self._reach)} before it is recovered in full" if self._reach else ""
        limit = max(self._budget.on("accuracy"), key=lambda limit: limit.floor(self._dense["accuracy"]))
        return f"where {limit} asks for {percent(self._floor)}{more}"


def subset_size(front: Sequence[float], total: int, dense: float, floor: float | None) -> int:
    """Returns how many images leave an accuracy the standard error that matters.

    Args:
        front: accuracies of its versions.
        total: how many images there are.
        dense: the dense network's accuracy.
        floor: the lowest that the budget lets through; None without a limit.
    """
    if len(front) > 1 and max(front) > min(front):
        share, step = float(np.mean(front)), (max(front) - min(front)) / (len(front) - 1)
    elif floor is not None and floor < dense:
        share, step = floor, dense - floor
    else:
        return max(math.ceil(total * _WITHOUT_FRONT), FEWEST)
    return max(math.ceil(share * (1 - share) / step**2), FEWEST)


def _dominated(highest: float, measured: Mapping[str, Measurement], front: Sequence[Version]) -> str:
    if any(metric not in measured for metric in _OTHERS):
        return ""
    for version in front:
        other = version.measured
        if other["accuracy"].value >= highest and all(other[m].value <= measured[m].value for m in _OTHERS):
            told = percent(other["accuracy"].value)
            return f"where {version.title} reaches {told}, no slower and with no more FLOPs"
    return ""


def _estimate(pair: Paired, answers: Answers, subject: Subject, highest: float) -> Measurement:
    counted = accuracy_of(answers, subject.target, "validation")
    return replace(
        counted,
        value=pair.accuracy,
        statistic="on a subset, ended early",
        spread=pair.spread,
        protocol=f"the dense network's accuracy on {pair.total} validation images, less what is lost on {pair.asked} of"
        f" them ({percent(counted.value)} right); high: the bound at {1 - ERROR:.0%}",
        others={"high": highest},
    )


def saved_seconds(versions: Iterable[Version], total: int) -> float:
    """Returns how long the images that were left out would have taken, as long as those that were asked each."""
    return sum(
        version.evaluation.seconds[SUBSET] * (total / version.measured["accuracy"].n - 1)
        for version in versions
        if version.evaluation.ended
    )
