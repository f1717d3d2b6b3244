"""How long a call takes, told so that two answers a minute apart agree.

Processors change speed by 10 to 30 percent, within seconds. So a candidate is never timed alone: it takes turns with a
reference that runs the same kind of kernels, and what is kept of a turn is the ratio of the two, in the thread's own
CPU time. The median over turns then stands still where percentiles of either side, and their ratio, wander with the
machine: on a machine that switches between two speeds, a ratio of tenth percentiles varied by 4 to 6% at equal cost,
the median of paired ratios by 1%. Wall-clock percentiles are kept beside it.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Call = Callable[[], object]
TakeTurn = Callable[[bool], "Turn"]
"""Takes one turn of every input; told whether the candidate goes first."""

_RESAMPLES = 200


@dataclass(frozen=True)
class Clock:
    """Two clocks, in seconds: work done, and time gone by."""

    work: Callable[[], float]
    wall: Callable[[], float]

    @staticmethod
    def for_threads(threads: int) -> "Clock":
        """Returns this thread's CPU time as the clock of work, or wall-clock time where several threads share it."""
        return Clock(time.thread_time if threads == 1 else time.perf_counter, time.perf_counter)


@dataclass(frozen=True)
class Protocol:
    """How a pair is timed.

    Args:
        warmups: calls before the first timed one, of each side.
        burst: calls in a row.
        dropped: calls at the start of a burst that are not counted, because the other side has emptied the caches; of
            inputs that take ways of their own they are of any, as often as they occur.
        turns: of each input, before the timing may stop.
        half_width: it stops when the 95% interval of the ratio is this narrow, as a share of it.
        calls: it stops at this many calls of the candidate.
        limit_s: it stops after this long, once every input has had two turns.
    """

    warmups: int = 5
    burst: int = 2
    dropped: int = 1
    turns: int = 12
    half_width: float = 0.02
    calls: int = 600
    limit_s: float = 0.6

    def __str__(self) -> str:
        return (
            f"bursts of {self.burst} in turn with a reference, first {self.dropped} dropped, median of paired ratios, "
            f"until the bootstrapped 95% interval is within {self.half_width:.0%}, {self.calls} calls or "
            f"{self.limit_s:g} s"
        )


@dataclass(frozen=True)
class Turn:
    """One turn of every input.

    Args:
        ratios: of work, candidate to reference, for each input.
        works: seconds of the candidate's work by its own clock, the CPU's or the GPU's, for each input.
        walls: wall-clock seconds of the candidate's counted calls, for each input.
    """

    ratios: Sequence[float]
    works: Sequence[float]
    walls: Sequence[Sequence[float]]


@dataclass(frozen=True)
class PairedTiming:
    """What a timing found.

    Args:
        ratio: candidate to reference.
        half_width: of the ratio's 95% interval, as a share of it.
        per_input: the ratio of each input alone.
        work_s: seconds of the candidate's work by its own clock, the CPU's or the GPU's.
        shares: how often each input occurs.
        waits_s: for each input, the median wall-clock seconds of a call beyond its work, at least 0.
        typical_wall_s: wall-clock seconds of a call: each input's median, at its weight.
        wall_s: wall-clock seconds of the candidate's counted calls.
        wall_weights: how much each of them counts.
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
        """Seconds that a caller waits beyond the work, every input at its weight."""
        return float(np.dot(self.waits_s, self.shares))

    @property
    def wall_cv(self) -> float:
        """The coefficient of variation of the wall-clock time: its standard deviation over its mean."""
        mean = np.average(self.wall_s, weights=self.wall_weights)
        return float(np.sqrt(np.average((self.wall_s - mean) ** 2, weights=self.wall_weights)) / mean)

    def wall_percentile(self, percent: float) -> float:
        """Returns a percentile of the candidate's wall-clock time, in seconds, every input at its weight."""
        return weighted_percentile(self.wall_s, self.wall_weights, percent)


def weighted_percentile(values: Floats, weights: Floats, percent: float) -> float:
    """Returns the smallest value that `percent` of the weight does not exceed."""
    order = np.argsort(values)
    reached = np.cumsum(weights[order]) / weights.sum()
    return float(values[order][min(int(np.searchsorted(reached, percent / 100)), len(order) - 1)])


