"""Measuring a bundle again, on this machine or on a board: no study, no torch, no search."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluators.data import LabelledImages
from evaluators.frames import Reuse, Stream, timed_frames
from evaluators.latency import slower_launch
from evaluators.runtimes.staged import from_json
from evaluators.subject import Answers, ask
from evaluators.target import Opened, Runtime, runtime
from evaluators.timing import Floats, Protocol, weighted_percentile
from spaces.errors import UserError

CALLS = 200
"""So many batches are timed, shared out among the ways in which a batch can shrink."""
_WARMUPS = 10


@dataclass(frozen=True)
class Found:
    """What a bundle does here.

    Args:
        target: what ran it.
        latency_s: seconds per batch by the clock: the median, or with exits or frames the mean over its check images.
        percentiles: p90, p95 and p99 of the same.
        calls: how many batches were timed.
        correct: right answers to the check images.
        images: how many check images there are.
        expected: right answers when the bundle was made.
        launches: median seconds of each way to launch a batch, the deployed one first; empty with one way only.
        remarks: what is worth knowing about it.
    """

    target: str
    latency_s: float
    percentiles: dict[str, float]
    calls: int
    correct: int
    images: int
    expected: int
    launches: dict[str, float]
    remarks: list[str]


def measure_bundle(folder: Path, target: str | None) -> Found:
    """Returns a bundle's latency and accuracy.

    Args:
        folder: the bundle.
        target: a runtime or a board; the one that the bundle was made for where not given.

    Raises:
        UserError: the folder holds no bundle.
        TargetError: the target is not here.
    """
    description = _read(folder)
    batch, threads = description["target"]["batch"], description["target"]["threads"]
    library = runtime(target or description["target"]["runtime"])
    stages = [library.deployable(_portable(folder, name)) for name in description["deployed"]]
    blocks, plan = len(description.get("blocks", [])), description.get("steps") or description["thresholds"]
    if blocks and not library.capabilities().skips:
        raise UserError(f"a bundle that skips blocks is measured where blocks can be skipped, got {library.name}")
    opened = library.open(stages, from_json(plan), threads, description.get("confidence", "softmax"))
    reuse = Reuse(**description["frames"]) if "frames" in description else None
    check = _check(folder, reuse)
    answers = ask(opened, len(description["exits"]) + 1, check, batch, reuse, blocks)
    if reuse is None:
        seconds, weights = _time(opened, answers, check, batch)
    else:
        seconds, weights = _time_frames(opened, answers, check, reuse)
    launches = opened.launches(check.images[:batch])
    return Found(
        target=f"{library.version()} on {library.device()}, batch {batch}",
        latency_s=_typical(seconds, weights, dynamic=len(stages) > 1 or reuse is not None),
        percentiles={f"p{percent}": weighted_percentile(seconds, weights, percent) for percent in (90, 95, 99)},
        calls=len(seconds),
        correct=int(answers.correct.sum()),
        images=len(check),
        expected=description["check"]["correct"],
        launches=launches,
        remarks=[*slower_launch(launches), *_remarks(library)],
    )


def _remarks(library: Runtime) -> list[str]:
    return [*library.remarks(), "by the clock, not beside a reference: compare only what was measured in one go"]


def _read(folder: Path) -> dict[str, Any]:
    file = folder / "bundle.json"
    if not file.is_file():
        raise UserError(f"a bundle is a folder that `pick` wrote, got {folder}, which has no bundle.json")
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        needed = [*found["deployed"], "check.npz"]
    except (ValueError, KeyError) as error:
        raise UserError(f"a bundle.json is what `pick` wrote, got {file}: {error}; pick again") from error
    lacking = [name for name in needed if not (folder / name).is_file()]
    if lacking:
        raise UserError(f"a bundle is whole, got {folder} without {', '.join(lacking)}; copy all of it, or pick again")
    return found


def _portable(folder: Path, name: str) -> bytes:
    portable = folder / "portable" / name
    return (portable if portable.is_file() else folder / name).read_bytes()


def _check(folder: Path, reuse: Reuse | None) -> LabelledImages:
    with np.load(folder / "check.npz") as stored:
        images, labels = stored["images"], stored["labels"]
    return LabelledImages(images, labels) if reuse is None else Stream(images, labels, np.zeros(1, dtype=np.int64))


def _time_frames(opened: Opened, answers: Answers, check: LabelledImages, reuse: Reuse) -> tuple[Floats, Floats]:
    """Returns wall-clock seconds and the weight of each: every kind of frame as often as it occurs."""
    assert answers.answering is not None
    differ = answers.stages > 1 or answers.passed.shape[1] > 0
    batches, counts = timed_frames(answers.answering, answers.profiles, reuse, differ)
    each = max(CALLS // len(batches), 5)
    take_turn = opened.turns(check.images, batches, opened, 1, Protocol())
    walls = np.array([take_turn(index % 2 == 0).walls for index in range(each)])  # (turns, kinds, calls)
    turns, _, calls = walls.shape
    weights = np.broadcast_to(np.array(counts)[None, :, None] / (turns * calls), walls.shape)
    counted = weights.ravel() > 0  # the longest path is timed beside
    return walls.ravel()[counted], weights.ravel()[counted]


def _time(opened: Opened, answers: Answers, check: LabelledImages, batch: int) -> tuple[Floats, Floats]:
    """Returns wall-clock seconds and the weight of each: every way in which a batch shrinks as often as it occurs."""
    opened.seconds(check.images[:batch], _WARMUPS)
    seconds, weights = [], []
    each = max(CALLS // len(answers.profiles), 5)
    for start, count in answers.profiles:
        taken = opened.seconds(check.images[start : start + batch], each + 1)[1:]
        seconds += [spent.wall for spent in taken]
        weights += [count / len(taken)] * len(taken)
    return np.array(seconds), np.array(weights)


def _typical(seconds: Floats, weights: Floats, dynamic: bool) -> float:
    return float(np.average(seconds, weights=weights)) if dynamic else float(np.median(seconds))
