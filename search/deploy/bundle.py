"""From the front to a folder that runs elsewhere: choose, confirm, write."""

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
from evaluators.inference import frame_reuse, inputs, sessions, staged
from evaluators.latency.evaluator import LEFT, LatencyEvaluator
from evaluators.latency.remeasure import remeasure, write_job
from evaluators.measurement import Measurement, mean_of, scaled
from evaluators.runtimes.remote.connection import worker_file
from search.config.budget import Budget
from search.config.environment import environment
from search.config.study import FinetuneSection
from search.deploy.fresh_timing import Afresh, Again, foremost, untried
from search.pipeline.exit_thresholds import ExitThresholdSolver
from search.pipeline.pipeline import CompressionPipeline
from search.results.evaluation import Evaluation
from search.results.pareto import Version
from search.results.store import StoredSearch
from search.results.violations import broken_limits
from spaces.errors import UserError

ATTEMPTS = 5
"""So many versions are measured afresh before a pick gives up."""
_DOUBTFUL = 0.03
"""A limit that a fresh latency misses by less than this share, or its interval, is timed a second time."""
_CHECK_BYTES = 20_000_000
"""The bundle brings as many test images as fit in this."""
REFERENCE = "reference.onnx"
"""The dense network that a bundle's latency is told beside; it may be left out when the bundle is shipped."""
_SHIPPED = (run_bundle, manifest, staged, inputs, frame_reuse, sessions)
"""The program that runs a bundle; its files keep their names there."""

Say = Callable[[str], None]


class BundleError(UserError):
    """A bundle that cannot be written where it was asked for."""


@dataclass(frozen=True)
class Confirmed:
    """A version, measured again from scratch.

    Args:
        version: as the search measured it.
        subject: rebuilt.
        latency: from a new process.
        speed: how long the machine takes now, as a multiple of what it took when the search began.
        test: its accuracy on the test images.
        dense_test: the dense network's.
        answers: what it said to the test images.
    """

    version: Version
    subject: DeployedCandidate
    latency: Measurement
    speed: float
    test: Measurement
    dense_test: Measurement
    answers: Answers

    @property
    def is_same_artifact(self) -> bool:
        """Whether the rebuilt artifact is, byte for byte, what the search measured."""
        return self.subject.artifact.digest == self.version.evaluation.digest


def check_out(folder: Path) -> None:
    """Checks that a bundle can be written to `folder`: it is new, empty, or an earlier bundle.

    Raises:
        BundleError: it holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise BundleError(f"a bundle is a folder, got the file {folder}; give another --out")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / manifest.FILE).is_file():
        raise BundleError(f"a bundle goes into a new, an empty or an earlier bundle's folder, got {folder}")


def measure_afresh(
    pipeline: CompressionPipeline,
    search: StoredSearch,
    versions: Sequence[Version],
    budget: Budget,
    prefer: str,
    say: Say,
) -> Afresh:
    """Returns which of the versions comes first by a preference once those that do are timed again, in a new process.

    Args:
        pipeline: builds them.
        search: that measured them.
        versions: to choose from.
        budget: to keep.
        prefer: one of `PREFERENCES`.
        say: told about each that is not taken.
    """
    dense, tried = search.baseline.evaluation.measurements, list[Again]()
    evaluator = pipeline.references.latency_evaluator(search.baseline.reference_seconds)
    # One that was recovered since the search may break a limit as it is: it is timed, so that all can be told.
    first: Version | None = foremost(versions, tried, prefer, budget, dense) or versions[0]
    while first is not None and len(tried) < ATTEMPTS:
        again = _timed_again(pipeline, search, first, evaluator, budget)
        tried.append(again)
        first = foremost(versions, tried, prefer, budget, dense)
        if first is not None and first.number in {each.version.number for each in tried}:
            break
        why = broken_limits(again.renewed, budget, dense) or "another version is better now"
        say(f"{again.version.title} measured again: {why}")
    best = foremost([each.version for each in tried], tried, prefer, budget, dense)
    taken = next((each for each in tried if best is not None and each.version.number == best.number), None)
    return Afresh(tuple(tried), taken, untried(versions, tried))


def _timed_again(
    pipeline: CompressionPipeline, search: StoredSearch, version: Version, evaluator: LatencyEvaluator, budget: Budget
) -> Again:
    """Returns a version's fresh latency; where that breaks a limit by no more than chance, the mean of two timings."""
    subject, dense = _rebuilt(pipeline, search, version), search.baseline.evaluation.measurements
    with tempfile.TemporaryDirectory() as folder:
        write_job(Path(folder), subject, evaluator)
        one = remeasure(Path(folder))
        again = Again(version, one.latency, one.speed)
        doubt = max(one.latency.notes["half_width"], _DOUBTFUL)
        luckier = replace(again, latency=scaled(one.latency, 1 - doubt))
        if budget.is_met(again.renewed.measured, dense) or not budget.is_met(luckier.renewed.measured, dense):
            return again
        two = remeasure(Path(folder))
    return Again(version, mean_of(one.latency, two.latency), two.speed, 2)


