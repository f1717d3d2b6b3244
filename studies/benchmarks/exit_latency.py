"""What a search expects versions with exits to take, beside what loops over real images take, end to end.

python -m studies.benchmarks.exit_latency --weights resnet20.pt --data imagefolder:PATH

Ten versions of the ResNet-20 of studies/cifar10 with one to three exits, whose heads are linear layers on the frozen
network: int8 and fp32, several places and budgets. Their thresholds are solved as a search solves them, and the latency
that it then expects is set against a loop over the same images, one at a time, as a bundle's `run.py` answers them, in
turn with the dense network's. The timer of that loop is this file's own. The tables are Markdown.
"""

import argparse
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from evaluators.artifact import Artifact
from evaluators.bundle import run as run_bundle
from evaluators.bundle.manifest import DeploymentTarget, Manifest
from evaluators.deployed import DeployedCandidate
from evaluators.exits.threshold_problem import ResolvedThresholds
from evaluators.inference.staged import Floats, Network
from evaluators.latency.evaluator import LatencyEvaluator
from search.config.budget import Budget
from search.config.overrides import Request
from search.config.study import Study
from search.loop.baseline import measure_baseline
from search.pipeline.exit_thresholds import ExitThresholdSolver, ResolvedCandidate
from search.pipeline.pipeline import CompressionPipeline, build_pipeline
from search.results.evaluation import Evaluation
from search.results.store import Baseline
from spaces.candidate import Candidate
from spaces.thresholds import UNSOLVED
from studies.benchmarks.markdown import print_table

_AFTER = ("layer1", "layer2.0", "layer2")
_VERSIONS = (("exit1",), ("exit2",), ("exit3",), ("exit1", "exit3"), ("exit1", "exit2", "exit3"))
"""The exits that may answer."""
_SHARES = (0.9, 0.8)
"""Of the latency of the network without exits, in turn."""
_TURN_S = 0.03
"""So long one side runs before the other has its turn."""
_CLOSE = 0.03


@dataclass(frozen=True)
class Row:
    """One version.

    Args:
        precision: of all its layers.
        asked: the exits that may answer.
        budget: the limit, as a share of the dense fp32 network's latency.
        version: what the solver made of it.
        expected: its latency as a share of the dense fp32 network's, as the search's solver expects it.
        formula: the same from shares and paths alone, before the succession was timed.
        measured: the same as the search's evaluator measures it.
        ran: the same of the loop.
    """

    precision: str
    asked: tuple[str, ...]
    budget: str
    version: ResolvedCandidate
    expected: float
    formula: float
    measured: float
    ran: float

    def cells(self) -> list[str]:
        """Returns the row of the table."""
        shares = " ".join(f"{share:.0%}" for share in _thresholds(self.version).shares)
        differences = (f"{each / self.ran - 1:+.1%}" for each in (self.formula, self.expected, self.measured))
        used = ", ".join(self.version.candidate.active_exits) or "none"
        seconds = (f"{each:.3f}" for each in (self.formula, self.expected, self.measured, self.ran))
        return [self.precision, ", ".join(self.asked), self.budget, used, shares, *seconds, *differences]


