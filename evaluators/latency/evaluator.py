"""Latency of the deployed artifact on the target, paired with a reference of the same kind."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from evaluators.artifact import Artifact
from evaluators.data import bytes_of
from evaluators.deployed import LoadedArtifact
from evaluators.latency.cache import LatencyCache, structure_key
from evaluators.measurement import Measurement
from evaluators.runtimes.base import Images, Proof, Runtime, Session, Spent, Target, TimedBatch
from evaluators.runtimes.device_state import DeviceState, state_moved
from evaluators.runtimes.paired_timing import PairedTiming, TimingProtocol, time_pair
from evaluators.streams import timed_frames

_IMAGES_BYTES = 32_000_000
_IMAGES_AT_MOST = 64
"""So many batches at most, and so many bytes of them, are timed where images decide what they cost."""

Profiles = Sequence[tuple[int, int]]
"""Batches that stand for all: their first images, and for how many each."""
LEFT = "left at "
"""The notes that tell the share of images that leaves at each exit, followed by its name."""
_SUCCESSION = "different images in random order, each way through the stages as often as it occurs"
FIRST: Profiles = ((0, 1),)
"""The first batch stands for all."""
CLOCKS = {
    "cpu": "CPU time, or of wall-clock time with several threads",
    "gpu": "CUDA events, copies included, to which the host's part of a call is added as the wall clock shows it",
}
"""What tells work, and what is added to it, by the name that a target's capabilities give it."""


@dataclass(frozen=True)
class Paths:
    """What ways out of a network cost.

    Args:
        seconds: of a batch that leaves as one at each exit and, last, of one that goes to the end.
        half_width: of the 95% interval of their mean, as a share of it.
    """

    seconds: tuple[float, ...]
    half_width: float


@dataclass(frozen=True)
class Reference:
    """What candidates are timed beside: a dense network of one precision, and how long a batch took it.

    Args:
        model: the deployed file.
        seconds: its median work for `reference_batch` images when the search began, by the clock that ratios are in.
        name: what it is; the dense network where not given.
    """

    model: bytes
    seconds: float
    name: str = ""


