"""Latency of the deployed artifact on the target, timed in turn with a reference network."""

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
from evaluators.runtimes.device_state import DeviceState, state_changes
from evaluators.runtimes.paired_timing import PairedTiming, TimingProtocol, time_pair
from evaluators.streams import timed_frames

_MAX_TIMED_BYTES = 32_000_000
_MAX_TIMED_BATCHES = 64
"""At most this many batches, and bytes of images, are held in memory to time a network whose cost depends on them."""

Profiles = Sequence[tuple[int, int]]
"""Batches to time: the index of each one's first image, and the number of batches that it stands for."""
LEFT = "left at "
"""The prefix of the notes that hold the share of images that leave at each exit; the exit's name follows."""
_IMAGE_ORDER = "different images in random order, each way through the stages as often as it occurs"
FIRST: Profiles = ((0, 1),)
"""Only the first batch."""
CLOCKS = {
    "cpu": "CPU time, or of wall-clock time with several threads",
    "gpu": "CUDA events, copies included, to which the host's part of a call is added as the wall clock shows it",
}
"""What a latency's protocol says about the clock, by the name of the clock in a target's capabilities."""


@dataclass(frozen=True)
class Paths:
    """The latency of each exit path of a network.

    Args:
        seconds: of a batch that leaves as a whole at each exit and, last, of one that runs to the end.
        half_width: of the 95% confidence interval of their mean, relative to the mean.
    """

    seconds: tuple[float, ...]
    half_width: float


@dataclass(frozen=True)
class Reference:
    """The network that candidates are timed against: the dense network in one precision.

    Args:
        model: the deployed file.
        seconds: its median work for `reference_batch` images when the search began, by the target's clock.
        name: its name in a protocol; empty for the dense network.
    """

    model: bytes
    seconds: float
    name: str = ""


