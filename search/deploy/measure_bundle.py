"""Measuring a bundle again as `pick` measured it, on this machine or on a board: no study, no torch, no search."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np

from evaluators.artifact import Artifact
from evaluators.bundle.manifest import FILE, Manifest
from evaluators.data import LabelledImages
from evaluators.deployed import LoadedArtifact
from evaluators.inference.frame_reuse import Reuse
from evaluators.inference.staged import Step, from_json
from evaluators.latency.evaluator import LatencyEvaluator, Reference, median_seconds, reference_batch
from evaluators.measurement import Measurement
from evaluators.runtimes.base import Fp32In, Runtime, Target, deployed_stages
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
    manifest = _read(folder)
    library = runtime(target or manifest.target.runtime)
    if manifest.blocks and not library.capabilities().skips:
        raise UserError(f"a bundle that skips blocks is measured where blocks can be skipped, got {library.name}")
    subject = _subject(folder, manifest, library)
    beside = _beside(folder, manifest, library, subject)
    evaluator = LatencyEvaluator({beside.precision: beside.reference}, library, subject.target)
    latency = evaluator.measure(subject, manifest.leaving)
    return Found(
        target=f"{library.version()} on {library.device()}, batch {subject.target.batch}",
        latency_s=latency.value,
        percentiles={name: latency.others[name] for name in ("p90", "p95", "p99")},
        calls=latency.n,
        protocol=latency.protocol,
        correct=int(subject.answers.correct.sum()),
        images=len(subject.validation),
        expected=manifest.check.correct,
        launches={name.removeprefix("seconds "): value for name, value in latency.notes.items() if "seconds " in name},
        remarks=[*latency.remarks, *beside.remarks, *_speed(latency), *library.remarks()],
    )


def _subject(folder: Path, manifest: Manifest, library: Runtime) -> LoadedArtifact:
    """Returns a bundle as evaluators look at it: the check images are what it is scored on."""
    target = replace(_target(manifest), runtime=library.name, device=library.device())
    portable = [file.read_bytes() for file in manifest.portable_files(folder)]
    deployed = deployed_stages(library, portable, bool(manifest.blocks))
    reuse = Reuse(**asdict(manifest.frames)) if manifest.frames else None
    artifact = Artifact(
        tuple(portable),
        deployed,
        manifest.exits,
        manifest.thresholds,
        confidence=manifest.confidence,
        reuse=reuse,
        blocks=manifest.blocks,
        steps=tuple(step for step in from_json(manifest.steps) if isinstance(step, Step)),
    )
    # There is one reference, so nobody asks which precision most layers have.
    return LoadedArtifact(Candidate({}, {}, {}), artifact, _check(folder, reuse), library, target)


def _beside(folder: Path, manifest: Manifest, library: Runtime, subject: LoadedArtifact) -> _Beside:
    """Returns the reference that `pick` told the latency by; elsewhere, or without one, this machine's own clock."""
    told = manifest.reference
    if told is None or not (folder / told.file).is_file():
        model = subject.artifact.deployed[0]
        remark = "the bundle brings no reference: told by this machine's own clock now, so compare only figures of now"
        reference = Reference(model, _now(model, library, subject), "its own first file")
        return _Beside("fp32", reference, (remark,))
    model = library.deployable((folder / told.file).read_bytes())
    if subject.target == _target(manifest):
        return _Beside(told.precision, Reference(model, told.seconds))
    remark = f"picked for {_target(manifest)}: told by this target's own clock now"
    return _Beside(told.precision, Reference(model, _now(model, library, subject)), (remark,))


def _now(model: bytes, library: Runtime, subject: LoadedArtifact) -> float:
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


def _read(folder: Path) -> Manifest:
    if not (folder / FILE).is_file():
        raise UserError(f"a bundle is a folder that `pick` wrote, got {folder}, which has no {FILE}")
    try:
        manifest = Manifest.read(folder)
    except ValueError as error:
        raise UserError(f"a {FILE} is what `pick` wrote, got {folder / FILE}: {error}") from error
    lacking = [name for name in (*manifest.deployed, "check.npz") if not (folder / name).is_file()]
    if lacking:
        raise UserError(f"a bundle is whole, got {folder} without {', '.join(lacking)}; copy all of it, or pick again")
    return manifest


def _target(manifest: Manifest) -> Target:
    """Returns what the bundle was made for."""
    made_for = manifest.target
    fp32_in = cast(Fp32In, made_for.fp32_in)
    return Target(made_for.runtime, made_for.device, made_for.batch, made_for.threads, fp32_in)


def _check(folder: Path, reuse: Reuse | None) -> LabelledImages:
    with np.load(folder / "check.npz") as stored:
        images, labels = stored["images"], stored["labels"]
    return LabelledImages(images, labels) if reuse is None else Stream(images, labels, np.zeros(1, dtype=np.int64))