def reference_batch(batch: int) -> int:
    """Returns the batch of the reference: a quarter of the candidate's, so that most of the time goes to the latter."""
    return -(-batch // 4)


def median_seconds(
    opened: Mapping[str, Session], images: Images, bursts: int = 60, at_least_s: float = 2.0
) -> dict[str, Spent]:
    """Returns what each artifact takes for `images`, medians in seconds, in turn with each other.

    The first one's is the median over its bursts; the others' are that times the median of their ratios to it, burst by
    burst. So a machine that changes its speed meanwhile changes that of all, and not how they compare. Bursts are as
    long as those of candidates, and their first call does not count either.

    Args:
        opened: artifacts by name.
        images: one batch.
        bursts: of each artifact, at least.
        at_least_s: seconds that all of it takes: a speed may last for one.
    """
    lengths = [_burst_length(item, images) for item in opened.values()]
    rounds: list[NDArray[np.float64]] = []
    begin = time.perf_counter()
    while len(rounds) < bursts or time.perf_counter() - begin < at_least_s:
        taken = [item.seconds(images, calls)[1:] for item, calls in zip(opened.values(), lengths, strict=True)]
        rounds.append(np.array([np.mean([(each.work, each.wall) for each in some], axis=0) for some in taken]))
    found = np.stack(rounds)  # (rounds, artifacts, work and wall)
    medians = np.median(found[:, 0], axis=0) * np.median(found / found[:, :1], axis=0)
    return {name: Spent(float(work), float(wall)) for name, (work, wall) in zip(opened, medians, strict=True)}


def _burst_length(opened: Session, images: Images) -> int:
    """Returns how many calls a burst has, after some to warm up."""
    return TimingProtocol().length(float(np.median([spent.work for spent in opened.seconds(images, 10)])))


def slower_launch(launches: Mapping[str, float]) -> list[str]:
    """Returns, in words, that the way in which a batch is launched is not the fastest, where it is not by 2%."""
    if len(launches) < 2:
        return []
    (way, seconds), (other, others) = list(launches.items())[:2]
    slower = f"a batch takes {seconds * 1e3:.3f} ms {way}, as it is deployed, and {others * 1e3:.3f} ms {other}"
    return [slower] if seconds > 1.02 * others else []


def _told_ways(subject: LoadedArtifact) -> str:
    """Returns, in words, which ways through the blocks were timed; nothing where no block may be skipped."""
    if not subject.artifact.blocks:
        return ""
    timed, ways = len(subject.answers.profiles), subject.answers.ways
    if timed == ways:
        return f"; each of {ways} ways through the blocks timed"
    return (
        f"; {timed} batches timed for {ways} ways through the blocks, each for an equal share, by what they leave out"
    )


@dataclass(frozen=True)
class _Found:
    """What is kept of a timing: ratios to the reference, and the candidate's seconds by the clocks.

    Args:
        ratio: of work, candidate to reference.
        half_width: of its 95% interval, as a share of it.
        worst_ratio: of the longest path.
        calls: of the candidate that were counted.
        work_s: its work, seconds.
        wait_s: what a caller waits beyond it.
        worst_wait_s: the same on the longest path.
        wall_median: seconds on the wall.
        wall_cv: their standard deviation over their mean.
        tails: percentiles on the wall, as multiples of what is typical there.
        launches: median seconds of each way to launch a batch.
        remarks: on the precisions that layers run in.
        unproven: layers that do not tell theirs.
        states: what the device told of itself before and after.
    """

    ratio: float
    half_width: float
    worst_ratio: float
    calls: int
    work_s: float
    wait_s: float
    worst_wait_s: float
    wall_median: float
    wall_cv: float
    tails: dict[str, float]
    launches: dict[str, float]
    remarks: list[str]
    unproven: list[str]
    states: dict[str, dict[str, float | str]]

    @classmethod
    def of(
        cls,
        timing: PairedTiming,
        dynamic: bool,
        launches: dict[str, float],
        proof: Proof,
        before: DeviceState,
        after: DeviceState,
    ) -> Self:
        return cls(
            ratio=timing.ratio,
            half_width=timing.half_width,
            worst_ratio=timing.per_input[-1] if dynamic else timing.ratio,
            calls=len(timing.wall_s),
            work_s=timing.work_s,
            wait_s=timing.wait_s,
            worst_wait_s=timing.waits_s[-1] if dynamic else timing.wait_s,
            wall_median=timing.wall_percentile(50),
            wall_cv=timing.wall_cv,
            tails={f"p{p}": timing.wall_percentile(p) / timing.typical_wall_s for p in (90, 95, 99)},
            launches=launches,
            remarks=[*proof.remarks(), *state_moved(before, after)],
            unproven=list(proof.unproven),
            states={"before": before.told(), "after": after.told()} if before.told() else {},
        )


def _timed_batches(subject: LoadedArtifact, leaving: Sequence[float]) -> tuple[list[TimedBatch], list[float]]:
    """Returns what is timed of a subject, and how often each occurs; with a choice of paths, the longest comes last.

    Args:
        subject: with the images that tell how often.
        leaving: the share of images that leaves at each exit, where other images told it; else nothing.
    """
    batch, reuse = subject.target.batch, subject.artifact.reuse
    if reuse is not None and subject.answers.answering is not None:
        differ = bool(subject.artifact.exits or subject.artifact.blocks)
        return timed_frames(subject.answers.answering, subject.answers.profiles, reuse, differ)
    if not subject.artifact.is_dynamic:
        return [TimedBatch(0, batch)], [1.0]
    profiles, alike = subject.answers.profiles, subject.answers.alike
    each = max(_several(subject) // len(profiles), 1)
    batches = [
        TimedBatch(start, batch, others=others[: each - 1]) for (start, _), others in zip(profiles, alike, strict=True)
    ]
    return [*batches, TimedBatch(0, batch, longest=True)], [*_weights(subject, leaving), 0.0]


def _several(subject: LoadedArtifact) -> int:
    """Returns how many batches of images are held in memory to be timed."""
    batch = bytes_of(subject.validation.images[: subject.target.batch])
    return min(_IMAGES_AT_MOST, max(_IMAGES_BYTES // batch, 1))


def _spread(subject: LoadedArtifact, count: int) -> tuple[int, ...]:
    """Returns the first images of at most so many batches from all over the validation images."""
    batch, images = subject.target.batch, len(subject.validation)
    starts = range(0, images - batch + 1, batch)
    return tuple(starts[:: max(len(starts) // count, 1)][1:count])


def _left(subject: LoadedArtifact) -> dict[str, float]:
    """Returns the share of images that leaves at each exit, by the notes' names."""
    if not subject.artifact.exits:
        return {}
    places = [*subject.artifact.exits, "end"]
    return {f"{LEFT}{name}": share for name, share in zip(places, subject.answers.leaving, strict=True)}


def _weights(subject: LoadedArtifact, leaving: Sequence[float]) -> list[float]:
    """Returns how often each profile occurs: among the images, or where the exits' shares are given, as those say."""
    profiles, batch = subject.answers.profiles, subject.target.batch
    counts = [float(count) for _, count in profiles]
    exits = [int(subject.answers.exits[start]) for start, _ in profiles]
    if batch > 1 or subject.artifact.blocks or {place for place, share in enumerate(leaving) if share} != set(exits):
        return counts
    return [leaving[place] for place in exits]  # one image at a time, so each exit has one profile


def _statistic(artifact: Artifact) -> str:
    if artifact.reuse is not None:
        return "expected over the frames of the validation stream"
    return "expected over the validation images" if artifact.is_dynamic else "median"


class LatencyEvaluator:
    """Seconds per batch that a caller waits.

    A candidate's work is its ratio to the reference times the work of the reference when the search began, by the same
    clock: the CPU's, or the GPU's events. So all trials of a search are told at one speed of the machine, however that
    drifts. On a GPU a call has a part on the host as well: the copy into page-locked memory, the launch, the wait.
    It does not shrink with the network, so it is added as it was, not scaled: scaled with the reference's, it would
    make a network of half the kernels look as if it were launched in half the time. On a CPU what the wall clock
    shows beyond the work is other programs' time, and is left out.

    Percentiles are the wall clock's, in multiples of what is typical on it, times the latency: in a slow minute the
    bare ones would stand apart from a latency that is told at the reference's speed.

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
        protocol: TimingProtocol | None = None,
        cache: LatencyCache | None = None,
    ) -> None:
        self.references = dict(references)
        self.protocol = protocol or TimingProtocol()
        self._runtime = runtime
        self._target = target
        able = runtime.capabilities()
        self._clock = able.clock
        self._cache = cache if able.compiles else None

    def measure(self, subject: LoadedArtifact, leaving: Sequence[float] = ()) -> Measurement:
        """Returns the median seconds per batch, or with exits the expected ones, and the longest path's beside.

        Args:
            subject: what is timed.
            leaving: the share of images that leaves at each exit, where other images than the subject's told it.
        """
        precision = self.majority(subject)
        found, known = self._known(subject, precision, leaving)
        reference_s = self.references[precision].seconds
        value = self._waited(found.ratio, found.wait_s, reference_s)
        return Measurement(
            metric="latency",
            value=value,
            statistic=_statistic(subject.artifact),
            n=found.calls,
            spread=found.half_width / 1.96 * found.ratio * reference_s,
            target=str(subject.target),
            protocol=self._told(subject, precision, known, found) + _told_ways(subject),
            others={
                **{name: tail * value for name, tail in found.tails.items()},
                "worst": self._waited(found.worst_ratio, found.worst_wait_s, reference_s),
            },
            # Work by the CPU's or GPU's own clock and time on the wall, apart, as they were at that moment.
            notes={
                "ratio": found.ratio,
                "half_width": found.half_width,
                "work_s": found.work_s,
                "wait_s": found.wait_s,
                "wall_median": found.wall_median,
                "wall_cv": found.wall_cv,
                "boundaries": subject.artifact.boundaries,
                **_left(subject),
                # How many times as long as when the search began the reference takes now.
                **({} if known else {"drift": found.work_s / found.ratio / reference_s}),
                **{f"seconds {way}": seconds for way, seconds in found.launches.items()},
            },
            remarks=(*found.remarks, *slower_launch(found.launches)),
            unproven=tuple(found.unproven),
            states=found.states,
        )

    def _waited(self, ratio: float, wait_s: float, reference_s: float) -> float:
        return ratio * reference_s + (wait_s if self._clock == "gpu" else 0.0)

    def _told(self, subject: LoadedArtifact, precision: str, known: bool, found: _Found) -> str:
        clock = CLOCKS[self._clock]
        beside = self.references[precision]
        reference = f"{beside.name or f'dense {precision}'}, {beside.seconds * 1e3:.3f} ms of {clock}"
        told = [str(self.protocol), f"reference: {reference}"]
        told += [_SUCCESSION] if subject.artifact.is_dynamic else []
        told.append("percentiles: the wall clock's, over its own median, times the latency")
        told += [f"launched {way}, as it is deployed" for way in list(found.launches)[:1]]
        return "; ".join([*told, *(["kept from an earlier measurement of the same shapes"] if known else [])])

    def _known(self, subject: LoadedArtifact, precision: str, leaving: Sequence[float]) -> tuple[_Found, bool]:
        """Returns a timing and whether it had been kept: only where loading compiles, and no input decides the path."""
        if self._cache is None or subject.artifact.is_dynamic:
            return self._fresh(subject, precision, leaving), False
        reference = self.references[precision].model
        form = " ".join(field.name for field in fields(_Found))  # what another form kept cannot be read
        circumstances = (self._runtime.version(), str(subject.target), str(self.protocol), form)
        key = structure_key([*subject.artifact.deployed, reference], *circumstances)
        kept = self._cache.find(key)
        if kept is not None:
            return _Found(**kept), True
        found = self._fresh(subject, precision, leaving)
        self._cache.keep(key, asdict(found))
        return found, False

    def _fresh(self, subject: LoadedArtifact, precision: str, leaving: Sequence[float]) -> _Found:
        before = self._runtime.state()
        timing = self._pair(subject, precision, *_timed_batches(subject, leaving))
        after = self._runtime.state()
        batch = subject.validation.images[: subject.target.batch]
        proof = subject.session.proof(batch, subject.artifact.precisions)
        launches = subject.session.launches(batch)
        return _Found.of(timing, subject.artifact.is_dynamic, launches, proof, before, after)

    def paths(
        self, subject: LoadedArtifact, profiles: Profiles = FIRST, shares: Sequence[float] = ()
    ) -> tuple[float, ...]:
        """Returns the seconds of a batch that leaves as one at each exit, and of one that goes to the end."""
        return self.timed_paths(subject, profiles, shares).seconds

    def timed_paths(self, subject: LoadedArtifact, profiles: Profiles = FIRST, shares: Sequence[float] = ()) -> Paths:
        """Returns the seconds of a batch that leaves as one at each exit, and of one that goes to the end.

        Args:
            subject: with its exits.
            profiles: what is timed: more than the first batch where images decide which blocks they pass by.
            shares: how often batches leave at each, which tells what the caches hold; equally often where not given.
        """
        batch, precision = subject.target.batch, self.majority(subject)
        starts, counts = zip(*profiles, strict=True)
        places = range(len(subject.artifact.exits) + 1)
        # Where images decide which blocks they pass by, each start stands for its own way.
        others = () if subject.artifact.blocks else _spread(subject, max(_several(subject) // len(places), 1))
        batches = [TimedBatch(start, batch, exit=place, others=others) for place in places for start in starts]
        often = np.outer(shares or [1.0] * len(places), counts).ravel()
        timing = self._pair(subject, precision, batches, often.tolist())
        reference_s = self.references[precision].seconds
        waits = zip(timing.per_input, timing.waits_s, strict=True)
        each = np.array([self._waited(ratio, wait, reference_s) for ratio, wait in waits])
        means = np.average(each.reshape(len(places), len(starts)), axis=1, weights=counts)
        return Paths(tuple(means.tolist()), timing.half_width)

    def same_twice(self, precision: str, images: Images) -> float:
        """Returns the ratio of a reference to itself, loaded twice: how far from 1 a ratio may be by chance."""
        count = reference_batch(self._target.batch)
        first, second = self._load(precision), self._load(precision)
        turns = first.turns(images, [TimedBatch(0, count)], second, count, self.protocol)
        return time_pair(turns, [1.0], self.protocol, time.perf_counter).ratio

    def _pair(
        self, subject: LoadedArtifact, precision: str, batches: Sequence[TimedBatch], weights: Sequence[float]
    ) -> PairedTiming:
        images, reference = subject.validation.images, self._load(precision)
        timed = [replace(batch, share=weight) for batch, weight in zip(batches, weights, strict=True)]
        turns = subject.session.turns(images, timed, reference, reference_batch(subject.target.batch), self.protocol)
        return time_pair(turns, weights, self.protocol, time.perf_counter)

    def _load(self, precision: str) -> Session:
        # Loaded for each timing: idle sessions beside the two that alternate would change what the caches hold.
        return self._runtime.open([self.references[precision].model], [], self._target.threads)

    def majority(self, subject: LoadedArtifact) -> str:
        """Returns the precision of the reference that a subject is timed beside: that of most of its layers."""
        layers = list(subject.candidate.precision.values())
        return max(self.references, key=layers.count)