def time_pair(
    take_turn: TakeTurn, weights: Sequence[float], protocol: Protocol, wall: Callable[[], float], seed: int = 0
) -> PairedTiming:
    """Returns how long a candidate takes beside its reference.

    Args:
        take_turn: runs both, here or on a board.
        weights: how often each input occurs; 0 times it without counting it in.
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
        # Who goes first alternates, so that a drift within the turn does not favour a side.
        turns.append(take_turn(len(turns) % 2 == 0))
        late = wall() - begin >= protocol.limit_s or len(turns) * protocol.burst * len(weights) >= protocol.calls
        if len(turns) < protocol.turns and not (late and len(turns) >= 2):
            continue
        ratios = np.array([turn.ratios for turn in turns])
        half_width = _half_width(ratios, shares, rng)
        if late or half_width <= protocol.half_width:
            return _result(turns, shares, half_width)


def turns_of(
    candidate: Sequence[Call], reference: Call, protocol: Protocol, clock: Clock, shares: Sequence[float] = ()
) -> TakeTurn:
    """Returns turns between calls of this process, which have been warmed up.

    What comes before a timed call is drawn from all inputs: the layers that most of them leave out are not in the
    caches, so that a ResNet-20 with exits takes 5% longer than its ways do over and over.

    Args:
        candidate: one call per input that may take a time of its own.
        reference: what it is compared with.
        protocol: how long a burst is.
        clock: what to read.
        shares: how often each input occurs, in any unit; equally often where not given.
    """
    often = np.array(shares or [1.0] * len(candidate))
    rng, chances = np.random.default_rng(0), often / often.sum()
    for _ in range(protocol.warmups):
        reference()
        candidate[0]()
    for call in candidate[1:]:  # they share the first one's code, so once is enough
        call()

    def take_turn(candidate_first: bool) -> Turn:
        before = rng.choice(len(candidate), len(candidate), p=chances)
        pairs = [(candidate[index], call) for index, call in zip(before, candidate, strict=True)]
        taken = [_turn(pair, (reference, reference), protocol, clock, candidate_first) for pair in pairs]
        return Turn(
            ratios=[work / beside for work, beside, _ in taken],
            works=[work for work, _, _ in taken],
            walls=[wall.tolist() for _, _, wall in taken],
        )

    return take_turn


def _turn(
    candidate: tuple[Call, Call],
    reference: tuple[Call, Call],
    protocol: Protocol,
    clock: Clock,
    candidate_first: bool,
) -> tuple[float, float, Floats]:
    """Returns the two sides' median work and the candidate's wall-clock seconds; a side has what comes before it."""
    if candidate_first:
        work, wall = _burst(*candidate, protocol, clock)
        beside, _ = _burst(*reference, protocol, clock)
    else:
        beside, _ = _burst(*reference, protocol, clock)
        work, wall = _burst(*candidate, protocol, clock)
    return float(np.median(work)), float(np.median(beside)), wall


def _burst(before: Call, call: Call, protocol: Protocol, clock: Clock) -> tuple[Floats, Floats]:
    for _ in range(protocol.dropped):
        before()
    counted = protocol.burst - protocol.dropped
    work, wall = np.empty(counted), np.empty(counted)
    for index in range(counted):
        work_before, wall_before = clock.work(), clock.wall()
        call()
        work[index], wall[index] = clock.work() - work_before, clock.wall() - wall_before
    return work, wall


def _half_width(ratios: Floats, shares: Floats, rng: np.random.Generator) -> float:
    """Returns the bootstrapped half-width for `ratios` of shape `(turns, inputs)`, turns drawn anew for each input."""
    turns, inputs = ratios.shape
    picks = rng.integers(0, turns, (_RESAMPLES, turns, inputs))
    resampled = np.median(ratios[picks, np.arange(inputs)], axis=1) @ shares
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float((high - low) / 2 / np.median(resampled))


def _result(turns: Sequence[Turn], shares: Floats, half_width: float) -> PairedTiming:
    per_input = np.median([turn.ratios for turn in turns], axis=0)
    walls = np.array([turn.walls for turn in turns])
    works = np.array([turn.works for turn in turns])
    waits = np.maximum(np.median(np.median(walls, axis=2) - works, axis=0), 0)
    count, _, counted = walls.shape
    return PairedTiming(
        ratio=float(per_input @ shares),
        half_width=half_width,
        per_input=tuple(float(ratio) for ratio in per_input),
        work_s=float(np.median(works, axis=0) @ shares),
        shares=tuple(float(share) for share in shares),
        waits_s=tuple(float(wait) for wait in waits),
        typical_wall_s=float(np.median(walls, axis=(0, 2)) @ shares),
        wall_s=walls.ravel(),
        wall_weights=np.broadcast_to(shares[None, :, None] / (count * counted), walls.shape).ravel(),
    )
