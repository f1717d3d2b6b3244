"""Early stopping: ends the evaluation of a version that hardly can keep the budget or join the front."""

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
from evaluators.statistics import PairedAccuracy
from search.config.budget import Budget, Constraint
from search.config.objectives import Objectives, no_worse
from search.config.units import percent
from search.results.pareto import Version, feasible, pareto

ERROR = 0.01
"""Probability, at most, that a version stopped early is more accurate than its upper bound."""
FEWEST = 200
"""Images that are classified at least before an evaluation may stop."""
ENOUGH = 2 * FEWEST
"""With fewer images in all there is no early stopping."""
SUBSET = "subset"
"""The name of the step that classifies some of the images, among the seconds of an evaluation."""
NARROW_MISS = 0.1
"""A limit on latency or FLOPs missed by less than this share, or than its timing's interval, is a narrow miss."""
SOLVED_FOR = ("latency", "flops")
"""The costs that thresholds of exits are solved for."""
_MOST_NARROW = 0.25
"""Share of a limit; a miss by more is not narrow, however wide the interval."""
_WITHOUT_FRONT = 0.25
"""Share of the images that are classified first while there is neither a front nor a limit on accuracy."""


@dataclass(frozen=True)
class Stop:
    """Why an evaluation ends early.

    Args:
        reason: for people.
        estimates: of metrics that were not measured in full, by metric.
    """

    reason: str
    estimates: Mapping[str, Measurement] = field(default_factory=dict)

    @property
    def is_estimated(self) -> bool:
        """Whether there are estimates."""
        return bool(self.estimates)


class EarlyStopping(Protocol):
    """A rule that may end an evaluation early."""

    step: ClassVar[str | None]
    """Name of the step that its seconds are noted under; None if it takes no time."""

    def is_due(self, metric: str, deployed: DeployedCandidate) -> bool:
        """Returns whether the rule is to be checked before `metric` is measured."""
        ...

    def should_stop(self, deployed: DeployedCandidate, measured: Mapping[str, Measurement]) -> Stop | None:
        """Returns why to stop; None to go on.

        Args:
            deployed: the candidate.
            measured: measurements so far, by metric.
        """
        ...


@dataclass(frozen=True)
class LimitsBroken:
    """Ends an evaluation when a limit is broken by more than a narrow miss.

    Narrow misses are measured in full: their accuracy tells a sampler about versions just within the limit.

    Args:
        budget: of the search.
        dense: the dense network's measurements.
    """

    budget: Budget
    dense: Mapping[str, Measurement]
    step: ClassVar[str | None] = None

    def is_due(self, metric: str, deployed: DeployedCandidate) -> bool:  # noqa: ARG002
        """Returns True: limits are checked before every metric."""
        return True

    def should_stop(self, deployed: DeployedCandidate, measured: Mapping[str, Measurement]) -> Stop | None:  # noqa: ARG002
        """Stops if a limit is broken by more than a narrow miss."""
        broken = self.budget.broken(measured, self.dense).items()
        clear = [limit for limit, excess in broken if excess > narrow_miss(limit, measured)]
        return Stop(f"breaks {clear[0]}") if clear else None


def narrow_miss(limit: Constraint, measured: Mapping[str, Measurement]) -> float:
    """Returns the share of a limit up to which missing it is a narrow miss."""
    if limit.measured_as not in SOLVED_FOR:
        return 0.0
    return float(np.clip(measured[limit.measured_as].half_width, NARROW_MISS, _MOST_NARROW))


def shuffled_if_many(images: LabelledImages) -> LabelledImages:
    """Returns the images shuffled if they are enough for early stopping, so that the first ones are representative."""
    return images.mixed() if len(images) >= ENOUGH else images


def max_screened(total: int, batch: int) -> int:
    """Returns how many images are classified before the last decision to stop: half of them, in whole batches.

    It is 0 if there are too few images for early stopping.
    """
    count = batch * math.ceil(total / 2 / batch)
    return count if total >= ENOUGH and count < total else 0


