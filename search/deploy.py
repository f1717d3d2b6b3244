"""From the front to a folder that runs elsewhere: choose, confirm, write."""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluators.accuracy import accuracy_of
from evaluators.data import bytes_of
from evaluators.latency import LEFT
from evaluators.measurement import Measurement
from evaluators.remeasure import remeasure, write_job
from evaluators.runtimes import inputs, reuse, run_bundle, staged
from evaluators.runtimes.ssh import worker_file
from evaluators.subject import Answers, Subject
from search.budget import Budget
from search.environment import environment
from search.evaluation import Evaluation
from search.front import Version
from search.gating import GateSolver
from search.store import StoredSearch
from search.study import FinetuneSection
from search.text import milliseconds
from search.workbench import Workbench
from spaces.errors import UserError

ATTEMPTS = 3
"""So many of the front's versions are measured afresh before a pick gives up."""
_CHECK_BYTES = 20_000_000
"""The bundle brings as many test images as fit in this."""
_MARKER = "bundle.json"
REFERENCE = "reference.onnx"
"""The dense network that a bundle's latency is told beside; it may be left out when the bundle is shipped."""
_SHIPPED = {run_bundle: "run.py", staged: "staged.py", inputs: "inputs.py", reuse: "reuse.py"}
"""The program that runs a bundle, by the name that each of its files has there."""

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
    subject: Subject
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
    if folder.is_dir() and any(folder.iterdir()) and not (folder / _MARKER).is_file():
        raise BundleError(f"a bundle goes into a new, an empty or an earlier bundle's folder, got {folder}")


def confirm(
    bench: Workbench, search: StoredSearch, ranked: Sequence[Version], budget: Budget, say: Say
) -> Confirmed | None:
    """Returns the first of the `ranked` versions whose fresh latency still keeps the budget; None if no one's does.

    The test images are used for that one only.
    """
    evaluator = bench.latency_evaluator(search.baseline.reference_seconds)
    for version in ranked[:ATTEMPTS]:
        subject = bench.subject(version.evaluation.candidate, _finetuned(version.evaluation))
        with tempfile.TemporaryDirectory() as folder:
            write_job(Path(folder), subject, evaluator)
            again = remeasure(Path(folder))
        fresh = {**version.measured, "latency": again.latency}
        if not budget.is_met(fresh, search.baseline.evaluation.measurements):
            say(
                f"trial {version.number}: latency {milliseconds(again.latency.value)} when measured again"
                f" ({milliseconds(version.measured['latency'].value)} in the search) breaks {budget}; trying the next"
            )
            continue
        answers = subject.answers_to(bench.data.test)
        dense_answers = bench.subject(bench.space.dense()).answers_to(bench.data.test)
        return Confirmed(
            version=version,
            subject=subject,
            latency=again.latency,
            speed=again.speed,
            test=accuracy_of(answers, bench.target, "test"),
            dense_test=accuracy_of(dense_answers, bench.target, "test"),
            answers=answers,
        )
    return None


def recover_more(bench: Workbench, search: StoredSearch, version: Version, more: FinetuneSection) -> Version:
    """Returns a version with further fine-tuning, measured again; see `Workbench.may_recover`.

    Raises:
        BundleError: the version has all of its channels and weights, so there is nothing to win back.
        DivergedError: the loss is not finite for the second time.
    """
    candidate = version.evaluation.candidate
    if not bench.may_recover(candidate):
        raise BundleError(f"--finetune recovers a pruned version, got trial {version.number}, which lacks nothing")
    latency = bench.latency_evaluator(search.baseline.reference_seconds)
    settled = GateSolver(bench, latency, search.baseline.evaluation.measurements).resettle(candidate, more)
    evaluation = bench.evaluate(settled.candidate, latency, lambda _measured: False, more)
    return Version(version.number, settled.stamped(evaluation))


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


def _pick(confirmed: Confirmed) -> dict[str, float]:
    latency, test = confirmed.latency.value, confirmed.test.value
    return {"trial": confirmed.version.number, "test_accuracy": test, "latency_s": latency}


def write_bundle(out: Path, bench: Workbench, search: StoredSearch, budget: Budget, confirmed: Confirmed) -> None:
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
            _write_files(made, bench, search, budget, confirmed)
            _run_once(made)
            if out.exists():
                shutil.rmtree(out)
            made.rename(out)
    except OSError as error:
        raise BundleError(f"a bundle goes into a writable folder, got {out}: {error.strerror}") from error


def _write_files(folder: Path, bench: Workbench, search: StoredSearch, budget: Budget, confirmed: Confirmed) -> None:
    artifact, evaluation = confirmed.subject.artifact, confirmed.version.evaluation
    evaluator = bench.latency_evaluator(search.baseline.reference_seconds)
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
    test = bench.data.test
    images = test.head(max(min(len(test), _CHECK_BYTES * len(test) // bytes_of(test.images)), 1))
    np.savez_compressed(folder / "check.npz", images=images.images[:], labels=images.labels)
    extras = bench.runtime.extras(artifact.deployed, bench.data.calibration.images[: bench.target.batch])
    for name, content in extras.items():
        (folder / name).write_bytes(content)
    if extras:
        (folder / "runtime.pyz").write_bytes(worker_file())
    # The portable form, which a board's runtime can read as well as this one's.
    (folder / REFERENCE).write_bytes(bench.references()[precision].stages[0])
    preprocessing = bench.loaded.preprocessing
    contents: dict[str, Any] = {
        _MARKER: {
            "format": 1,
            "study": search.study.name,
            "search": search.folder.name,
            "trial": confirmed.version.number,
            "target": bench.target.to_dict(),
            "library": bench.runtime.version(),
            "deployed": names,
            "extras": sorted(extras),
            "exits": artifact.exits,
            "thresholds": artifact.thresholds,
            "confidence": artifact.confidence,
            "preprocessing": asdict(preprocessing) if preprocessing else None,
            "blocks": artifact.blocks,
            "steps": staged.to_json(artifact.steps),
            "image_shape": bench.data.image_shape,
            "classes": bench.data.classes,
            **({"frames": asdict(artifact.reuse)} if artifact.reuse else {}),
            "reference": {"file": REFERENCE, "precision": precision, "seconds": reference.seconds},
            "leaving": [value for name, value in confirmed.latency.notes.items() if name.startswith(LEFT)],
            "check": {"images": len(images), "correct": int(confirmed.answers.correct[: len(images)].sum())},
        },
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
        "environment.json": environment(bench.runtime.device(), bench.runtime.state()),
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(search.folder.path / "study.toml", folder / "study.toml")
    for module, name in _SHIPPED.items():
        shutil.copyfile(str(module.__file__), folder / name)


def _run_once(folder: Path) -> None:
    """Lets the bundle check itself, as its user would; no compiled modules are left in it."""
    done = subprocess.run(
        [sys.executable, "-I", "-B", str(folder / "run.py")], capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stdout + done.stderr).strip().splitlines()[-1:] or ["no output"]
        raise BundleError(f"a bundle answers its check images as measured, got: {last[0]}")
