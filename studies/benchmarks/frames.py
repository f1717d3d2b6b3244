"""Key frames on a stream: what each threshold saves and costs, fp32 and int8, with the real loop run beside.

python -m studies.benchmarks.frames --weights resnet20.pt --data imagefolder:PATH [--frames 12000]
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from evaluators.frames import Reuse, Stream
from evaluators.runtimes.ort import load
from evaluators.runtimes.run_bundle import Floats, FrameReuse, Network, StagedNetwork
from evaluators.subject import Answers
from search.request import Request
from search.study import ExitsSection, FramesSection, RecoverySection
from search.workbench import Workbench
from spaces.candidate import Candidate

THRESHOLDS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
_LOOP, _ROUNDS = 300, 5
"""The loop is timed over so many frames in a row, in turn with every-frame inference, at so many places."""


@dataclass(frozen=True)
class Row:
    """What one threshold does to a stream.

    Args:
        threshold: in units of the network's input.
        keys: the share of key frames.
        accuracy: over all frames.
        same: how many frames get the class that the network would give them.
        ratio: time per frame to that of every-frame inference, in CPU time; the median over turns.
        spread: between the lowest and the highest turn.
    """

    threshold: float
    keys: float
    accuracy: float
    same: float
    ratio: float
    spread: float


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
    bench = Workbench(study, lambda *_: None)
    stream = bench.data.test
    assert isinstance(stream, Stream)
    print(f"{len(stream)} frames in {len(stream.starts)} clips, max age {frames.max_age}; {bench.target}")
    for precision in bench.space.precision.precisions:
        print(f"\n{precision}\n")
        _print(measure(bench, stream, precision, frames.max_age))


def measure(bench: Workbench, stream: Stream, precision: str, max_age: int) -> list[Row]:
    """Returns a row for each threshold, all from one answer of the network to each frame."""
    dense = bench.space.dense()
    closed = dense.thresholds
    subject = bench.subject(Candidate(dense.channels, dict.fromkeys(dense.precision, precision), closed))
    every = subject.answers_to(stream)
    network = StagedNetwork([load(stage, 1) for stage in subject.artifact.deployed], subject.artifact.thresholds)
    return [_row(stream, every, network, Reuse(threshold, max_age)) for threshold in THRESHOLDS]


def _row(stream: Stream, every: Answers, network: Network, reuse: Reuse) -> Row:
    answering = stream.key_frames(reuse)
    classes = every.classes[answering]
    ratios = _loop_ratios(stream, network, reuse)
    return Row(
        threshold=reuse.threshold,
        keys=float((answering == np.arange(len(stream))).mean()),
        accuracy=float((classes == stream.labels).mean()),
        same=float((classes == every.classes).mean()),
        ratio=float(np.median(ratios)),
        spread=float(np.ptp(ratios)),
    )


def _loop_ratios(stream: Stream, network: Network, reuse: Reuse) -> list[float]:
    """Returns what the loop takes as a share of what the bare network takes for the same frames, at several places."""
    ratios = []
    for start in np.linspace(0, len(stream) - _LOOP, _ROUNDS).astype(int):
        frames = stream.images[start : start + _LOOP]
        loop = FrameReuse(network, reuse.threshold, reuse.max_age)
        bare, reused = _seconds(network, frames), _seconds(loop.frame, frames)
        ratios.append(reused / bare)
    return ratios


def _seconds(answer: Callable[[Floats], object], frames: Floats) -> float:
    begin = time.thread_time()
    for index in range(len(frames)):
        answer(frames[index : index + 1])
    return time.thread_time() - begin


def _print(rows: Sequence[Row]) -> None:
    print("| threshold | key frames | accuracy | as every-frame inference | mean time per frame, as a ratio to it |")
    print("|---|---|---|---|---|")
    for row in rows:
        print(f"| {row.threshold:g} | {row.keys:.1%} | {row.accuracy:.2%} | {row.same:.2%} | {row.ratio:.3f} |")


if __name__ == "__main__":
    main()