def reference_batch(batch: int) -> int:
    """Returns the reference's batch size: a quarter of the candidate's, so that the candidate gets most of the time."""
    return -(-batch // 4)


def median_seconds(
    sessions: Mapping[str, Session], images: Images, bursts: int = 60, at_least_s: float = 2.0
) -> dict[str, Spent]:
    """Returns the median time of each artifact on `images`, in seconds, with the artifacts timed in turn.

    The first artifact's time is the median over its bursts; each other one's is that times the median of its ratio to
    the first, burst by burst. So a change of the machine's speed affects all of them alike. Bursts are as long as those
    of candidates, and the first call of each is discarded as well.

    Args:
        sessions: loaded artifacts by name.
        images: one batch.
        bursts: the least number of bursts of each artifact.
        at_least_s: the least total time in seconds, because a CPU may keep one clock speed for about a second.
    """
    lengths = [_burst_length(session, images) for session in sessions.values()]
    rounds: list[NDArray[np.float64]] = []
    begin = time.perf_counter()
    while len(rounds) < bursts or time.perf_counter() - begin < at_least_s:
        pairs = zip(sessions.values(), lengths, strict=True)
        taken = [session.seconds(images, calls)[1:] for session, calls in pairs]
        rounds.append(np.array([np.mean([(call.work, call.wall) for call in calls], axis=0) for calls in taken]))
    seconds = np.stack(rounds)  # (rounds, artifacts, work and wall)
    medians = np.median(seconds[:, 0], axis=0) * np.median(seconds / seconds[:, :1], axis=0)
    return {name: Spent(float(work), float(wall)) for name, (work, wall) in zip(sessions, medians, strict=True)}


def _burst_length(session: Session, images: Images) -> int:
    """Returns the number of calls in a burst, after some calls to warm up."""
    return TimingProtocol().length(float(np.median([call.work for call in session.seconds(images, 10)])))


def slower_launch(launches: Mapping[str, float]) -> list[str]:
    """Returns a remark if the deployed launch mode is more than 2% slower than the other one."""
    if len(launches) < 2:
        return []
    (mode, seconds), (other, other_s) = list(launches.items())[:2]
    slower = f"a batch takes {seconds * 1e3:.3f} ms {mode}, as it is deployed, and {other_s * 1e3:.3f} ms {other}"
    return [slower] if seconds > 1.02 * other_s else []


def _block_paths_text(subject: LoadedArtifact) -> str:
    """Returns which paths through the blocks were timed, as a part of the protocol; empty without skippable blocks."""
    if not subject.artifact.blocks:
        return ""
    timed, paths = len(subject.answers.profiles), subject.answers.path_count
    if timed == paths:
        return f"; each of {paths} ways through the blocks timed"
    return (
        f"; {timed} batches timed for {paths} ways through the blocks, each for an equal share, by what they leave out"
    )


@dataclass(frozen=True)
class _Timing:
    """A timing as it is cached: ratios to the reference, and the candidate's times in seconds.

    The names of the fields are part of the cache's key.

    Args:
        ratio: the candidate's work divided by the reference's.
        half_width: of the ratio's 95% confidence interval, relative to the ratio.
        worst_ratio: the same ratio on the longest path.
        calls: the number of the candidate's calls that were counted.
        work_s: the candidate's work.
        wait_s: the time that a caller waits beyond the work.
        worst_wait_s: the same on the longest path.
        wall_median: the median wall-clock time.
        wall_cv: the coefficient of variation of wall-clock times.
        tails: percentiles of wall-clock times, as multiples of the typical one.
        launches: the median wall-clock time of each launch mode.
        remarks: on the precisions that layers run in, and on changes of the device's state.
        unproven: nodes whose precision the runtime does not report.
        states: the state of the device before and after the timing.
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
            remarks=[*proof.remarks(), *state_changes(before, after)],
            unproven=list(proof.unproven),
            states={"before": before.known(), "after": after.known()} if before.known() else {},
        )


def _timed_batches(subject: LoadedArtifact, leaving: Sequence[float]) -> tuple[list[TimedBatch], list[float]]:
    """Returns the batches to time, and how often each occurs; of a dynamic network, the longest path comes last.

    Args:
        subject: the artifact, with the images that decide how often each path occurs.
        leaving: the share of images that leave at each exit, if it was measured on other images; else empty.
    """
    batch, reuse = subject.target.batch, subject.artifact.reuse
    if reuse is not None and subject.answers.key_frames is not None:
        is_dynamic = bool(subject.artifact.exits or subject.artifact.blocks)
        return timed_frames(subject.answers.key_frames, subject.answers.profiles, reuse, is_dynamic)
    if not subject.artifact.is_dynamic:
        return [TimedBatch(0, batch)], [1.0]
    profiles, same_path = subject.answers.profiles, subject.answers.same_path
    per_profile = max(_batch_limit(subject) // len(profiles), 1)
    batches = [
        TimedBatch(start, batch, others=others[: per_profile - 1])
        for (start, _), others in zip(profiles, same_path, strict=True)
    ]
    return [*batches, TimedBatch(0, batch, longest=True)], [*_weights(subject, leaving), 0.0]


def _batch_limit(subject: LoadedArtifact) -> int:
    """Returns how many batches of images may be held in memory to be timed."""
    batch_bytes = bytes_of(subject.validation.images[: subject.target.batch])
    return min(_MAX_TIMED_BATCHES, max(_MAX_TIMED_BYTES // batch_bytes, 1))


def _further_starts(subject: LoadedArtifact, count: int) -> tuple[int, ...]:
    """Returns the first images of up to `count - 1` batches after the first, spread over the validation images."""
    batch, images = subject.target.batch, len(subject.validation)
    starts = range(0, images - batch + 1, batch)
    return tuple(starts[:: max(len(starts) // count, 1)][1:count])


def _exit_notes(subject: LoadedArtifact) -> dict[str, float]:
    """Returns the share of images that leave at each exit, as notes of a measurement."""
    if not subject.artifact.exits:
        return {}
    names = [*subject.artifact.exits, "end"]
    return {f"{LEFT}{name}": share for name, share in zip(names, subject.answers.exit_shares, strict=True)}


def _weights(subject: LoadedArtifact, leaving: Sequence[float]) -> list[float]:
    """Returns how often each profile occurs: by `leaving` if it is given and fits the profiles, else by the images."""
    profiles, batch = subject.answers.profiles, subject.target.batch
    counts = [float(count) for _, count in profiles]
    exits = [int(subject.answers.exits[start]) for start, _ in profiles]
    if batch > 1 or subject.artifact.blocks or {index for index, share in enumerate(leaving) if share} != set(exits):
        return counts
    return [leaving[index] for index in exits]  # one image at a time, so each exit has one profile


def _statistic(artifact: Artifact) -> str:
    if artifact.reuse is not None:
        return "expected over the frames of the validation stream"
    return "expected over the validation images" if artifact.is_dynamic else "median"


class LatencyEvaluator:
    """Latency: the seconds per batch that a caller waits.

    A candidate's work is its ratio to the reference times the reference's work when the search began, both by the same
    clock: the CPU's, or the GPU's events. So all trials of a search are given at one speed of the machine, however that
    drifts. On a GPU a call also has a part on the host: the copy into page-locked memory, the launch, the wait. It does
    not shrink with the network, so it is added unscaled: scaled with the reference's, it would make a network of half
    the kernels look as if it were launched in half the time. On a CPU the wall-clock time beyond the work is other
    programs' time, and is left out.

    Percentiles are those of the wall clock divided by its typical time, times the latency: in a slow minute the
    wall-clock percentiles themselves would not fit a latency at the reference's speed.

    Args:
        references: by precision; a candidate is compared with the one in the precision of most of its layers.
        runtime: the library that runs them.
        target: batch size and threads.
        protocol: how a candidate and a reference are timed in turn.
        cache: of earlier timings; used only if the runtime compiles.
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
        capabilities = runtime.capabilities()
        self._clock = capabilities.clock
        self._cache = cache if capabilities.compiles else None

    def measure(self, subject: LoadedArtifact, leaving: Sequence[float] = ()) -> Measurement:
        """Returns the median seconds per batch, or the expected ones of a dynamic network, and the longest path's.

        Args:
            subject: the artifact to time.
            leaving: the share of images that leave at each exit, if it was measured on other images than the subject's.
        """
        precision = self.majority(subject)
        timing, is_cached = self._cached_timing(subject, precision, leaving)
        reference_s = self.references[precision].seconds
        value = self._waited(timing.ratio, timing.wait_s, reference_s)
        return Measurement(
            metric="latency",
            value=value,
            statistic=_statistic(subject.artifact),
            n=timing.calls,
            spread=timing.half_width / 1.96 * timing.ratio * reference_s,
            target=str(subject.target),
            protocol=self._protocol_text(subject, precision, is_cached, timing) + _block_paths_text(subject),
            others={
                **{name: tail * value for name, tail in timing.tails.items()},
                "worst": self._waited(timing.worst_ratio, timing.worst_wait_s, reference_s),
            },
            # Work by the CPU's or GPU's own clock, and wall-clock time, as measured at that moment.
            notes={
                "ratio": timing.ratio,
                "half_width": timing.half_width,
                "work_s": timing.work_s,
                "wait_s": timing.wait_s,
                "wall_median": timing.wall_median,
                "wall_cv": timing.wall_cv,
                "boundaries": subject.artifact.boundaries,
                **_exit_notes(subject),
                # The reference's time now, as a multiple of its time when the search began.
                **({} if is_cached else {"drift": timing.work_s / timing.ratio / reference_s}),
                **{f"seconds {mode}": seconds for mode, seconds in timing.launches.items()},
            },
            remarks=(*timing.remarks, *slower_launch(timing.launches)),
            unproven=tuple(timing.unproven),
            states=timing.states,
        )

    def _waited(self, ratio: float, wait_s: float, reference_s: float) -> float:
        """Returns the seconds that a caller waits for a batch, at the reference's speed when the search began."""
        return ratio * reference_s + (wait_s if self._clock == "gpu" else 0.0)

    def _protocol_text(self, subject: LoadedArtifact, precision: str, is_cached: bool, timing: _Timing) -> str:
        clock = CLOCKS[self._clock]
        reference = self.references[precision]
        name = reference.name or f"dense {precision}"
        parts = [str(self.protocol), f"reference: {name}, {reference.seconds * 1e3:.3f} ms of {clock}"]
        parts += [_IMAGE_ORDER] if subject.artifact.is_dynamic else []
        parts.append("percentiles: the wall clock's, over its own median, times the latency")
        parts += [f"launched {mode}, as it is deployed" for mode in list(timing.launches)[:1]]
        return "; ".join([*parts, *(["kept from an earlier measurement of the same shapes"] if is_cached else [])])

    def _cached_timing(self, subject: LoadedArtifact, precision: str, leaving: Sequence[float]) -> tuple[_Timing, bool]:
        """Returns a timing, and whether it came from the cache: only if the runtime compiles and the path is fixed."""
        if self._cache is None or subject.artifact.is_dynamic:
            return self._time(subject, precision, leaving), False
        reference = self.references[precision].model
        form = " ".join(field.name for field in fields(_Timing))  # an entry with other fields cannot be read
        circumstances = (self._runtime.version(), str(subject.target), str(self.protocol), form)
        key = structure_key([*subject.artifact.deployed, reference], *circumstances)
        kept = self._cache.find(key)
        if kept is not None:
            return _Timing(**kept), True
        timing = self._time(subject, precision, leaving)
        self._cache.keep(key, asdict(timing))
        return timing, False

    def _time(self, subject: LoadedArtifact, precision: str, leaving: Sequence[float]) -> _Timing:
        before = self._runtime.state()
        timing = self._time_pair(subject, precision, *_timed_batches(subject, leaving))
        after = self._runtime.state()
        batch = subject.validation.images[: subject.target.batch]
        proof = subject.session.proof(batch, subject.artifact.precisions)
        launches = subject.session.launches(batch)
        return _Timing.of(timing, subject.artifact.is_dynamic, launches, proof, before, after)

    def paths(
        self, subject: LoadedArtifact, profiles: Profiles = FIRST, shares: Sequence[float] = ()
    ) -> tuple[float, ...]:
        """Returns the seconds of a batch that leaves as a whole at each exit and, last, of one that runs to the end."""
        return self.timed_paths(subject, profiles, shares).seconds

    def timed_paths(self, subject: LoadedArtifact, profiles: Profiles = FIRST, shares: Sequence[float] = ()) -> Paths:
        """Returns the seconds of a batch that leaves as a whole at each exit and, last, of one that runs to the end.

        Args:
            subject: the artifact with its exits.
            profiles: the batches to time; more than the first one if images decide which blocks they skip.
            shares: how often batches leave at each exit, which affects what is in the caches; equally often if empty.
        """
        batch, precision = subject.target.batch, self.majority(subject)
        starts, counts = zip(*profiles, strict=True)
        exits = range(len(subject.artifact.exits) + 1)
        # If images decide which blocks they skip, each start stands for a path of its own.
        per_exit = max(_batch_limit(subject) // len(exits), 1)
        others = () if subject.artifact.blocks else _further_starts(subject, per_exit)
        batches = [TimedBatch(start, batch, exit=index, others=others) for index in exits for start in starts]
        weights = np.outer(shares or [1.0] * len(exits), counts).ravel()
        timing = self._time_pair(subject, precision, batches, weights.tolist())
        reference_s = self.references[precision].seconds
        waits = zip(timing.per_input, timing.waits_s, strict=True)
        seconds = np.array([self._waited(ratio, wait, reference_s) for ratio, wait in waits])
        means = np.average(seconds.reshape(len(exits), len(starts)), axis=1, weights=counts)
        return Paths(tuple(means.tolist()), timing.half_width)

    def reference_self_ratio(self, precision: str, images: Images) -> float:
        """Returns the time ratio of a reference to itself, loaded twice: how far it is from 1 is noise."""
        count = reference_batch(self._target.batch)
        first, second = self._load(precision), self._load(precision)
        turns = first.turns(images, [TimedBatch(0, count)], second, count, self.protocol)
        return time_pair(turns, [1.0], self.protocol, time.perf_counter).ratio

    def _time_pair(
        self, subject: LoadedArtifact, precision: str, batches: Sequence[TimedBatch], weights: Sequence[float]
    ) -> PairedTiming:
        images, reference = subject.validation.images, self._load(precision)
        timed = [replace(batch, share=weight) for batch, weight in zip(batches, weights, strict=True)]
        turns = subject.session.turns(images, timed, reference, reference_batch(subject.target.batch), self.protocol)
        return time_pair(turns, weights, self.protocol, time.perf_counter)

    def _load(self, precision: str) -> Session:
        # Loaded for each timing: other idle sessions in memory would change what the caches hold.
        return self._runtime.open([self.references[precision].model], [], self._target.threads)

    def majority(self, subject: LoadedArtifact) -> str:
        """Returns the precision of most of a candidate's layers: that of the reference which it is timed against."""
        layers = list(subject.candidate.precision.values())
        return max(self.references, key=layers.count)
