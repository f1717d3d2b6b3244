"""Ends the evaluation of a version after some of the images, where the rest would hardly change what comes of it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from evaluators.accuracy import accuracy_of
from evaluators.data import LabelledImages
from evaluators.deployed import Answers, DeployedCandidate
from evaluators.measurement import Measurement
from evaluators.statistics import Paired
from search.config.budget import Budget, Constraint
from search.config.units import percent
from search.pipeline.threshold_problem import half_width
from search.results.pareto import Version, feasible, pareto

ERROR = 0.01
"""So often, at most, is a version more accurate on all images than the bound that it was ended by."""
FEWEST = 200
"""So many images are asked at least."""
ENOUGH = 2 * FEWEST
"""With fewer in all, all of them are asked at once."""
SUBSET = "subset"
"""The step of an evaluation in which some of the images are asked."""
NARROW = 0.1
"""A limit on latency or FLOPs that is missed by less than this share, or its timing's interval, is missed narrowly."""
SOLVED_FOR = ("latency", "flops")
"""What thresholds of exits are solved for."""
_MOST_NARROW = 0.25
"""Of a limit: however wide the interval, more is no narrow miss."""
_WITHOUT_FRONT = 0.25
_OTHERS = ("latency", "flops")


@dataclass(frozen=True)
class Stop:
    """Why an evaluation ends early.

    Args:
        reason: for people.
        estimates: what is known of metrics that would have come later, by metric.
    """

    reason: str
    estimates: Mapping[str, Measurement] = field(default_factory=dict)

    @property
    def is_estimated(self) -> bool:
        """Whether any of what was measured is an estimate."""
        return bool(self.estimates)


class EarlyStopping(Protocol):
    """What may end an evaluation early."""

    step: ClassVar[str | None]
    """Under which name its time is noted; None where it takes none."""

    def is_due(self, metric: str, deployed: DeployedCandidate) -> bool:
        """Returns whether it is asked before a metric is measured."""
        ...

    def should_stop(self, deployed: DeployedCandidate, measured: Mapping[str, Measurement]) -> Stop | None:
        """Returns why the rest is not measured; None where it is.

        Args:
            deployed: the candidate.
            measured: what is known already, by metric.
        """
        ...


@dataclass(frozen=True)
class LimitsBroken:
    """Ends an evaluation where a limit is broken, and not narrowly: the rest of the version need not be measured.

    What a version loses that lies just outside tells a sampler what those just inside would lose.

    Args:
        budget: of the search.
        dense: the dense network's measurements.
    """

    budget: Budget
    dense: Mapping[str, Measurement]
    step: ClassVar[str | None] = None

    def is_due(self, metric: str, deployed: DeployedCandidate) -> bool:  # noqa: ARG002
        """Returns True: limits are looked at before every metric."""
        return True

    def should_stop(self, deployed: DeployedCandidate, measured: Mapping[str, Measurement]) -> Stop | None:  # noqa: ARG002
        """Returns the limit that is broken by more than a narrow miss."""
        broken = violations(self.budget, measured, self.dense).items()
        far = [limit for limit, by in broken if by > narrow(limit, measured)]
        return Stop(f"breaks {far[0]}") if far else None


def violations(
    budget: Budget, measured: Mapping[str, Measurement], dense: Mapping[str, Measurement]
) -> dict[Constraint, float]:
    """Returns the limits that are broken, as far as was measured, and by which share of them."""
    known = [limit for limit in budget.constraints if limit.measured_as in measured]
    over = {limit: limit.violation(measured[limit.measured_as], dense[limit.measured_as]) for limit in known}
    return {limit: by for limit, by in over.items() if by > 0}


def narrow(limit: Constraint, measured: Mapping[str, Measurement]) -> float:
    """Returns the share of a limit by which it may be missed narrowly."""
    if limit.measured_as not in SOLVED_FOR:
        return 0.0
    return float(np.clip(half_width(measured[limit.measured_as]), NARROW, _MOST_NARROW))