class AccuracyScreen:
    """Decides after some of the scored images whether the others are worth classifying.

    The number is chosen so that the standard error of an accuracy equals the mean distance between neighbours on the
    front. An evaluation ends if even the upper bound of its accuracy breaks a limit, or if a version that was measured
    in full is as accurate as that bound and costs no more by any objective.

    Args:
        budget: of the search.
        dense: the dense network's measurements.
        dense_correct: whether the dense network classifies each of the first images correctly, `(max_screened,)`.
        versions: measured so far, by key; the search adds to it.
        total: number of scored images.
        batch: deployed batch size; a subset consists of whole batches.
        objectives: of the search.
        recoverable: accuracy, as a share, that full recovery after the search may add.
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
        objectives: Objectives,
        recoverable: float = 0.0,
    ) -> None:
        self._budget = budget
        self._dense = dense
        self._dense_correct = dense_correct
        self._versions = versions
        self._total = total
        self._batch = batch
        self._objectives = objectives
        self._floor = budget.accuracy_floor(dense)
        self._recoverable = recoverable

    def is_due(self, metric: str, deployed: DeployedCandidate) -> bool:
        """Returns whether `metric` is the first one that needs all images classified.

        That is FLOPs for dynamic networks, whose costs depend on the paths of the images, else accuracy.
        """
        return metric == ("flops" if deployed.artifact.is_dynamic else "accuracy")

    def should_stop(self, deployed: DeployedCandidate, measured: Mapping[str, Measurement]) -> Stop | None:
        """Returns why to stop, with an estimate of the accuracy; None to go on.

        Args:
            deployed: classifies the first images; their predictions are kept for the whole set.
            measured: measurements so far; without every cost among the objectives only a limit on accuracy can stop it.
        """
        front = pareto(feasible(list(self._versions.values()), self._budget, self._dense), self._objectives)
        answers = deployed.first_answers(self.images(front))
        pair = PairedAccuracy.of(answers.correct, self._dense_correct, self._dense["accuracy"].value, self._total)
        highest = pair.upper_bound(ERROR)
        reason = self._limit_broken(highest) or _dominated(highest, measured, front, self._objectives)
        if not reason:
            return None
        bound = f"at most {percent(highest)} accurate ({1 - ERROR:.0%}) by {pair.sampled} of {self._total} images"
        return Stop(f"{bound}, {reason}", {"accuracy": _estimate(pair, answers, deployed, highest)})

    def images(self, front: Sequence[Version]) -> int:
        """Returns how many images to classify first, in whole batches, given the front so far."""
        count = subset_size(
            [version.measured["accuracy"].value for version in front],
            self._total,
            self._dense["accuracy"].value,
            self._floor,
        )
        return min(self._batch * math.ceil(count / self._batch), len(self._dense_correct))

    def _limit_broken(self, highest: float) -> str:
        if self._floor is None or highest >= self._floor - self._recoverable:
            return ""
        before = f", or {percent(self._floor - self._recoverable)} before it is recovered in full"
        limit = max(self._budget.on("accuracy"), key=lambda limit: limit.floor(self._dense["accuracy"]))
        return f"where {limit} asks for {percent(self._floor)}{before if self._recoverable else ''}"


def subset_size(front: Sequence[float], total: int, dense: float, floor: float | None) -> int:
    """Returns how many images give an accuracy a standard error of the distance between versions of the front.

    Args:
        front: accuracies of its versions.
        total: number of images.
        dense: the dense network's accuracy.
        floor: the lowest accuracy within the budget; None without a limit.
    """
    if len(front) > 1 and max(front) > min(front):
        share, step = float(np.mean(front)), (max(front) - min(front)) / (len(front) - 1)
    elif floor is not None and floor < dense:
        share, step = floor, dense - floor
    else:
        return max(math.ceil(total * _WITHOUT_FRONT), FEWEST)
    return max(math.ceil(share * (1 - share) / step**2), FEWEST)


def _dominated(
    highest: float, measured: Mapping[str, Measurement], front: Sequence[Version], objectives: Objectives
) -> str:
    costs = [metric for metric in objectives if metric != "accuracy"]
    if any(metric not in measured for metric in costs):
        return ""
    for version in front:
        other = version.measured
        if other["accuracy"].value >= highest and all(other[m].value <= measured[m].value for m in costs):
            accuracy = percent(other["accuracy"].value)
            return f"where {version.title} reaches {accuracy}, {no_worse(objectives)}"
    return ""


def _estimate(pair: PairedAccuracy, answers: Answers, deployed: DeployedCandidate, highest: float) -> Measurement:
    counted = accuracy_of(answers, deployed.target, "validation")
    return replace(
        counted,
        value=pair.accuracy,
        statistic="on a subset, ended early",
        spread=pair.spread,
        protocol=f"the dense network's accuracy on {pair.total} validation images, less what is lost on {pair.sampled}"
        f" of them ({percent(counted.value)} right); high: the bound at {1 - ERROR:.0%}",
        others={"high": highest},
    )


def saved_seconds(versions: Iterable[Version], total: int) -> float:
    """Returns the seconds that early stopping saved, extrapolated from the images that were classified."""
    return sum(
        version.evaluation.seconds[SUBSET] * (total / version.measured["accuracy"].n - 1)
        for version in versions
        if version.evaluation.ended
    )
