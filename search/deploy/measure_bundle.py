"""Measuring a bundle again as `pick` measured it, on this machine or on a board: no study, no torch, no search."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluators.artifact import Artifact
from evaluators.data import LabelledImages
from evaluators.deployed import Deployed
from evaluators.inference.frame_reuse import Reuse
from evaluators.inference.staged import Step, from_json
from evaluators.latency.evaluator import LatencyEvaluator, Reference, median_seconds, reference_batch
from evaluators.measurement import Measurement
from evaluators.runtimes.base import Runtime, Target, deployed_stages
from evaluators.runtimes.registry import runtime
from evaluators.streams import Stream
from spaces.candidate import Candidate
from spaces.errors import UserError

_SLOWER = 0.1
"""A machine whose speed has changed by this share is worth a remark."""


@dataclass(frozen=True)
class Found:
    """What a bundle does here.

    Args:
        target: what ran it.
        latency_s: seconds per batch as `pick` tells them: the median, or with exits, gates or frames the expected ones.
        percentiles: p90, p95 and p99 of the same.
        calls: how many batches were timed.
        protocol: how, by which clock, and beside what.
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
    protocol: str
    correct: int
    images: int
    expected: int
    launches: dict[str, float]
    remarks: list[str]


@dataclass(frozen=True)
class _Beside:
    """What a bundle is timed beside.

    Args:
        precision: of it.
        reference: the network, and how long a batch takes it.
        remarks: where that was not told by `pick`.
    """

    precision: str
    reference: Reference
    remarks: tuple[str, ...] = ()


def measure_bundle(folder: Path, target: str | None) -> Found:
    """Returns a bundle's latency and accuracy, by the clock and at the speed of the machine that `pick` told them at.

    Args:
        folder: the bundle.
        target: a runtime or a board; the one that the bundle was made for where not given.

    Raises:
        UserError: the folder holds no bundle.
        TargetError: the target is not here.
    """
    description = _read(folder)
    library = runtime(target or description["target"]["runtime"])
    if description.get("blocks") and not library.capabilities().skips:
        raise UserError(f"a bundle that skips blocks is measured where blocks can be skipped, got {library.name}")
    subject = _subject(folder, description, library)
    beside = _beside(folder, description, library, subject)
    evaluator = LatencyEvaluator({beside.precision: beside.reference}, library, subject.target)
    latency = evaluator.measure(subject, description.get("leaving", ()))
    return Found(
        target=f"{library.version()} on {library.device()}, batch {subject.target.batch}",
        latency_s=latency.value,
        percentiles={name: latency.others[name] for name in ("p90", "p95", "p99")},
        calls=latency.n,
        protocol=latency.protocol,
        correct=int(subject.answers.correct.sum()),
        images=len(subject.validation),
        expected=description["check"]["correct"],
        launches={name.removeprefix("seconds "): value for name, value in latency.notes.items() if "seconds " in name},
        remarks=[*latency.remarks, *beside.remarks, *_speed(latency), *library.remarks()],
    )


def _subject(folder: Path, description: dict[str, Any], library: Runtime) -> Deployed:
    """Returns a bundle as evaluators look at it: the check images are what it is scored on."""
    target = Target(**{**description["target"], "runtime": library.name, "device": library.device()})
    portable = [_portable(folder, name) for name in description["deployed"]]
    deployed = deployed_stages(library, portable, bool(description.get("blocks")))
    reuse = Reuse(**description["frames"]) if "frames" in description else None
    artifact = Artifact(
        tuple(portable),
        deployed,
        tuple(description["exits"]),
        tuple(description["thresholds"]),
        confidence=description.get("confidence", "softmax"),
        reuse=reuse,
        blocks=tuple(description.get("blocks", ())),
        steps=tuple(step for step in from_json(description.get("steps", ())) if isinstance(step, Step)),
    )
    # There is one reference, so nobody asks which precision most layers have.
    return Deployed(Candidate({}, {}, {}), artifact, _check(folder, reuse), library, target)


def _beside(folder: Path, description: dict[str, Any], library: Runtime, subject: Deployed) -> _Beside:
    """Returns the reference that `pick` told the latency by; elsewhere, or without one, this machine's own clock."""
    told = description.get("reference")
    file = folder / (told["file"] if told else "")
    if told is None or not file.is_file():
        model = subject.artifact.deployed[0]
        remark = "the bundle brings no reference: told by this machine's own clock now, so compare only figures of now"
        reference = Reference(model, _now(model, library, subject), "its own first file")
        return _Beside("fp32", reference, (remark,))
    model = library.deployable(file.read_bytes())
    if subject.target == Target(**description["target"]):
        return _Beside(told["precision"], Reference(model, told["seconds"]))
    remark = f"picked for {Target(**description['target'])}: told by this target's own clock now"
    return _Beside(told["precision"], Reference(model, _now(model, library, subject)), (remark,))


def _now(model: bytes, library: Runtime, subject: Deployed) -> float:
    """Returns what a reference takes for its batch, in seconds of work."""
    images = subject.validation.images[: reference_batch(subject.target.batch)]
    return median_seconds({"it": library.open([model], [], subject.target.threads)}, images)["it"].work


def _speed(latency: Measurement) -> list[str]:
    drift = latency.notes["drift"]
    if abs(drift - 1) <= _SLOWER:
        return []
    return [
        f"this machine now takes {drift:.2f} times as long as when the search began; by the clock a batch takes"
        f" {latency.notes['wall_median'] * 1e3:.3f} ms"
    ]


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
