"""From the front to a bundle that runs elsewhere: time again, confirm, write."""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from evaluators.accuracy import accuracy_of
from evaluators.bundle import manifest
from evaluators.bundle import run as run_bundle
from evaluators.bundle.manifest import Check, DenseReference, DeploymentTarget, Frames, Manifest
from evaluators.data import bytes_of
from evaluators.deployed import Answers, DeployedCandidate
from evaluators.inference import frame_reuse, inputs, resizing, sessions, staged
from evaluators.latency.evaluator import LEFT, LatencyEvaluator
from evaluators.latency.remeasure import remeasure, write_job
from evaluators.measurement import Measurement, mean_of, scaled
from evaluators.runtimes.remote.connection import worker_file
from search.config.budget import Budget
from search.config.environment import environment
from search.config.study import FinetuneSection
from search.deploy.folders import BundleError, check_out
from search.deploy.fresh_timing import FreshTiming, FreshTimings, best_version, count_untried
from search.pipeline.exit_thresholds import ExitThresholdSolver
from search.pipeline.pipeline import CompressionPipeline
from search.results.evaluation import Evaluation
from search.results.pareto import Version
from search.results.store import StoredSearch
from search.results.violations import broken_limits

ATTEMPTS = 5
"""Versions that are timed again, at most, before a pick gives up."""
_DOUBTFUL = 0.03
"""A version is timed twice if it misses a limit by less than this share, or less than its interval."""
_CHECK_BYTES = 20_000_000
"""Bytes of test images, at most, that are put into the bundle."""
REFERENCE = "reference.onnx"
"""The dense network that a bundle is timed against; it need not be shipped."""
_SHIPPED = (run_bundle, manifest, staged, inputs, resizing, frame_reuse, sessions)
"""Modules of the program that runs a bundle; they are copied under their own names."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Confirmed:
    """A version, built and measured again.

    Args:
        version: as the search measured it.
        deployed: the version, built again.
        latency: from a new process.
        speed: time that the machine takes now, as a multiple of when the search began.
        test: its accuracy on the test images.
        dense_test: the dense network's accuracy on the test images.
        answers: its predictions for the test images.
    """

    version: Version
    deployed: DeployedCandidate
    latency: Measurement
    speed: float
    test: Measurement
    dense_test: Measurement
    answers: Answers

    @property
    def is_same_artifact(self) -> bool:
        """Whether the rebuilt artifact is, byte for byte, what the search measured."""
        return self.deployed.artifact.digest == self.version.evaluation.digest


def time_again(
    pipeline: CompressionPipeline,
    search: StoredSearch,
    versions: Sequence[Version],
    budget: Budget,
    prefer: str,
    say: Say,
) -> FreshTimings:
    """Times the best version by a preference again, in a new process, until one stays the best; returns all timings.

    Args:
        pipeline: builds the versions.
        search: the search that measured them.
        versions: to choose from.
        budget: to keep.
        prefer: one of `search.config.objectives.PREFERENCES`.
        say: called with a line for each version that is not chosen.
    """
    dense = search.baseline.evaluation.measurements
    tried: list[FreshTiming] = []
    evaluator = pipeline.references.latency_evaluator(search.baseline.reference_seconds)
    # A version that was recovered since may break a limit; it is timed all the same, to report by how much.
    best: Version | None = best_version(versions, tried, prefer, budget, dense, search.objectives) or versions[0]
    while best is not None and len(tried) < ATTEMPTS:
        timing = _time_version(pipeline, search, best, evaluator, budget)
        tried.append(timing)
        best = best_version(versions, tried, prefer, budget, dense, search.objectives)
        if best is not None and best.number in {timing.version.number for timing in tried}:
            break
        reason = broken_limits(timing.updated, budget, dense) or "another version is better now"
        say(f"{timing.version.title} measured again: {reason}")
    best = best_version([timing.version for timing in tried], tried, prefer, budget, dense, search.objectives)
    chosen = next((timing for timing in tried if best is not None and timing.version.number == best.number), None)
    return FreshTimings(tuple(tried), chosen, count_untried(versions, tried))


def _time_version(
    pipeline: CompressionPipeline, search: StoredSearch, version: Version, evaluator: LatencyEvaluator, budget: Budget
) -> FreshTiming:
    """Returns a version's fresh latency: of one timing, or of two if the first breaks a limit within its error."""
    deployed = _rebuilt(pipeline, search, version)
    dense = search.baseline.evaluation.measurements
    with tempfile.TemporaryDirectory() as folder:
        write_job(Path(folder), deployed, evaluator)
        first = remeasure(Path(folder))
        timing = FreshTiming(version, first.latency, first.speed)
        error = max(first.latency.notes["half_width"], _DOUBTFUL)
        lower_bound = replace(timing, latency=scaled(first.latency, 1 - error))
        if budget.is_met(timing.updated.measured, dense) or not budget.is_met(lower_bound.updated.measured, dense):
            return timing
        second = remeasure(Path(folder))
    return FreshTiming(version, mean_of(first.latency, second.latency), second.speed, 2)


