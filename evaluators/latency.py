"""Latency of the deployed artifact on the target, paired with a reference of the same kind."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from evaluators.measurement import Measurement
from evaluators.subject import Deployed
from evaluators.target import Images, Opened, Runtime, Target, TimedBatch
from evaluators.timing import PairedTiming, Protocol, time_pair

_TURNS_WITH_EXITS = 3
"""With exits, every way in which a batch can shrink takes turns of its own, and each of them fewer."""


@dataclass(frozen=True)
class Reference:
    """What candidates are timed beside: a dense network of one precision, and how long a batch took it.

    Args:
        model: the deployed file.
        seconds: its median wall-clock time for `reference_batch` images when the search began.
    """

    model: bytes
    seconds: float


def reference_batch(batch: int) -> int:
    """Returns the batch of the reference: a quarter of the candidate's, so that most of the time goes to the latter."""
    return -(-batch // 4)


def median_seconds(opened: Mapping[str, Opened], images: Images, bursts: int = 60, burst: int = 5) -> dict[str, float]:
    """Returns the median wall-clock seconds that each artifact takes for `images`; bursts of all of them alternate."""
    samples: dict[str, list[float]] = {name: [] for name in opened}
    for item in opened.values():
        item.seconds(images, 2 * burst)
    for _ in range(bursts):
        for name, item in opened.items():
            samples[name] += item.seconds(images, burst)[1:]
    return {name: float(np.median(taken)) for name, taken in samples.items()}


class LatencyEvaluator:
    """Seconds per batch.

    A candidate's latency is its ratio to the reference times what the reference took when the search began. So all
    trials of a search are told at one speed of the machine, however that drifts.

    Args:
        references: by precision; a candidate is compared with the one that most of its layers share.
        runtime: what runs them.
        target: batch size and threads.
        protocol: how a pair is timed.
    """

    metric = "latency"

    def __init__(
        self, references: Mapping[str, Reference], runtime: Runtime, target: Target, protocol: Protocol | None = None
    ) -> None:
        self.references = dict(references)
        self.protocol = protocol or Protocol()
        self._runtime = runtime
        self._target = target

    def measure(self, subject: Deployed) -> Measurement:
        """Returns the median seconds per batch, or with exits the expected ones, and the longest path's beside."""
        precision = self._majority(subject)
        timing = self._time(subject, precision)
        reference_s = self.references[precision].seconds
        dynamic = bool(subject.artifact.exits)
        worst = timing.per_input[-1] if dynamic else timing.ratio
        percentiles = {f"p{percent}": timing.wall_percentile(percent) for percent in (90, 95, 99)}
        return Measurement(
            metric="latency",
            value=timing.ratio * reference_s,
            statistic="expected over the validation images" if dynamic else "median",
            n=len(timing.wall_s),
            spread=timing.half_width / 1.96 * timing.ratio * reference_s,
            target=str(subject.target),
            protocol=f"{self._protocol(dynamic)}; reference: dense {precision} at {reference_s * 1e3:.3f} ms",
            others={**percentiles, "worst": worst * reference_s},
            notes={"ratio": timing.ratio, "half_width": timing.half_width, "wall_median": timing.wall_percentile(50)},
        )

    def same_twice(self, precision: str, images: Images) -> float:
        """Returns the ratio of a reference to itself, loaded twice: how far from 1 a ratio may be by chance."""
        count = reference_batch(self._target.batch)
        first, second = self._load(precision), self._load(precision)
        turns = first.turns(images, [TimedBatch(0, count)], second, count, self.protocol)
        return time_pair(turns, [1.0], self.protocol, time.perf_counter).ratio

    def _time(self, subject: Deployed, precision: str) -> PairedTiming:
        batch = subject.target.batch
        batches, weights = [TimedBatch(0, batch)], [1.0]
        if subject.artifact.exits:
            batches = [TimedBatch(start, batch) for start, _ in subject.answers.profiles]
            batches.append(TimedBatch(0, batch, longest=True))
            weights = [*(float(count) for _, count in subject.answers.profiles), 0.0]
        protocol = self._protocol(bool(subject.artifact.exits))
        images, reference = subject.validation.images, self._load(precision)
        turns = subject.opened.turns(images, batches, reference, reference_batch(batch), protocol)
        return time_pair(turns, weights, protocol, time.perf_counter)

    def _protocol(self, dynamic: bool) -> Protocol:
        return replace(self.protocol, turns=_TURNS_WITH_EXITS) if dynamic else self.protocol

    def _load(self, precision: str) -> Opened:
        # Loaded for each timing: idle sessions beside the two that alternate would change what the caches hold.
        return self._runtime.open([self.references[precision].model], [], self._target.threads)

    def _majority(self, subject: Deployed) -> str:
        layers = list(subject.candidate.precision.values())
        return max(self.references, key=layers.count)