def _rebuilt(pipeline: CompressionPipeline, search: StoredSearch, version: Version) -> DeployedCandidate:
    given = search.baseline.given_precision(version)
    if given:
        return pipeline.given.subject(given)
    return pipeline.deployed(version.evaluation.candidate, _finetuned(version.evaluation))


def confirm(pipeline: CompressionPipeline, search: StoredSearch, again: Again) -> Confirmed:
    """Returns a version that was timed again, with what it says to the test images: they are used for this one only."""
    subject = _rebuilt(pipeline, search, again.version)
    answers = subject.answers_to(pipeline.data.test)
    dense_answers = pipeline.deployed(pipeline.space.dense()).answers_to(pipeline.data.test)
    return Confirmed(
        version=again.version,
        subject=subject,
        latency=again.latency,
        speed=again.speed,
        test=accuracy_of(answers, pipeline.target, "test"),
        dense_test=accuracy_of(dense_answers, pipeline.target, "test"),
        answers=answers,
    )


def recover_more(
    pipeline: CompressionPipeline, search: StoredSearch, version: Version, more: FinetuneSection
) -> Version:
    """Returns a version with further fine-tuning, measured again; see `Compressor.may_recover`.

    Raises:
        BundleError: the version has all of its channels and weights, so there is nothing to win back.
        DivergedError: the loss is not finite for the second time.
    """
    candidate = version.evaluation.candidate
    if not pipeline.compressor.may_recover(candidate):
        raise BundleError(f"--finetune recovers a pruned version, got {version.title}, which lacks nothing")
    latency = pipeline.references.latency_evaluator(search.baseline.reference_seconds)
    solver = ExitThresholdSolver(pipeline, latency, search.baseline.evaluation.measurements)
    return Version(version.number, solver.evaluate(solver.resolve_again(candidate, more), (), more))


def _finetuned(evaluation: Evaluation) -> FinetuneSection | None:
    return FinetuneSection.model_validate(evaluation.finetune) if evaluation.finetune else None


def count_pick(search: StoredSearch, confirmed: Confirmed) -> int:
    """Returns how many different versions of this search have seen the test images, this one included."""
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
    """Writes the bundle, replacing an earlier one only when the new one is whole and answers as measured.

    Raises:
        BundleError: the folder cannot be written, or the bundle does not answer as measured.
    """
    check_out(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
            made = Path(folder) / "bundle"
            made.mkdir()
            _write_files(made, pipeline, search, budget, confirmed)
            _run_once(made)
            if out.exists():
                shutil.rmtree(out)
            made.rename(out)
    except OSError as error:
        raise BundleError(f"a bundle goes into a writable folder, got {out}: {error.strerror}") from error


def _write_files(
    folder: Path, pipeline: CompressionPipeline, search: StoredSearch, budget: Budget, confirmed: Confirmed
) -> None:
    artifact, evaluation = confirmed.subject.artifact, confirmed.version.evaluation
    evaluator = pipeline.references.latency_evaluator(search.baseline.reference_seconds)
    precision = evaluator.majority(confirmed.subject)
    reference = evaluator.references[precision]
    names = ["model.onnx"] if len(artifact.stages) == 1 else [f"stage{i + 1}.onnx" for i in range(len(artifact.stages))]
    for name, stage in zip(names, artifact.deployed, strict=True):
        (folder / name).write_bytes(stage)
    if artifact.stages != artifact.deployed:
        # Other runtimes, TensorRT above all, read the symmetric s8 form only.
        (folder / "portable").mkdir()
        for name, stage in zip(names, artifact.stages, strict=True):
            (folder / "portable" / name).write_bytes(stage)
    test = pipeline.data.test
    images = test.head(max(min(len(test), _CHECK_BYTES * len(test) // bytes_of(test.images)), 1))
    np.savez_compressed(folder / "check.npz", images=images.images[:], labels=images.labels)
    extras = pipeline.runtime.extras(artifact.deployed, pipeline.data.calibration.images[: pipeline.target.batch])
    for name, content in extras.items():
        (folder / name).write_bytes(content)
    if extras:
        (folder / "runtime.pyz").write_bytes(worker_file())
    # The portable form, which a board's runtime can read as well as this one's.
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
        classes=pipeline.data.classes,
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


def _run_once(folder: Path) -> None:
    """Lets the bundle check itself, as its user would; no compiled modules are left in it."""
    done = subprocess.run(
        [sys.executable, "-I", "-B", str(folder / "run.py")], capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stdout + done.stderr).strip().splitlines()[-1:] or ["no output"]
        raise BundleError(f"a bundle answers its check images as measured, got: {last[0]}")