def _rebuilt(pipeline: CompressionPipeline, search: StoredSearch, version: Version) -> DeployedCandidate:
    precision = search.baseline.given_precision(version)
    if precision:
        return pipeline.given.deployed(precision)
    return pipeline.deployed(version.evaluation.candidate, _finetuned(version.evaluation))


def confirm(pipeline: CompressionPipeline, search: StoredSearch, timing: FreshTiming) -> Confirmed:
    """Returns a version that was timed again, with its accuracy on the test images, which are used only here."""
    deployed = _rebuilt(pipeline, search, timing.version)
    answers = deployed.answers_to(pipeline.data.test)
    dense_answers = pipeline.deployed(pipeline.space.dense()).answers_to(pipeline.data.test)
    return Confirmed(
        version=timing.version,
        deployed=deployed,
        latency=timing.latency,
        speed=timing.speed,
        test=accuracy_of(answers, pipeline.target, "test"),
        dense_test=accuracy_of(dense_answers, pipeline.target, "test"),
        answers=answers,
    )


def finetune_version(
    pipeline: CompressionPipeline, search: StoredSearch, version: Version, finetune: FinetuneSection
) -> Version:
    """Returns a version with further fine-tuning, measured again; see `Compressor.may_recover`.

    Raises:
        BundleError: the version has all channels and weights, so there is nothing to recover.
        DivergedError: the loss is not finite for the second time.
    """
    candidate = version.evaluation.candidate
    if not pipeline.compressor.may_recover(candidate):
        raise BundleError(f"--finetune recovers a pruned version, got {version.title}, which lacks nothing")
    latency = pipeline.references.latency_evaluator(search.baseline.reference_seconds)
    solver = ExitThresholdSolver(pipeline, latency, search.baseline.evaluation.measurements)
    return Version(version.number, solver.evaluate(solver.resolve_again(candidate, finetune), (), finetune))


def _finetuned(evaluation: Evaluation) -> FinetuneSection | None:
    return FinetuneSection.model_validate(evaluation.finetune) if evaluation.finetune else None


def count_pick(search: StoredSearch, confirmed: Confirmed) -> int:
    """Notes a pick in the search folder; returns how many versions of this search were measured on the test images."""
    file = search.folder.path / "picks.jsonl"
    try:
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(_pick(confirmed)) + "\n")
    except OSError as error:
        raise BundleError(f"a pick is counted in a writable run directory, got {file}: {error.strerror}") from error
    return len({json.loads(line)["trial"] for line in file.read_text(encoding="utf-8").splitlines()})


def _pick(confirmed: Confirmed) -> dict[str, float | str]:
    latency, test = confirmed.latency.value, confirmed.test.value
    return {"trial": confirmed.version.trial, "test_accuracy": test, "latency_s": latency}


