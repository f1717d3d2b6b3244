"""What a trial of the digits study costs, step by step, beside the naive way to build a candidate.

python -m studies.benchmarks.throughput [--trials 100]
"""

import argparse
import copy
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime
import torch
import torch_pruning
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from optuna.trial import FrozenTrial

from evaluators.graph.exporter import INPUT, OPSET
from search.commands.libraries import set_up_libraries
from search.config.environment import environment
from search.config.study import load_study
from search.loop.baseline import measure_baseline
from search.loop.coordinator import build_coordinator
from search.pipeline.pipeline import CompressionPipeline, build_pipeline
from search.results.store import SearchFolder, StoredSearch
from search.tracking.store import Tracking
from spaces.candidate import Candidate

if TYPE_CHECKING:
    from search.tracking.mirror import Follower

NAIVE_CANDIDATES = 5
_STEPS = {
    "thresholds": "thresholds: every exit built, asked and timed, and solved for",
    "compress": "slice in torch, recalibrate batch norm",
    "build": "artifact: weights into the graph, Q/DQ, stages",
    "load": "load the sessions",
    "params": "parameters",
    "size": "size",
    "flops": "FLOPs (and, with exits, who leaves where)",
    "latency": "latency",
    "accuracy": "accuracy on the validation images",
}


class Stopwatch:
    """Keeps what every trial took."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.steps: list[dict[str, float]] = []

    def trial_done(self, trial: FrozenTrial, seconds: float) -> None:
        """Takes note of a trial."""
        if "evaluation" in trial.user_attrs:
            self.seconds.append(seconds)
            self.steps.append(trial.user_attrs["evaluation"]["seconds"])


def main() -> None:
    """Runs a search of the digits study and prints two tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=100)
    trials = parser.parse_args().trials
    set_up_libraries()
    warnings.simplefilter("ignore")
    study = load_study("digits")
    pipeline = build_pipeline(
        study, lambda step, done, total: print(f"{step}: {done}/{total}") if done == total else None
    )
    with tempfile.TemporaryDirectory() as runs:
        watch, mirror, overhead = _search(pipeline, Path(runs), trials)
    machine = environment(pipeline.runtime.device())
    print(
        f"\n{machine['device']}, {machine['cores']} cores, torch {machine['torch']}, onnxruntime"
        f" {machine['onnxruntime']}; {len(watch.seconds)} measured trials of {trials}\n"
    )
    _print_steps(watch, mirror, overhead, trials)
    _print_building(pipeline, watch)


def _search(pipeline: CompressionPipeline, runs: Path, trials: int) -> tuple[Stopwatch, "Follower", dict[str, float]]:
    from search.tracking.mirror import Follower  # imports MLflow, which reads its settings

    folder = SearchFolder(runs / "throughput")
    with folder.lock():
        stored = folder.create()
        stored.set_user_attr("study", pipeline.study.model_dump(mode="json"))
        stored.set_user_attr("baseline", measure_baseline(pipeline).to_dict())
        search = StoredSearch.read(folder)
        watch, mirror = Stopwatch(), Follower(Tracking.of(runs), search, print)
        coordinator = build_coordinator(pipeline, stored, search.baseline, "tpe", 0, [watch, mirror])
        outcome = coordinator.run(trials, None)
    return watch, mirror, outcome.overhead_s


def _print_steps(watch: Stopwatch, mirror: "Follower", overhead: dict[str, float], trials: int) -> None:
    whole = sum(watch.seconds) + mirror.seconds
    print("| step | median s | mean s | share |\n|---|---|---|---|")
    for step, title in _STEPS.items():
        taken = [steps[step] for steps in watch.steps if step in steps]
        print(
            f"| {title} | {statistics.median(taken):.3f} | {sum(taken) / len(taken):.3f} | {sum(taken) / whole:.1%} |"
        )
    extra = {"ask (sampler, journal)": overhead["ask"], "tell (journal)": overhead["tell"], "MLflow": mirror.seconds}
    for title, seconds in extra.items():
        print(f"| {title} | | {seconds / trials:.3f} | {seconds / whole:.1%} |")
    both = sum(extra.values())
    print(f"| **ask, tell, journal and MLflow** | | {both / trials:.3f} | {both / whole:.1%} |")
    low, high = statistics.median(watch.seconds), max(watch.seconds)
    print(f"| **a trial, without MLflow** | {low:.3f} | {sum(watch.seconds) / len(watch.seconds):.3f} | |")
    print(
        f"\nThe slowest trial took {high:.2f} s, the slowest 5% more than {np.percentile(watch.seconds, 95):.2f} s.\n"
    )


