"""Measures a bundle again as `pick` did, on this machine or a board, without study, search or torch."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast
from zipfile import BadZipFile

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
from evaluators.runtimes.registry import runtime as open_runtime
from evaluators.streams import Stream
from search.deploy.folders import check_bundle
from spaces.candidate import Candidate
from spaces.errors import UserError

_SLOWER = 0.1
"""A change of the machine's speed by more than this share is reported."""


@dataclass(frozen=True)
class BundleMeasurement:
    """Latency and accuracy of a bundle on a target.

    Args:
        target: runtime, device and batch size, as text.
        latency_s: seconds per batch: the median, or with exits, gates or frames the expected value.
        percentiles: p90, p95 and p99 of the same.
        calls: number of timed batches.
        protocol: how it was timed.
        correct: number of correct predictions for the check images.
        images: number of check images.
        expected: number of correct predictions when the bundle was made.
        launches: median seconds of each launch mode, the deployed one first; empty with one mode only.
        remarks: for the user.
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
class _TimedReference:
    """The network that a bundle is timed timed.

    Args:
        precision: of the network.
        reference: the network and its seconds per batch.
        remarks: if these are not the seconds that `pick` noted.
    """

    precision: str
    reference: Reference
    remarks: tuple[str, ...] = ()


def measure_bundle(folder: Path, target: str | None) -> BundleMeasurement:
    """Returns a bundle's latency, scaled to the machine speed at the time of `pick`, and its accuracy.

    Args:
        folder: the bundle.
        target: a runtime or a board; by default the one that the bundle was made for.

    Raises:
        UserError: the folder is no bundle.
        TargetError: the target is not available.
    """
    manifest = _read(folder)
    runtime = open_runtime(target or manifest.target.runtime)
    if manifest.blocks and not runtime.capabilities().skips:
        raise UserError(f"a bundle that skips blocks is measured where blocks can be skipped, got {runtime.name}")
    loaded = _load(folder, manifest, runtime)
    timed = _reference(folder, manifest, runtime, loaded)
    evaluator = LatencyEvaluator({timed.precision: timed.reference}, runtime, loaded.target)
    latency = evaluator.measure(loaded, manifest.leaving)
    return BundleMeasurement(
        target=f"{runtime.version()} on {runtime.device()}, batch {loaded.target.batch}",
        latency_s=latency.value,
        percentiles={name: latency.others[name] for name in ("p90", "p95", "p99")},
        calls=latency.n,
        protocol=latency.protocol,
        correct=int(loaded.answers.correct.sum()),
        images=len(loaded.validation),
        expected=manifest.check.correct,
        launches={name.removeprefix("seconds "): value for name, value in latency.notes.items() if "seconds " in name},
        remarks=[*latency.remarks, *timed.remarks, *_speed_remarks(latency), *runtime.remarks()],
    )


def _load(folder: Path, manifest: Manifest, runtime: Runtime) -> LoadedArtifact:
    """Returns a bundle as an artifact for evaluators; it is scored on its check images."""
    target = replace(_target(manifest), runtime=runtime.name, device=runtime.device())
    portable = [file.read_bytes() for file in manifest.portable_files(folder)]
    if target == _target(manifest):  # what lies in the bundle is measured, not what could be made anew
        deployed = tuple((folder / name).read_bytes() for name in manifest.deployed)
    else:
        deployed = deployed_stages(runtime, portable, bool(manifest.blocks))
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
        input_size=manifest.input_size,
    )
    # With a single reference the precisions of the candidate's layers are not needed.
    loaded = LoadedArtifact(Candidate({}, {}), artifact, _check(folder, reuse), runtime, target)
    try:
        _ = loaded.session
    except UserError:
        raise
    except Exception as error:  # a runtime's own, of any kind
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"a bundle's files load on {runtime.name}, got {reason}; copy all of it, or pick again"
        ) from error
    return loaded


def _reference(folder: Path, manifest: Manifest, runtime: Runtime, loaded: LoadedArtifact) -> _TimedReference:
    """Returns the bundle's reference with the seconds that `pick` noted; on another target it is timed now.

    Without a reference in the bundle its own first file serves as one.
    """
    stored = manifest.reference
    if stored is None or not (folder / stored.file).is_file():
        model = loaded.artifact.deployed[0]
        remark = "the bundle brings no reference: told by this machine's own clock now, so compare only figures of now"
        reference = Reference(model, _time_reference(model, runtime, loaded), "its own first file")
        return _TimedReference("fp32", reference, (remark,))
    model = runtime.deployable((folder / stored.file).read_bytes())
    if loaded.target == _target(manifest):
        return _TimedReference(stored.precision, Reference(model, stored.seconds))
    remark = f"picked for {_target(manifest)}: told by this target's own clock now"
    return _TimedReference(stored.precision, Reference(model, _time_reference(model, runtime, loaded)), (remark,))


def _time_reference(model: bytes, runtime: Runtime, loaded: LoadedArtifact) -> float:
    """Returns the median seconds of work that a reference takes for its batch."""
    images = loaded.validation.images[: reference_batch(loaded.target.batch)]
    return median_seconds({"reference": runtime.open([model], [], loaded.target.threads)}, images)["reference"].work


def _speed_remarks(latency: Measurement) -> list[str]:
    drift = latency.notes["drift"]
    if abs(drift - 1) <= _SLOWER:
        return []
    return [
        f"this machine now takes {drift:.2f} times as long as when the search began; by the clock a batch takes"
        f" {latency.notes['wall_median'] * 1e3:.3f} ms"
    ]


def _read(folder: Path) -> Manifest:
    check_bundle(folder)
    try:
        manifest = Manifest.read(folder)
    except ValueError as error:
        raise UserError(f"a {FILE} is what `pick` wrote, got {folder / FILE}: {error}") from error
    exits = len(manifest.exits)
    if not manifest.steps and not (len(manifest.thresholds) == exits == len(manifest.deployed) - 1):
        raise UserError(
            f"a {FILE} has a threshold and a file for each exit, and a last file, got {len(manifest.thresholds)}"
            f" thresholds, {exits} exits and {len(manifest.deployed)} files; copy the bundle again, or pick again"
        )
    missing = [name for name in (*manifest.deployed, "check.npz") if not (folder / name).is_file()]
    if missing:
        raise UserError(f"a bundle is whole, got {folder} without {', '.join(missing)}; copy all of it, or pick again")
    return manifest


def _target(manifest: Manifest) -> Target:
    """Returns the target that the bundle was made for."""
    made_for = manifest.target
    fp32_in = cast(Fp32In, made_for.fp32_in)
    return Target(made_for.runtime, made_for.device, made_for.batch, made_for.threads, fp32_in)


def _check(folder: Path, reuse: Reuse | None) -> LabelledImages:
    try:
        with np.load(folder / "check.npz") as stored:
            images, labels = stored["images"], stored["labels"]
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise UserError(f"check.npz has images and labels, got {error} in {folder}; copy the bundle again") from error
    return LabelledImages(images, labels) if reuse is None else Stream(images, labels, np.zeros(1, dtype=np.int64))