def mixed_if_many(images: LabelledImages) -> LabelledImages:
    """Returns images of which the first ones stand for all, where they are enough to be asked in two parts."""
    return images.mixed() if len(images) >= ENOUGH else images


def max_screened(total: int, batch: int) -> int:
    """Returns how many images a screen asks at most, in whole batches: from half of them on little is saved.

    It is 0 where they are asked at once.
    """
    count = batch * math.ceil(total / 2 / batch)
    return count if total >= ENOUGH and count < total else 0


class AccuracyScreen:
    """Decides on the first of the scored images whether the others are asked: the same way whoever proposes.

    It asks as many as tell neighbours of the front apart: so many that the standard error of an accuracy is what they
    differ by. An evaluation ends where even the highest accuracy that is likely breaks a limit, or where a version that
    was measured in full is as accurate as that, no slower, and has no more FLOPs.

    Args:
        budget: of the search.
        dense: the dense network's measurements.
        dense_correct: whether it has the first images right: as many as are asked at most.
        versions: what was measured, by key; grows as the search goes on.
        total: how many images are scored.
        batch: that is deployed; a subset is made of whole ones.
        recoverable: so much accuracy may be won back after the search: a version that lacks less is not hopeless.
    """

    step: ClassVar[str | None] = SUBSET

    def __init__(
        self,
        budget: Budget,
        dense: Mapping[str, Measurement],
        dense_correct: NDArray[np.bool_],
        versions: Mapping[str, Version],
        total: int,
        batch: int,
        recoverable: float = 0.0,
    ) -> None:
        self._budget = budget
        self._dense = dense
        self._dense_correct = dense_correct
        self._versions = versions
        self._total = total
        self._batch = batch
        self._floor = budget.accuracy_floor(dense)
        self._recoverable = recoverable

    def is_due(self, metric: str, deployed: DeployedCandidate) -> bool:
        """Returns whether all images would be asked next.

        Where the path depends on the input, costs follow from answers to all images, so it comes before FLOPs.
        """
        return metric == ("flops" if deployed.artifact.is_dynamic else "accuracy")

    def should_stop(self, deployed: DeployedCandidate, measured: Mapping[str, Measurement]) -> Stop | None:
        """Returns why an evaluation ends here, and the accuracy so far; None where it goes on.

        Args:
            deployed: whose first images are asked; those that are asked later add to them.
            measured: what is known already; without latency and FLOPs only a limit can end it.
        """
        front = pareto(feasible(list(self._versions.values()), self._budget, self._dense))
        answers = deployed.first_answers(self.images(front))
        pair = Paired.of(answers.correct, self._dense_correct, self._dense["accuracy"].value, self._total)
        highest = pair.most_accurate(ERROR)
        why = self._broken(highest) or _dominated(highest, measured, front)
        if not why:
            return None
        bound = f"at most {percent(highest)} accurate ({1 - ERROR:.0%}) by {pair.asked} of {self._total} images"
        return Stop(f"{bound}, {why}", {"accuracy": _estimate(pair, answers, deployed, highest)})

    def images(self, front: Sequence[Version]) -> int:
        """Returns how many images are asked first, in whole batches, where this is the front so far."""
        wanted = subset_size(
            [version.measured["accuracy"].value for version in front],
            self._total,
            self._dense["accuracy"].value,
            self._floor,
        )
        return min(self._batch * math.ceil(wanted / self._batch), len(self._dense_correct))

    def _broken(self, highest: float) -> str:
        if self._floor is None or highest >= self._floor - self._recoverable:
            return ""
        before = f", or {percent(self._floor - self._recoverable)} before it is recovered in full"
        limit = max(self._budget.on("accuracy"), key=lambda limit: limit.floor(self._dense["accuracy"]))
        return f"where {limit} asks for {percent(self._floor)}{before if self._recoverable else ''}"


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


def _estimate(pair: Paired, answers: Answers, subject: DeployedCandidate, highest: float) -> Measurement:
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