def write_bundle(
    out: Path, pipeline: CompressionPipeline, search: StoredSearch, budget: Budget, confirmed: Confirmed
) -> None:
    """Writes the bundle; an earlier one is replaced only once the new one passed its own check.

    Raises:
        BundleError: the folder cannot be written, or the bundle's predictions differ from the measured ones.
    """
    check_out(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
            new = Path(folder) / "bundle"
            new.mkdir()
            _write_files(new, pipeline, search, budget, confirmed)
            _run_check(new)
            if out.exists():
                shutil.rmtree(out)
            new.rename(out)
    except OSError as error:
        raise BundleError(f"a bundle goes into a writable folder, got {out}: {error.strerror}") from error


def _write_files(
    folder: Path, pipeline: CompressionPipeline, search: StoredSearch, budget: Budget, confirmed: Confirmed
) -> None:
    artifact = confirmed.deployed.artifact
    evaluation = confirmed.version.evaluation
    evaluator = pipeline.references.latency_evaluator(search.baseline.reference_seconds)
    precision = evaluator.majority(confirmed.deployed)
    reference = evaluator.references[precision]
    names = ["model.onnx"] if len(artifact.stages) == 1 else [f"stage{i + 1}.onnx" for i in range(len(artifact.stages))]
    for name, stage in zip(names, artifact.deployed, strict=True):
        (folder / name).write_bytes(stage)
    if artifact.stages != artifact.deployed:
        # The portable form, symmetric int8, is the only one that some runtimes read, such as TensorRT.
        (folder / "portable").mkdir()
        for name, stage in zip(names, artifact.stages, strict=True):
            (folder / "portable" / name).write_bytes(stage)
    test = pipeline.data.test
    images = test.head(max(min(len(test), _CHECK_BYTES * len(test) // bytes_of(test.images)), 1))
    np.savez_compressed(folder / "check.npz", images=images.images[:], labels=images.labels)
    batch = pipeline.data.calibration.images[: pipeline.target.batch]
    extras = pipeline.runtime.extras(artifact.deployed, resizing.resized(batch, artifact.input_size))
    for name, content in extras.items():
        (folder / name).write_bytes(content)
    if extras:
        (folder / "runtime.pyz").write_bytes(worker_file())
    # In the portable form, so that the runtime of a board can read it, too.
    (folder / REFERENCE).write_bytes(pipeline.references.artifacts[precision].stages[0])
    preprocessing = pipeline.given.loaded.preprocessing
    Manifest(
        study=search.study.name,
        search=search.folder.name,
        trial=confirmed.version.trial,
        target=DeploymentTarget(**pipeline.target.to_dict()),
        library=pipeline.runtime.version(),
        deployed=tuple(names),
        extras=tuple(sorted(extras)),
        exits=artifact.exits,
        thresholds=artifact.thresholds,
        confidence=artifact.confidence,
        preprocessing=asdict(preprocessing) if preprocessing else None,
        blocks=artifact.blocks,
        steps=tuple(staged.to_json(artifact.steps)),
        image_shape=pipeline.data.image_shape,
        input_size=artifact.input_size,
        classes=pipeline.data.classes,
        class_names=pipeline.data.names,
        frames=Frames(**asdict(artifact.reuse)) if artifact.reuse else None,
        reference=DenseReference(REFERENCE, precision, reference.seconds),
        leaving=tuple(value for name, value in confirmed.latency.notes.items() if name.startswith(LEFT)),
        check=Check(len(images), int(confirmed.answers.correct[: len(images)].sum())),
    ).write(folder)
    contents: dict[str, Any] = {
        "candidate.json": evaluation.candidate.to_dict(),
        "evaluation.json": {
            "budget": str(budget),
            "search": evaluation.to_dict(),
            "confirmed": {
                "latency": confirmed.latency.to_dict(),
                "test_accuracy": confirmed.test.to_dict(),
                "machine_speed": confirmed.speed,
                "same_artifact": confirmed.is_same_artifact,
            },
            "dense": search.baseline.evaluation.to_dict(),
            "dense_test_accuracy": confirmed.dense_test.to_dict(),
        },
        "environment.json": environment(pipeline.runtime.device(), pipeline.runtime.state()),
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(search.folder.path / "study.toml", folder / "study.toml")
    for module in _SHIPPED:
        source = Path(str(module.__file__))
        shutil.copyfile(source, folder / source.name)


def _run_check(folder: Path) -> None:
    """Runs the bundle's own check, as a user would, without leaving compiled modules in it."""
    process = subprocess.run(
        [sys.executable, "-I", "-B", str(folder / "run.py")], capture_output=True, text=True, check=False
    )
    if process.returncode:
        last = (process.stdout + process.stderr).strip().splitlines()[-1:] or ["no output"]
        raise BundleError(f"a bundle answers its check images as measured, got: {last[0]}")
