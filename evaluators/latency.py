"""Latency of the deployed artifact on the target, paired with a reference of the same kind."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Self

import numpy as np

from evaluators.latency_cache import LatencyCache, structure_key
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


@dataclass(frozen=True)
class _Found:
    """What is kept of a timing: ratios to the reference, and the candidate's seconds by the clock."""

    ratio: float
    half_width: float
    worst_ratio: float
    calls: int
    work_s: float
    wall_median: float
    wall_percentiles: dict[str, float]
    remarks: list[str]

    @classmethod
    def of(cls, timing: PairedTiming, dynamic: bool, remarks: list[str]) -> Self:
        return cls(
            ratio=timing.ratio,
            half_width=timing.half_width,
            worst_ratio=timing.per_input[-1] if dynamic else timing.ratio,
            calls=len(timing.wall_s),
            work_s=timing.work_s,
            wall_median=timing.wall_percentile(50),
            wall_percentiles={f"p{percent}": timing.wall_percentile(percent) for percent in (90, 95, 99)},
            remarks=remarks,
        )


class LatencyEvaluator:
    """Seconds per batch.

    A candidate's latency is its ratio to the reference times what the reference took when the search began. So all
    trials of a search are told at one speed of the machine, however that drifts.

    Args:
        references: by precision; a candidate is compared with the one that most of its layers share.
        runtime: what runs them.
        target: batch size and threads.
        protocol: how a pair is timed.
        cache: of latencies that need not be measured again; used where the runtime compiles.
    """

    metric = "latency"

    def __init__(
        self,
        references: Mapping[str, Reference],
        runtime: Runtime,
        target: Target,
        protocol: Protocol | None = None,
        cache: LatencyCache | None = None,
    ) -> None:
        self.references = dict(references)
        self.protocol = protocol or Protocol()
        self._runtime = runtime
        self._target = target
        self._cache = cache if runtime.capabilities().compiles else None

    def measure(self, subject: Deployed) -> Measurement:
        """Returns the median seconds per batch, or with exits the expected ones, and the longest path's beside."""
        precision = self._majority(subject)
        dynamic = bool(subject.artifact.exits)
        found, known = self._known(subject, precision)
        reference_s = self.references[precision].seconds
        how = "; kept from an earlier measurement of the same shapes" if known else ""
        return Measurement(
            metric="latency",
            value=found.ratio * reference_s,
            statistic="expected over the validation images" if dynamic else "median",
            n=found.calls,
            spread=found.half_width / 1.96 * found.ratio * reference_s,
            target=str(subject.target),
            protocol=f"{self._protocol(dynamic)}; reference: dense {precision}, {reference_s * 1e3:.3f} ms{how}",
            others={**found.wall_percentiles, "worst": found.worst_ratio * reference_s},
            # Work by the CPU's or GPU's own clock and time on the wall, apart, as they were at that moment.
            notes={
                "ratio": found.ratio,
                "half_width": found.half_width,
                "work_s": found.work_s,
                "wall_median": found.wall_median,
            },
            remarks=tuple(found.remarks),
        )

    def _known(self, subject: Deployed, precision: str) -> tuple[_Found, bool]:
        """Returns a timing and whether it had been kept: only where loading compiles, and no input decides the path."""
        if self._cache is None or subject.artifact.exits:
            return self._fresh(subject, precision), False
        reference = self.references[precision].model
        circumstances = (self._runtime.version(), str(subject.target), str(self.protocol))
        key = structure_key([*subject.artifact.deployed, reference], *circumstances)
        kept = self._cache.find(key)
        if kept is not None:
            return _Found(**kept), True
        found = self._fresh(subject, precision)
        self._cache.keep(key, asdict(found))
        return found, False

    def _fresh(self, subject: Deployed, precision: str) -> _Found:
        timing = self._time(subject, precision)
        batch = subject.validation.images[: subject.target.batch]
        differences = subject.opened.differences(batch, subject.artifact.precisions)
        return _Found.of(timing, bool(subject.artifact.exits), differences)

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
