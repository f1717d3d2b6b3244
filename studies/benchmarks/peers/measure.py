"""The referee: latencies of all versions in one session, by a clock that is not ours, and accuracy on unseen images."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluators.data import LabelledImages
from studies.benchmarks import outside

LATENCIES = (0.12, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6)
"""Shares of the dense network's latency at which contestants are compared."""
_IMAGES = 200
"""So many different images are timed, one batch after the other."""


@dataclass(frozen=True)
class Result:
    """What was found of one version.

    Args:
        contestant: who made it.
        seed: of its making.
        label: what it is.
        batch: that it was timed at.
        latency: as a share of the dense network's.
        low: the lower end of the 95% interval of that.
        high: the upper end.
        accuracy: on images that nobody saw.
        images: how many.
    """

    contestant: str
    seed: int
    label: str
    batch: int
    latency: float
    low: float
    high: float
    accuracy: float
    images: int

    @property
    def error(self) -> float:
        """The accuracy's standard error."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.images)

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready copy."""
        return asdict(self)


@dataclass(frozen=True)
class Made:
    """A version that is to be measured.

    Args:
        contestant: who made it.
        seed: of its making.
        label: what it is.
        file: an ONNX file, or a bundle's folder.
    """

    contestant: str
    seed: int
    label: str
    file: Path


def measured(dense: bytes, versions: Sequence[Made], test: LabelledImages, batch: int) -> list[Result]:
    """Returns what was found of versions, each timed in turn with the dense network and all others."""
    answers: dict[int, outside.Answer] = {-1: outside.answering(dense)}
    answers |= {index: _loaded(version.file) for index, version in enumerate(versions)}
    images = test.images[:_IMAGES]
    calls = {str(index): outside.one_after_the_other(answer, images, batch) for index, answer in answers.items()}
    times = outside.timed(calls, turns=31, at_most_s=300)
    found = []
    for index, version in enumerate(versions):
        time, accuracy = times[str(index)], _accuracy(answers[index], test, batch)
        found.append(
            Result(
                version.contestant,
                version.seed,
                version.label,
                batch,
                time.ratio,
                time.low,
                time.high,
                accuracy,
                len(test),
            )
        )
    return found


def _loaded(file: Path) -> outside.Answer:
    return outside.bundle(file) if file.is_dir() else outside.answering(file.read_bytes())


def _accuracy(answer: outside.Answer, test: LabelledImages, batch: int) -> float:
    starts = range(0, len(test), batch)
    found = np.concatenate([answer(test.images[at : at + batch]).argmax(axis=1) for at in starts])
    return float((found == test.labels).mean())


def best_within(results: Iterable[Result], latency: float) -> Result | None:
    """Returns the most accurate version that takes so much at most; None where there is none."""
    within = [result for result in results if result.latency <= latency]
    return max(within, key=lambda result: result.accuracy, default=None)


def by_seed(results: Iterable[Result]) -> dict[int, list[Result]]:
    """Returns results by the seed of their making."""
    found: dict[int, list[Result]] = {}
    for result in results:
        found.setdefault(result.seed, []).append(result)
    return found


def rows(results: Sequence[Result], ours: str) -> list[Sequence[str]]:
    """Returns a row for each latency: the best of each contestant, in % of the images, and how far ours is ahead.

    Of several seeds it is the mean, where every seed has a version; the lead is over the best of the others, in
    standard errors of the difference.
    """
    names = list(dict.fromkeys(result.contestant for result in results))
    table: list[Sequence[str]] = []
    for latency in LATENCIES:
        best = {name: _mean_best([each for each in results if each.contestant == name], latency) for name in names}
        cells = [f"{value[0]:.1%}" if value else "-" for value in best.values()]
        table.append([f"{latency:g}", *cells, _lead(best, ours)])
    return table


def _mean_best(results: Sequence[Result], latency: float) -> tuple[float, float] | None:
    """Returns the mean over seeds of the best accuracy within a latency, and its standard error."""
    bests = [best_within(own, latency) for own in by_seed(results).values()]
    known = [best for best in bests if best is not None]
    if not known or len(known) < len(bests):
        return None
    values = [best.accuracy for best in known]
    chance = np.mean([best.error for best in known])
    spread = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return float(np.mean(values)), float(math.hypot(chance, spread))


def _lead(best: Mapping[str, tuple[float, float] | None], ours: str) -> str:
    own = best.get(ours)
    others = {name: value for name, value in best.items() if name != ours and value}
    if not others:
        return "alone" if own else "-"
    name, (accuracy, error) = max(others.items(), key=lambda item: item[1][0])
    if own is None:
        return f"behind: none within it, {name} has one"
    difference, both = own[0] - accuracy, math.hypot(own[1], error)
    return f"{difference * 100:+.1f} points ({difference / both:+.1f} errors) on {name}"
