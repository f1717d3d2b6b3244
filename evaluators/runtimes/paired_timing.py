"""Times a call relative to a reference, so that two measurements a minute apart agree.

Processors change speed by 10 to 30 percent within seconds. So a candidate is never timed alone: it takes turns with a
reference that runs the same kind of kernels, and each turn gives the ratio of their mean times, in the thread's own CPU
time. The median ratio over turns is stable, while percentiles of either side, and their ratio, vary with the machine:
on a machine that switches between two speeds, a ratio of tenth percentiles varied by 4 to 6% at equal cost, the median
of paired ratios by 1%. Percentiles of wall-clock time are reported as well.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Call = Callable[[], object]
TakeTurn = Callable[[bool], "Turn"]
"""Takes one turn of every input; the argument is whether the candidate goes first."""

_RESAMPLES = 200
_MAX_BURST = 2000
"""The largest number of calls in a burst."""
_MAX_OVERRUN = 4
"""A timing stops at this multiple of its time limit, however wide its interval is."""
_SHORTER_IF_UNUSED = 4
"""The factor by which bursts of inputs that never occur are shorter."""


@dataclass(frozen=True)
class Clock:
    """Two clocks, in seconds: work, and wall-clock time."""

    work: Callable[[], float]
    wall: Callable[[], float]

    @staticmethod
    def for_threads(threads: int) -> "Clock":
        """Returns the clocks for a number of threads: work is this thread's CPU time; with several, wall-clock time."""
        return Clock(time.thread_time if threads == 1 else time.perf_counter, time.perf_counter)


@dataclass(frozen=True)
class TimingProtocol:
    """How a pair is timed.

    Calls come back to back, so that caches are in the state of steady use: if candidate and reference alternated call
    by call, both would start cold, and a ResNet's int8 file would take 0.53 of the dense one's time instead of 0.43.

    Args:
        warmups: calls before the first timed one, of each side.
        burst: calls in a row, at least.
        dropped: calls at the start of a burst that are not counted, because the other side has emptied the caches.
        burst_s: seconds of work that a burst takes, at least, as far as the warm-up could tell.
        turns: of each side, before the timing may stop.
        half_width: it stops when the 95% interval of the ratio is this narrow, as a share of it.
        calls: it stops at this many calls of the candidate, where no burst has more than it must.
        limit_s: after this long half as many turns and twice the interval are enough. It stops in any case after four
            times as long, once each side has had two turns: on a busy machine a turn takes long.
    """

    warmups: int = 5
    burst: int = 2
    dropped: int = 1
    burst_s: float = 0.012
    turns: int = 12
    half_width: float = 0.02
    calls: int = 600
    limit_s: float = 0.6

    def __str__(self) -> str:
        return (
            f"calls back to back, as in steady use: bursts of {self.burst_s * 1e3:g} ms or {self.burst} calls in turn"
            f" with a reference, first {self.dropped} dropped, median of the ratios of their means, until the"
            f" bootstrapped 95% interval is within {self.half_width:.0%} or {self.limit_s:g} s are over"
        )

    def length(self, seconds: float) -> int:
        """Returns the number of calls in a burst, for calls that take this many seconds of work."""
        calls = self.dropped + math.ceil(self.burst_s / seconds) if seconds > 0 else 0
        return max(self.burst, min(calls, _MAX_BURST))


@dataclass(frozen=True)
class Turn:
    """One turn of every input.

    Args:
        ratios: of work, candidate to reference, for each input.
        works: seconds of the candidate's work by its own clock, the CPU's or the GPU's, for each input.
        walls: wall-clock seconds of the candidate's counted calls, for each input: as many as in any other turn.
    """

    ratios: Sequence[float]
    works: Sequence[float]
    walls: Sequence[Sequence[float]]


