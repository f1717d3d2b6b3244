"""Key frames on a stream: what each threshold saves and costs, fp32 and int8, with the real loop run beside.

python -m studies.benchmarks.frames --weights resnet20.pt --data imagefolder:PATH [--frames 12000]
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from evaluators.deployed import Answers, DeployedCandidate, LoadedArtifact
from evaluators.inference.frame_reuse import FrameReuse, Reuse
from evaluators.inference.staged import Floats, Network, StagedNetwork
from evaluators.runtimes.onnxruntime_cpu import load
from evaluators.streams import Stream
from search.config.overrides import Request
from search.config.study import ExitsSection, FramesSection, RecoverySection
from search.pipeline.pipeline import CompressionPipeline, build_pipeline
from spaces.candidate import Candidate

THRESHOLDS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
_FRAMES, _STRETCH = 1_500, 30
"""The loop is timed on so many frames from all over the stream, in stretches that take turns with the bare network."""


@dataclass(frozen=True)
class Row:
    """What one threshold does to a stream.

    Args:
        threshold: in units of the network's input.
        keys: the share of key frames.
        accuracy: over all frames.
        change: of the accuracy, against every-frame inference.
        error: the standard error of the change, over clips.
        same: the share of the frames that get the class that the network would give them.
        loop: time per frame of the real loop, as a ratio to the bare network on the same frames.
        expected: the same as the search finds it, from one frame of each kind.
    """

    threshold: float
    keys: float
    accuracy: float
    change: float
    error: float
    same: float
    loop: float
    expected: float


def main() -> None:
    """Prints a Markdown table for each precision."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--frames", type=int, default=12_000)
    parser.add_argument("--max-age", type=int, default=30)
    arguments = parser.parse_args()
    study = Request(study="cifar10", weights=arguments.weights, data=arguments.data).to_study()
    frames = FramesSection(frames=arguments.frames, max_age=arguments.max_age)
    without = {"exits": ExitsSection(after=()), "recovery": RecoverySection()}  # nothing has to be trained
    study = study.model_copy(update={"frames": frames, **without})
    pipeline = build_pipeline(study, lambda *_: None)
    stream = pipeline.data.test
    assert isinstance(stream, Stream)
    print(f"{len(stream)} frames in {len(stream.starts)} clips, max age {frames.max_age}; {pipeline.target}")
    held = Stream(stream.images[:], stream.labels, stream.starts)
    for precision in pipeline.space.precision.precisions:
        print(f"\n{precision}\n")
        _print(measure(pipeline, held, precision, frames.max_age))


def measure(pipeline: CompressionPipeline, stream: Stream, precision: str, max_age: int) -> list[Row]:
    """Returns a row for each threshold, all from one answer of the network to each frame."""
    dense = pipeline.space.dense()
    made = pipeline.deployed(Candidate(dense.channels, dict.fromkeys(dense.precision, precision), dense.thresholds))
    every = made.answers_to(stream)
    bare = _expected(pipeline, made, None, stream)
    reuses = [Reuse(threshold, max_age) for threshold in THRESHOLDS]
    return [_row(made, stream, every, reuse, _expected(pipeline, made, reuse, stream) / bare) for reuse in reuses]


def _expected(pipeline: CompressionPipeline, made: DeployedCandidate, reuse: Reuse | None, stream: Stream) -> float:
    """Returns the time per frame as the search measures it, as a ratio to the reference."""
    artifact = replace(made.artifact, reuse=reuse)
    subject = LoadedArtifact(made.candidate, artifact, stream, pipeline.runtime, pipeline.target)
    evaluator = pipeline.references.latency_evaluator(dict.fromkeys(pipeline.space.precision.precisions, 1.0))
    return evaluator.measure(subject).notes["ratio"]


def _row(made: DeployedCandidate, stream: Stream, every: Answers, reuse: Reuse, expected: float) -> Row:
    answering = stream.key_frames(reuse)
    classes = every.classes[answering]
    correct = (classes == stream.labels).astype(float)
    gained = correct - every.correct
    of_clips = np.bincount(stream.clips, gained - gained.mean())
    network = StagedNetwork([load(stage, 1) for stage in made.artifact.deployed], made.artifact.thresholds)
    return Row(
        threshold=reuse.threshold,
        keys=float((answering == np.arange(len(stream))).mean()),
        accuracy=float(correct.mean()),
        change=float(gained.mean()),
        error=float(np.sqrt((of_clips**2).sum()) / len(stream)),
        same=float((classes == every.classes).mean()),
        loop=_loop_ratio(stream, network, reuse),
        expected=expected,
    )


def _loop_ratio(stream: Stream, network: Network, reuse: Reuse) -> float:
    """Returns what the loop takes as a share of what the bare network takes, CPU time, in turn with each other.

    Stretches are the same frames for both. The loop has seen those before it, so it begins as in the stream.
    """
    loop, taken = FrameReuse(network, reuse.threshold, reuse.max_age), np.zeros(2)
    places = np.linspace(reuse.max_age, len(stream) - _STRETCH, _FRAMES // _STRETCH).astype(int)
    answering = stream.key_frames(reuse)
    for turn, start in enumerate(places):
        loop.last = None
        loop(stream.images[answering[start - 1] : start])
        frames = stream.images[start : start + _STRETCH]
        sides = [(0, network), (1, loop.frame)]
        for side, answer in sides if turn % 2 else reversed(sides):
            taken[side] += _seconds(answer, frames)
    return float(taken[1] / taken[0])


def _seconds(answer: Callable[[Floats], object], frames: Floats) -> float:
    begin = time.thread_time()
    for index in range(len(frames)):
        answer(frames[index : index + 1])
    return time.thread_time() - begin


def _print(rows: Sequence[Row]) -> None:
    print(
        "| threshold | key frames | accuracy | points | class as every-frame inference"
        " | time per frame to it, real loop | as the search measures it |"
    )
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row.threshold:g} | {row.keys:.1%} | {row.accuracy:.2%}"
            f" | {row.change * 100:+.2f} ± {row.error * 100:.2f} | {row.same:.1%}"
            f" | {row.loop:.3f} | {row.expected:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
