"""What early exits save of a trained network's time, told by a formula and measured by running bundles.

python -m studies.benchmarks.exits --weights resnet20.pt --data imagefolder:PATH [--out FOLDER]

The exits are those of studies/cifar10. For each precision two bundles are written, with exits and without, whose
thresholds were solved for a share of the latency on one half of the validation images. Both then answer all test
images, in turn, through their own `run.py`. The table is Markdown.
"""

import argparse
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evaluators.accuracy import accuracy_of, wilson
from evaluators.bundle import run as run_bundle
from evaluators.data import LabelledImages
from evaluators.deployed import DeployedCandidate
from evaluators.inference.staged import Network
from evaluators.latency.evaluator import LatencyEvaluator
from search.config.budget import Budget
from search.config.overrides import Request
from search.config.study import Study
from search.deploy.bundle import Confirmed, write_bundle
from search.loop.baseline import measure_baseline
from search.pipeline.exit_thresholds import ExitThresholdSolver
from search.pipeline.pipeline import CompressionPipeline, build_pipeline
from search.results.evaluation import Evaluation
from search.results.pareto import Version
from search.results.store import Baseline, SearchFolder, StoredSearch
from spaces.candidate import Candidate
from spaces.thresholds import UNSOLVED

_CHUNK = 50
"""So many images are answered by one bundle before the other has its turn."""


@dataclass(frozen=True)
class Ran:
    """What a bundle did with the test images.

    Args:
        correct: whether each answer is right.
        exits: where each image left.
        seconds: CPU time of all images.
    """

    correct: NDArray[np.bool_]
    exits: NDArray[np.int64]
    seconds: float