def _print_building(pipeline: CompressionPipeline, watch: Stopwatch) -> None:
    """Builds the same candidates both ways, in turn, and prints the paired ratio."""
    rng = np.random.default_rng(0)
    naive, ours = [], []
    for _ in range(NAIVE_CANDIDATES):
        candidate = _random_candidate(pipeline, rng)
        begin = time.perf_counter()
        _build_naively(pipeline, candidate)
        between = time.perf_counter()
        pipeline.builder.build(pipeline.space.apply(pipeline.network, candidate), candidate)
        naive.append(between - begin)
        ours.append(time.perf_counter() - between)
    ratio = statistics.median(slow / fast for slow, fast in zip(naive, ours, strict=True))
    print("| building one pruned int8 candidate | median s |\n|---|---|")
    print(f"| naive: torch-pruning, export, quantize_static | {statistics.median(naive):.3f} |")
    print(f"| ours: slice, write Q/DQ | {statistics.median(ours):.3f} |")
    print(f"| paired ratio over {NAIVE_CANDIDATES} candidates | **{ratio:.0f}x** |")
    build = statistics.median(steps["build"] for steps in watch.steps)
    print(f"\nInside the search the artifact alone takes {build * 1e3:.0f} ms.")


def _random_candidate(pipeline: CompressionPipeline, rng: np.random.Generator) -> Candidate:
    values = pipeline.space.uniform(float(rng.uniform(0.4, 0.9)), "int8")
    candidate = pipeline.space.candidate(values)
    return pipeline.space.with_thresholds(candidate, candidate.thresholds.without_exits())


def _build_naively(pipeline: CompressionPipeline, candidate: Candidate) -> bytes:
    """Returns the candidate as the libraries' own examples build it, one export and one calibration each."""
    trunk, image = copy.deepcopy(pipeline.network.trunk), torch.from_numpy(pipeline.data.calibration.images[:1])
    graph = torch_pruning.DependencyGraph().build_dependency(trunk, image)
    modules = dict(trunk.named_modules())
    for group in pipeline.space.sparsity.groups:
        kept = pipeline.space.sparsity.kept(candidate.channels).get(group.name)
        if kept is not None:
            gone = np.setdiff1d(np.arange(group.channels), kept).tolist()
            graph.get_pruning_group(modules[group.name], torch_pruning.prune_conv_out_channels, idxs=gone).prune()
    with tempfile.TemporaryDirectory() as folder:
        exported, quantized = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        torch.onnx.export(
            trunk,
            (image,),
            str(exported),
            dynamo=False,
            opset_version=OPSET,
            input_names=[INPUT],
            dynamic_axes={INPUT: {0: "batch"}},
        )
        logging.disable(logging.WARNING)
        quantize_static(
            str(exported),
            str(quantized),
            _Reader(pipeline.data.calibration.images[:]),
            QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        logging.disable(logging.NOTSET)
        return quantized.read_bytes()


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """Hands the calibration images to the quantizer, sixteen at a time."""

    def __init__(self, images: np.ndarray) -> None:
        self._batches: Iterator[np.ndarray] = (images[start : start + 16] for start in range(0, len(images), 16))

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Returns the next batch; None at the end."""
        batch = next(self._batches, None)
        return None if batch is None else {INPUT: batch}


if __name__ == "__main__":
    onnxruntime.set_default_logger_severity(3)
    main()