def main() -> None:
    """Solves, measures, runs and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--images", type=int, default=10_000, help="that train the heads")
    arguments = parser.parse_args()
    pipeline = build_pipeline(_study(arguments.weights, arguments.data, arguments.images), _say)
    baseline = measure_baseline(pipeline)
    dense = baseline.evaluation
    print(f"\n{baseline.reference_seconds['fp32'] * 1e3:.3f} ms dense, on {pipeline.target}; shares of that\n")
    rows: list[Row] = []
    heads = ["precision", "exits", "budget", "used", "leave", "formula", "expected", "measured", "loop"]
    to_loop = [f"{name} to loop" for name in ("formula", "expected", "measured")]
    print_table([*heads, *to_loop], _told(_rows(pipeline, baseline, dense), rows))
    for name in ("formula", "expected", "measured"):
        close = sum(abs(getattr(row, name) / row.ran - 1) <= _CLOSE for row in rows)
        print(f"\n{name}: {close} of {len(rows)} versions within {_CLOSE:.0%} of the loop")


def _study(weights: str, data: str, images: int) -> Study:
    """Returns the study of studies/cifar10 with linear heads on the frozen network, and no recovery."""
    study = Request("cifar10", weights=weights, data=data).to_study()
    settings = {"after": _AFTER, "head": "linear", "training": "frozen", "weights": (), "images": images, "epochs": 10}
    exits = study.exits.model_copy(update=settings)
    recovery = study.recovery.model_copy(update={"level": "none", "final": None})
    space = study.space.model_copy(update={"drop_slower": False})
    return study.model_copy(update={"exits": exits, "recovery": recovery, "space": space})


def _say(step: str, done: int, total: int) -> None:
    if done == total:
        print(f"{step}: done", flush=True)


def _told(rows: Iterable[Row], kept: list[Row]) -> Iterator[list[str]]:
    """Yields the cells of each row as it comes, and keeps it."""
    for row in rows:
        kept.append(row)
        yield row.cells()


def _rows(pipeline: CompressionPipeline, baseline: Baseline, dense: Evaluation) -> Iterator[Row]:
    latency, plain = pipeline.references.latency_evaluator(baseline.reference_seconds), pipeline.space.dense()
    for precision in ("int8", "fp32"):
        full = Candidate(plain.channels, dict.fromkeys(plain.precision, precision), plain.thresholds)
        whole = latency.measure(pipeline.deployed(full)).value / latency.references["fp32"].seconds
        for exits, share in zip(_VERSIONS, cycle(_SHARES), strict=False):
            thresholds = full.thresholds.with_exits(dict.fromkeys(exits, UNSOLVED))
            open_ = Candidate(full.channels, full.precision, thresholds)
            yield _row(pipeline, latency, dense, precision, exits, f"{100 * share * whole:.1f}%", open_)


def _row(
    pipeline: CompressionPipeline,
    latency: LatencyEvaluator,
    dense: Evaluation,
    precision: str,
    exits: tuple[str, ...],
    budget: str,
    open_: Candidate,
) -> Row:
    limit = Budget.parse([f"latency<{budget}"])
    version = ExitThresholdSolver(pipeline, latency, dense.measurements, limit).resolve(open_)
    subject = pipeline.deployed(version.candidate)
    plain = _loaded(pipeline, pipeline.deployed(pipeline.space.dense()).artifact)
    ran = _ratio(_loaded(pipeline, subject.artifact), plain, pipeline.threshold_images.images[:])
    thresholds, dense_s = _thresholds(version), latency.references["fp32"].seconds
    again = DeployedCandidate(
        subject.network,
        subject.candidate,
        subject.artifact,
        pipeline.threshold_images,
        pipeline.runtime,
        pipeline.target,
    )
    return Row(
        precision=precision,
        asked=exits,
        budget=budget,
        version=version,
        expected=thresholds.first_cost / dense_s,
        formula=thresholds.first_cost / thresholds.correction / dense_s,
        measured=latency.measure(again).value / dense_s,
        ran=ran,
    )


def _thresholds(version: ResolvedCandidate) -> ResolvedThresholds:
    assert version.thresholds is not None, "all of these have thresholds to be chosen"
    return version.thresholds


def _loaded(pipeline: CompressionPipeline, artifact: Artifact) -> Network:
    """Returns an artifact as its bundle's `run.py` loads it."""
    names = [f"stage{index}.onnx" for index in range(len(artifact.deployed))]
    manifest = Manifest(
        target=DeploymentTarget(**pipeline.target.to_dict()),
        library=pipeline.runtime.version(),
        deployed=tuple(names),
        thresholds=artifact.thresholds,
        confidence=artifact.confidence,
    )
    with tempfile.TemporaryDirectory() as folder:
        for name, stage in zip(names, artifact.deployed, strict=True):
            (Path(folder) / name).write_bytes(stage)
        manifest.write(Path(folder))
        return run_bundle.load(folder)


def _ratio(version: Network, dense: Network, images: Floats, rounds: int = 4) -> float:
    """Returns the CPU time of loops over all images, several times over, as a multiple of the dense network's.

    The images come in chunks, in which the two take turns; who goes first changes from chunk to chunk.
    """
    _loop(version, images[:50])
    size = max(int(_TURN_S / (_loop(dense, images[:50]) / 50)), 1)
    taken = {version: 0.0, dense: 0.0}
    for index, start in enumerate([*range(0, len(images), size)] * rounds):
        for network in (version, dense) if index % 2 else (dense, version):
            taken[network] += _loop(network, images[start : start + size])
    return taken[version] / taken[dense]


def _loop(network: Network, images: Floats) -> float:
    """Returns the seconds of CPU time of images, one at a time."""
    begin = time.thread_time()
    for index in range(len(images)):
        network(images[index : index + 1])
    return time.thread_time() - begin


if __name__ == "__main__":
    main()