def main() -> None:
    """Trains, solves, writes bundles, runs them and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/exits"))
    parser.add_argument("--confidences", nargs="+", default=["softmax"], help="softmax, margin, entropy")
    parser.add_argument("--shares", nargs="+", default=["60%", "70%", "80%"], help="of the full latency")
    arguments = parser.parse_args()
    study = Request("cifar10", weights=arguments.weights, data=arguments.data).to_study()
    print(f"The network as it came: {_accuracy_as_it_came(study):.2%} on the test images.")
    for confidence, share in product(arguments.confidences, arguments.shares):
        exits = study.exits.model_copy(update={"confidence": confidence})
        asked = study.model_copy(update={"exits": exits, "budget": Budget.parse([f"latency<{share}"])})
        _measure(build_pipeline(asked, _say), arguments.out / f"{confidence}-{share.rstrip('%')}")


def _accuracy_as_it_came(study: Study) -> float:
    """Returns the accuracy on the test images before network and exits learned together, fp32."""
    pipeline = build_pipeline(
        study.model_copy(update={"exits": study.exits.model_copy(update={"after": (), "weights": ()})}), _say
    )
    answers = pipeline.deployed(pipeline.space.dense()).answers_to(pipeline.data.test)
    return accuracy_of(answers, pipeline.target, "test").value


def _say(step: str, done: int, total: int) -> None:
    if done == total:
        print(f"{step}: done", flush=True)


def _measure(pipeline: CompressionPipeline, out: Path) -> None:
    baseline = measure_baseline(pipeline)
    latency = pipeline.references.latency_evaluator(baseline.reference_seconds)
    print(f"\nThresholds for {pipeline.study.budget}, {pipeline.study.exits.confidence}, on {pipeline.target}\n")
    for precision in pipeline.space.precision.precisions:
        dense = pipeline.space.dense()
        full = Candidate(dense.channels, dict.fromkeys(dense.precision, precision), dense.thresholds)
        whole = pipeline.evaluate(full, latency)
        open_ = Candidate(
            full.channels, full.precision, full.thresholds.with_exits(dict.fromkeys(full.thresholds.exits, UNSOLVED))
        )
        settled = ExitThresholdSolver(pipeline, latency, whole.measurements).resolve(open_)
        version = settled.with_thresholds(pipeline.evaluate(settled.candidate, latency))
        bundles = [
            _write(pipeline, baseline, each, out / f"{precision}-{name}")
            for name, each in (("full", whole), ("exits", version))
        ]
        ran = run_in_turn(run_bundle.load(bundles[0]), run_bundle.load(bundles[1]), pipeline.data.test)
        _print(precision, pipeline, latency, whole, version, ran)


def _write(pipeline: CompressionPipeline, baseline: Baseline, evaluation: Evaluation, out: Path) -> Path:
    """Returns the folder of a bundle of a version that was measured."""
    folder = SearchFolder(out.parent)
    folder.path.mkdir(parents=True, exist_ok=True)
    (folder.path / "study.toml").write_text(pipeline.study.to_toml(), encoding="utf-8")
    subject = pipeline.deployed(evaluation.candidate)
    answers = subject.answers_to(pipeline.data.test)
    test = accuracy_of(answers, pipeline.target, "test")
    confirmed = Confirmed(Version(0, evaluation), subject, evaluation.measurements["latency"], 1.0, test, test, answers)
    write_bundle(
        out, pipeline, StoredSearch(folder, pipeline.study, baseline, (), {}), pipeline.study.budget, confirmed
    )
    return out


def run_in_turn(full: Network, gated: Network, data: LabelledImages) -> tuple[Ran, Ran]:
    """Returns what two bundles did with the same images, one at a time, chunk after chunk in turn.

    Times are of the calling thread on its CPU, so that other programs do not count.
    """
    networks, rounds = (full, gated), range(0, len(data), _CHUNK)
    for network in networks:
        run_bundle.answer(network, data.images[:_CHUNK], 1)
    found: tuple[list[NDArray[np.int64]], ...] = ([], [])
    seconds = [0.0, 0.0]
    for index, start in enumerate(rounds):
        images, labels = data.images[start : start + _CHUNK], data.labels[start : start + _CHUNK]
        for place in (0, 1) if index % 2 == 0 else (1, 0):
            begin = time.thread_time()
            logits, exits, _ = run_bundle.answer(networks[place], images, 1)
            seconds[place] += time.thread_time() - begin
            found[place].append(np.stack([logits.argmax(axis=1) == labels, exits]))
    told = [np.concatenate(parts, axis=1) for parts in found]
    first, second = (Ran(each[0].astype(bool), each[1], taken) for each, taken in zip(told, seconds, strict=True))
    return first, second


def _print(
    precision: str,
    pipeline: CompressionPipeline,
    latency: LatencyEvaluator,
    whole: Evaluation,
    version: Evaluation,
    ran: tuple[Ran, Ran],
) -> None:
    full, gated = ran
    subject = pipeline.deployed(version.candidate)
    shares = [float((gated.exits == place).mean()) for place in range(len(version.candidate.active_exits) + 1)]
    paths, dense = latency.paths(subject, shares=shares), whole.measurements["latency"].value
    formula = sum(share * path for share, path in zip(shares, paths, strict=True)) / dense
    measured = gated.seconds / full.seconds
    print(f"| {precision}: exit | right, alone | right, of those that leave | leave | path, of the full latency |")
    print("|---|---|---|---|---|")
    alone = _alone(subject, pipeline.data.test)
    for place, name in enumerate([*version.candidate.active_exits, "end"]):
        here = gated.exits == place
        right = f"{gated.correct[here].mean():.2%}" if here.any() else "-"
        print(f"| {name} | {alone[place]:.2%} | {right} | {shares[place]:.1%} | {paths[place] / dense:.1%} |")
    low, high = wilson(float(gated.correct.mean()), len(gated.correct))
    drop = full.correct.astype(float) - gated.correct
    error = drop.std() / len(drop) ** 0.5
    gates = version.exit_thresholds or {}
    print(
        f"\n{precision}: accuracy {full.correct.mean():.2%} in full, {gated.correct.mean():.2%} with exits (95%"
        f" interval {low:.2%} to {high:.2%}; drop {drop.mean() * 100:.2f} ± {error * 100:.2f} points) on"
        f" {len(drop)} test images; {gates['accuracy']:.2%} on the {gates['images']} that thresholds were chosen on,"
        f" {version.measurements['accuracy'].value:.2%} on the {version.measurements['accuracy'].n} that score."
        f"\nLatency: {formula:.1%} of the full one by formula, {measured:.1%} measured end to end"
        f" ({formula / measured - 1:+.1%}); the search measured {version.measurements['latency'].value / dense:.1%}.\n",
        flush=True,
    )


def _alone(subject: DeployedCandidate, data: LabelledImages) -> NDArray[np.float64]:
    """Returns how accurate each exit that is there, and last the end, would be for all images."""
    right = subject.session.all_logits(data.images, 1).argmax(axis=2) == data.labels[:, None]
    accuracy: NDArray[np.float64] = right.mean(axis=0)
    return accuracy


if __name__ == "__main__":
    main()
