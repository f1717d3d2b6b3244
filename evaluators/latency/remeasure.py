"""Latency of files on disk, measured in a process of its own: `python -m evaluators.latency.remeasure FOLDER`.

The folder holds what `write_job` wrote. The output is one line of JSON: the measurement, and how long the references
take now.
"""

import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluators.artifact import Artifact
from evaluators.data import LabelledImages
from evaluators.deployed import LoadedArtifact
from evaluators.inference.frame_reuse import Reuse
from evaluators.inference.staged import Step, to_json
from evaluators.latency.evaluator import LatencyEvaluator, Reference, median_seconds, reference_batch
from evaluators.measurement import Measurement
from evaluators.runtimes.base import Target
from evaluators.runtimes.registry import runtime as load_runtime
from evaluators.streams import Stream
from spaces.candidate import Candidate

OCCASIONS = 3
_IMAGES, _LABELS = "images.npy", "labels.npy"
_WRITE_BATCH = 64
_PAUSE_S = 1.0


@dataclass(frozen=True)
class Remeasured:
    """A latency measured in a new process.

    Args:
        latency: the median of three measurements, at the speed that the references had when the search began.
        speed: the references' time now, as a multiple of their time when the search began.
    """

    latency: Measurement
    speed: float


def write_job(folder: Path, subject: LoadedArtifact, latency: LatencyEvaluator) -> None:
    """Writes everything that another process needs to time an artifact."""
    for index, stage in enumerate(subject.artifact.deployed):
        (folder / f"stage{index}.onnx").write_bytes(stage)
    for name, reference in latency.references.items():
        (folder / f"reference-{name}.onnx").write_bytes(reference.model)
    _write_images(folder, subject)
    job = {
        "candidate": subject.candidate.to_dict(),
        "stages": len(subject.artifact.deployed),
        "exits": subject.artifact.exits,
        "thresholds": subject.artifact.thresholds,
        "precisions": dict(subject.artifact.precisions),
        "boundaries": subject.artifact.boundaries,
        "confidence": subject.artifact.confidence,
        "frames": _frames(subject),
        "blocks": subject.artifact.blocks,
        "steps": to_json(subject.artifact.steps),
        "input_size": subject.artifact.input_size,
        "target": subject.target.to_dict(),
        "references": {name: reference.seconds for name, reference in latency.references.items()},
    }
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")


def _frames(subject: LoadedArtifact) -> dict[str, Any] | None:
    """Returns, JSON-ready, a stream's frame reuse and where its clips start; None if every frame is computed."""
    if subject.artifact.reuse is None or not isinstance(subject.validation, Stream):
        return None
    return {"reuse": asdict(subject.artifact.reuse), "starts": subject.validation.starts.tolist()}


def _write_images(folder: Path, subject: LoadedArtifact) -> None:
    """Writes the validation images, a few at a time; only the first batch if the network is not dynamic."""
    images, labels = subject.validation.images, subject.validation.labels
    count = len(labels) if subject.artifact.is_dynamic else min(subject.target.batch, len(labels))
    shape = (count, *images.shape[1:])
    file = np.lib.format.open_memmap(folder / _IMAGES, mode="w+", dtype=np.float32, shape=shape)
    for start in range(0, count, _WRITE_BATCH):
        end = min(start + _WRITE_BATCH, count)
        file[start:end] = images[start:end]
    file.flush()
    np.save(folder / _LABELS, labels[:count])


def remeasure(folder: Path) -> Remeasured:
    """Returns the latency of a written job, measured in a new process.

    Raises:
        RuntimeError: that process failed; the message has its last line.
    """
    command = [sys.executable, "-m", "evaluators.latency.remeasure", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no output"]
        raise RuntimeError(f"latency could not be measured in a process of its own: {last[0]}")
    answer = json.loads(done.stdout.splitlines()[-1])
    return Remeasured(Measurement.from_dict(answer["latency"]), answer["speed"])


def _measure(folder: Path) -> dict[str, Any]:
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    target = Target(**job["target"])
    runtime = load_runtime(target.runtime)
    stages = tuple((folder / f"stage{index}.onnx").read_bytes() for index in range(job["stages"]))
    images = np.load(folder / _IMAGES, mmap_mode="r")
    validation = LabelledImages(images, np.load(folder / _LABELS))
    reuse = None
    if frames := job["frames"]:
        validation = Stream(images, validation.labels, np.array(frames["starts"]))
        reuse = Reuse(**frames["reuse"])
    references = {
        name: Reference((folder / f"reference-{name}.onnx").read_bytes(), seconds)
        for name, seconds in job["references"].items()
    }
    artifact = Artifact(
        stages,
        stages,
        tuple(job["exits"]),
        tuple(job["thresholds"]),
        job["precisions"],
        boundaries=job["boundaries"],
        confidence=job["confidence"],
        reuse=reuse,
        blocks=tuple(job["blocks"]),
        steps=tuple(Step(**step) for step in job["steps"]),
        input_size=job["input_size"],
    )
    subject = LoadedArtifact(Candidate.from_dict(job["candidate"]), artifact, validation, runtime, target)
    evaluator = LatencyEvaluator(references, runtime, target)
    batch = images[: reference_batch(target.batch)]
    sessions = {name: runtime.open([reference.model], [], target.threads) for name, reference in references.items()}
    now = median_seconds(sessions, batch)
    sessions.clear()
    measurements = []
    for occasion in range(OCCASIONS):
        time.sleep(_PAUSE_S if occasion else 0)
        measurements.append(evaluator.measure(subject))
    middle = sorted(measurements, key=lambda measurement: measurement.value)[OCCASIONS // 2]
    speed = statistics.median(now[name].work / reference.seconds for name, reference in references.items())
    return {"latency": middle.to_dict(), "speed": speed}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_measure(Path(sys.argv[1]))) + "\n")
