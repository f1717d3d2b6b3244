"""Latency of the deployed artifact on the target, paired with a reference of the same kind."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from evaluators.measurement import Measurement
from evaluators.runtimes.run_bundle import StagedNetwork
from evaluators.subject import Deployed
from evaluators.target import Runtime, Target
from evaluators.timing import Call, Clock, PairedTiming, Protocol, time_pair

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


def median_seconds(calls: Mapping[str, Call], clock: Clock, bursts: int = 60, burst: int = 5) -> dict[str, float]:
    """Returns the median wall-clock seconds of each call; bursts of all of them alternate."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(10):
            call()
    for _ in range(bursts):
        for name, call in calls.items():
            for index in range(burst):
                begin = clock.wall()
                call()
                if index:
                    samples[name].append(clock.wall() - begin)
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
        self._clock = Clock.for_threads(target.threads)

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

    def same_twice(self, precision: str, images: NDArray[np.float32]) -> float:
        """Returns the ratio of a reference to itself, loaded twice: how far from 1 a ratio may be by chance."""
        first, second = self._load(precision), self._load(precision)
        images = images[: reference_batch(self._target.batch)]
        return time_pair([lambda: first(images)], [1], lambda: second(images), self.protocol, self._clock).ratio

    def _time(self, subject: Deployed, precision: str) -> PairedTiming:
        images, batch = subject.validation.images, subject.target.batch
        first = images[:batch]
        calls: list[Call] = [lambda: subject.staged(first)]
        weights = [1.0]
        if subject.artifact.exits:
            calls = [_call(subject.staged, images[start : start + batch]) for start, _ in subject.answers.profiles]
            weights = [float(count) for _, count in subject.answers.profiles]
            calls.append(_call(subject.longest, first))
            weights.append(0.0)
        reference, some = self._load(precision), images[: reference_batch(batch)]
        protocol = self._protocol(bool(subject.artifact.exits))
        return time_pair(calls, weights, lambda: reference(some), protocol, self._clock)

    def _protocol(self, dynamic: bool) -> Protocol:
        return replace(self.protocol, turns=_TURNS_WITH_EXITS) if dynamic else self.protocol

    def _load(self, precision: str) -> StagedNetwork:
        # Loaded for each timing: idle sessions beside the two that alternate would change what the caches hold.
        return StagedNetwork([self._runtime.load(self.references[precision].model, self._target.threads)], [])

    def _majority(self, subject: Deployed) -> str:
        layers = list(subject.candidate.precision.values())
        return max(self.references, key=layers.count)


def _call(network: StagedNetwork, images: NDArray[np.float32]) -> Call:
    return lambda: network(images)