@dataclass(frozen=True)
class PairedTiming:
    """The result of a timing.

    Args:
        ratio: the candidate's work divided by the reference's.
        half_width: of the ratio's 95% confidence interval, relative to the ratio.
        per_input: the ratio of each input alone.
        work_s: seconds of the candidate's work by its own clock, the CPU's or the GPU's.
        shares: how often each input occurs.
        waits_s: for each input, the median wall-clock seconds of a call beyond its work, at least 0.
        typical_wall_s: wall-clock seconds of a call: the mean of the inputs' medians, weighted by `shares`.
        wall_s: wall-clock seconds of the candidate's counted calls.
        wall_weights: the weight of each of these calls.
    """

    ratio: float
    half_width: float
    per_input: tuple[float, ...]
    work_s: float
    shares: tuple[float, ...]
    waits_s: tuple[float, ...]
    typical_wall_s: float
    wall_s: Floats
    wall_weights: Floats

    @property
    def wait_s(self) -> float:
        """Seconds that a caller waits beyond the work, the mean over inputs weighted by `shares`."""
        return float(np.dot(self.waits_s, self.shares))

    @property
    def wall_cv(self) -> float:
        """The coefficient of variation of the wall-clock time: its standard deviation over its mean."""
        mean = np.average(self.wall_s, weights=self.wall_weights)
        return float(np.sqrt(np.average((self.wall_s - mean) ** 2, weights=self.wall_weights)) / mean)

    def wall_percentile(self, percent: float) -> float:
        """Returns a percentile of the candidate's wall-clock time, in seconds, over inputs weighted by `shares`."""
        return weighted_percentile(self.wall_s, self.wall_weights, percent)


def weighted_percentile(values: Floats, weights: Floats, percent: float) -> float:
    """Returns the smallest value such that at least `percent` of the weight is on values up to it."""
    order = np.argsort(values)
    reached = np.cumsum(weights[order]) / weights.sum()
    return float(values[order][min(int(np.searchsorted(reached, percent / 100)), len(order) - 1)])


def time_pair(
    take_turn: TakeTurn, weights: Sequence[float], protocol: TimingProtocol, wall: Callable[[], float], seed: int = 0
) -> PairedTiming:
    """Returns the timing of a candidate relative to its reference.

    Args:
        take_turn: takes one turn of both, on this machine or on a board.
        weights: how often each input occurs; inputs of weight 0 are timed but do not count in the ratio.
        protocol: when to stop.
        wall: a clock, in seconds.
        seed: of the bootstrap.

    Raises:
        ValueError: there is no input, or none has a weight.
    """
    if not weights or sum(weights) <= 0:
        raise ValueError(f"every input has a weight and one is above 0, got {list(weights)}")
    shares = np.asarray(weights, dtype=np.float64) / sum(weights)
    rng = np.random.default_rng(seed)
    turns: list[Turn] = []
    begin = wall()
    while True:
        # The side that goes first alternates, so that a drift within a turn favours neither.
        turns.append(take_turn(len(turns) % 2 == 0))
        spent = wall() - begin
        late = spent >= protocol.limit_s
        over = spent >= _MAX_OVERRUN * protocol.limit_s or len(turns) * protocol.burst * len(weights) >= protocol.calls
        if len(turns) < (protocol.turns // 2 if late else protocol.turns) and not (over and len(turns) >= 2):
            continue
        half_width = _half_width(np.array([turn.ratios for turn in turns]) @ shares, rng)
        if over or half_width <= protocol.half_width * (2 if late else 1):
            return _result(turns, shares, half_width)


def turns_of(
    candidate: Sequence[Call], reference: Call, protocol: TimingProtocol, clock: Clock, shares: Sequence[float] = ()
) -> TakeTurn:
    """Returns a function that takes turns between calls of this process, after warming them up.

    Inputs with different paths come in random order, each as often as it occurs in deployment. Layers that most inputs
    skip are then not in the caches: two files that take 0.366 and 0.130 of a network's time when each is repeated take
    0.545 one after the other. An input that never occurs is timed by repeating it.

    Args:
        candidate: one call for each input that may take a different time.
        reference: the call that it is compared with.
        protocol: the length of bursts.
        clock: the clock to read.
        shares: how often each input occurs, in any unit; equally often by default.
    """
    weights = np.array(shares or [1.0] * len(candidate))
    reference_calls = protocol.length(_warmed_up([reference], protocol, clock))
    candidate_calls = protocol.length(_warmed_up(candidate, protocol, clock))
    return _Turns(candidate, reference, protocol, clock, weights / weights.sum(), candidate_calls, reference_calls)


def _warmed_up(calls: Sequence[Call], protocol: TimingProtocol, clock: Clock) -> float:
    """Returns the median seconds of work of the first call, after running the others once: they share its code."""
    taken = [_timed(calls[0], clock)[0] for _ in range(protocol.warmups)]
    for call in calls[1:]:
        call()
    return float(np.median(taken)) if taken else 0.0


class _Turns:
    """Turns between a mix of a candidate's inputs and a reference.

    Args:
        candidate: one call per input.
        reference: the call that it is compared with.
        protocol: how many calls are dropped.
        clock: the clock to read.
        shares: how often each input occurs; their sum is 1.
        candidate_calls: number of calls in a burst of the candidate.
        reference_calls: number of calls in a burst of the reference.
    """

    def __init__(
        self,
        candidate: Sequence[Call],
        reference: Call,
        protocol: TimingProtocol,
        clock: Clock,
        shares: Floats,
        candidate_calls: int,
        reference_calls: int,
    ) -> None:
        self._candidate = tuple(candidate)
        self._reference_burst = [reference] * reference_calls
        self._clock = clock
        self._shares = shares
        self._dropped = protocol.dropped
        self._rng = np.random.default_rng(0)
        counted = candidate_calls - protocol.dropped
        calls_per_input = np.maximum(np.rint(shares * counted), 1).astype(int) * (shares > 0)
        self._mix = np.repeat(np.arange(len(shares)), calls_per_input)
        self._unused = {int(index): max(counted // _SHORTER_IF_UNUSED, 1) for index in np.flatnonzero(shares == 0)}

    def __call__(self, candidate_first: bool) -> Turn:
        """Returns one turn of every input."""
        if candidate_first:
            by_input = self._every_input()
            reference = self._burst(self._reference_burst)
        else:
            reference = self._burst(self._reference_burst)
            by_input = self._every_input()
        # The mean of a burst: that is what a loop takes, also where other programs empty the caches now and then.
        reference_work = float(np.mean([work for work, _ in reference]))
        works = [float(np.mean([work for work, _ in calls])) for calls in by_input]
        walls = [[wall for _, wall in calls] for calls in by_input]
        return Turn([work / reference_work for work in works], works, walls)

    def _every_input(self) -> list[list[tuple[float, float]]]:
        """Returns the work and the wall-clock seconds of each counted call, by input."""
        by_input: list[list[tuple[float, float]]] = [[] for _ in self._candidate]
        for index, count in self._unused.items():
            by_input[index] = self._burst([self._candidate[index]] * (self._dropped + count))
        dropped = self._rng.choice(len(self._shares), self._dropped, p=self._shares)
        order = [*dropped, *self._rng.permutation(self._mix)]
        calls = self._burst([self._candidate[index] for index in order])
        for index, seconds in zip(order[self._dropped :], calls, strict=True):
            by_input[index].append(seconds)
        return by_input

    def _burst(self, calls: Sequence[Call]) -> list[tuple[float, float]]:
        """Returns the work and the wall-clock seconds of each call but the first ones, which are dropped."""
        for call in calls[: self._dropped]:
            call()
        return [_timed(call, self._clock) for call in calls[self._dropped :]]


def _timed(call: Call, clock: Clock) -> tuple[float, float]:
    """Returns the work and the wall-clock seconds of a call."""
    work, wall = clock.work(), clock.wall()
    call()
    return clock.work() - work, clock.wall() - wall


def _half_width(ratios: Floats, rng: np.random.Generator) -> float:
    """Returns the bootstrapped half-width of the median of `ratios` of shape `(turns,)`, as a share of it."""
    resampled = np.median(ratios[rng.integers(0, len(ratios), (_RESAMPLES, len(ratios)))], axis=1)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float((high - low) / 2 / np.median(resampled))


def _result(turns: Sequence[Turn], shares: Floats, half_width: float) -> PairedTiming:
    ratios, works = np.array([turn.ratios for turn in turns]), np.array([turn.works for turn in turns])
    ratio, per_input = float(np.median(ratios @ shares)), np.median(ratios, axis=0)
    walls = [np.array([turn.walls[index] for turn in turns]) for index in range(len(shares))]  # each (turns, calls)
    means = np.array([taken.mean(axis=1) for taken in walls]).T  # (turns, inputs)
    weights = [np.full(taken.size, share / taken.size) for taken, share in zip(walls, shares, strict=True)]
    return PairedTiming(
        ratio=ratio,
        half_width=half_width,
        # The median over turns leaves out rare outliers of a rare input, which the ratio of the mix contains.
        per_input=tuple(map(float, per_input * (ratio / (per_input @ shares)))),
        work_s=float(np.median(works @ shares)),
        shares=tuple(float(share) for share in shares),
        waits_s=tuple(float(wait) for wait in np.maximum(np.median(means - works, axis=0), 0)),
        typical_wall_s=float(np.array([np.median(taken) for taken in walls]) @ shares),
        wall_s=np.concatenate([taken.ravel() for taken in walls]),
        wall_weights=np.concatenate(weights),
    )
