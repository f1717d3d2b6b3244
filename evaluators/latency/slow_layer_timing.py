"""Times the networks that show which layers are slower in a lower precision on one target."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace

from evaluators.artifact_builder import ArtifactBuilder
from evaluators.data import ImageStore
from evaluators.latency.cache import LatencyCache, structure_key
from evaluators.latency.slow_layers import (
    GROUPS,
    TIMINGS,
    UNKNOWN,
    Group,
    GroupTiming,
    Interval,
    SlowerLayers,
    SlowGroupSearch,
    SlowLayers,
    WholeNetwork,
)
from evaluators.runtimes.base import Runtime, Session, Target, TimedBatch
from evaluators.runtimes.paired_timing import TimingProtocol, time_pair
from spaces.candidate import Candidate
from spaces.dynamic.exit_network import ExitNetwork
from spaces.errors import UserError
from spaces.precision import uniform

PROTOCOL = TimingProtocol(half_width=0.01, limit_s=0.4)
_TURNS = 10
"""Slow networks are timed longer than the protocol's limit, for about this many turns."""

Progress = Callable[[str, int, int], object]
"""Reports progress: what is done, the number of steps that are done, and the number of all steps."""


class SlowLayerFinder:
    """Finds the layers of a dense network that are slower in a lower precision on one target.

    Exit heads are not tested: the dense network is deployed without them.

    Args:
        builder: writes the network's files.
        network: the dense network with its exits.
        dense: the candidate that changes nothing.
        precisions: the precisions of the target, the reference first.
        runtime: the library that runs the files.
        target: batch size and threads.
        images: at least one batch.
        cache: of earlier results, by the structure of the network.
    """

    def __init__(
        self,
        builder: ArtifactBuilder,
        network: ExitNetwork,
        dense: Candidate,
        precisions: Sequence[str],
        runtime: Runtime,
        target: Target,
        images: ImageStore,
        cache: LatencyCache,
    ) -> None:
        self._builder = builder
        self._network = network
        self._dense = dense
        self._precisions = tuple(precisions)
        self._runtime = runtime
        self._target = target
        self._images = images[: target.batch]
        self._cache = cache
        self._refused: dict[str, None] = {}

    def examine(self, progress: Progress, limit_s: float) -> SlowLayers:
        """Returns the layers that are slower in each precision, from new timings or from the cache.

        A cached result that was not finished within a shorter limit is measured again.

        Args:
            progress: called at every timing.
            limit_s: the time limit in seconds, timings of the network as a whole aside.
        """
        uniform_files = [self._files(self._uniform(precision)) for precision in self._precisions]
        form = " ".join(field.name for field in fields(SlowLayers))  # an entry with other fields cannot be read
        circumstances = (self._runtime.version(), str(self._target), str(PROTOCOL), f"{TIMINGS} {GROUPS}", form)
        key = structure_key([file for files in uniform_files for file in files], *circumstances)
        kept = self._cache.find(key)
        if kept is not None:
            earlier = SlowLayers.from_dict(kept)
            if not earlier.unfinished or earlier.limit_s >= limit_s:
                return earlier
        slow = self._find(progress, limit_s)
        if not slow.refused:  # a reason such as a full GPU may be gone the next time
            self._cache.keep(key, slow.to_dict())
        return slow

    def _find(self, progress: Progress, limit_s: float) -> SlowLayers:
        begin = time.monotonic()
        slow = SlowLayers(limit_s=limit_s)
        self._refused.clear()
        for index in range(1, len(self._precisions)):
            share = limit_s / (len(self._precisions) - 1)
            slow = self._with_precision(self._precisions[index], self._precisions[:index], slow, progress, share)
        return replace(slow, seconds=time.monotonic() - begin, refused=tuple(self._refused))

    def _with_precision(
        self, precision: str, higher: Sequence[str], slow: SlowLayers, progress: Progress, limit_s: float
    ) -> SlowLayers:
        """Adds to `slow` the layers that are slower in `precision` than in the fastest of the `higher` ones."""
        begin = time.monotonic()
        best = self._fastest(higher)
        allowed = slow.allowed(tuple(self._dense.precision), higher)
        instead = {layer: best if best in left else left[-1] for layer, left in allowed.items()}
        record: list[GroupTiming] = []

        def times(group: Group, raised: Group) -> Interval:
            progress(f"layers slower in {precision}", min(search.timing_count, TIMINGS), TIMINGS)
            reference = self._uniform(precision) | {layer: instead[layer] for layer in raised}
            interval = self._time(reference | {layer: instead[layer] for layer in group}, reference)
            if interval is not UNKNOWN:
                record.append(GroupTiming(group, precision, best, len(raised), interval.ratio, interval.half_width))
            return interval

        search = SlowGroupSearch(times, TIMINGS, lambda: time.monotonic() - begin > limit_s)
        layers = self._layers(precision)
        slower = [
            SlowerLayers(one.group, precision, best, one.interval.ratio, one.interval.half_width, one.is_confirmed)
            for one in search.run(layers)
        ]
        interval = search.whole
        whole = WholeNetwork(precision, best, len(layers), interval.ratio, interval.half_width, search.is_whole_slower)
        return replace(
            slow,
            slower=(*slow.slower, *slower),
            timings=slow.timings + search.timing_count,
            wholes=(*slow.wholes, *([whole] if interval is not UNKNOWN else [])),
            record=(*slow.record, *record),
            unfinished=(*slow.unfinished, *([precision] if search.is_unfinished else [])),
        )

    def _layers(self, precision: str) -> Group:
        """Returns the deployed layers that are written in this precision if a candidate asks for it everywhere."""
        candidate = self._candidate(self._uniform(precision))
        written = self._builder.written_precisions(self._network, candidate)
        return tuple(name for name, kind in written.items() if kind == precision and not name.startswith("exits."))

    def _fastest(self, precisions: Sequence[str]) -> str:
        """Returns the precision in which the network as a whole is fastest."""
        first, *others = [self._uniform(precision) for precision in precisions]
        ratios = [1.0, *(self._time(other, first).ratio for other in others)]
        return precisions[ratios.index(min(ratios))]

    def _time(self, precisions: Mapping[str, str], reference_precisions: Mapping[str, str]) -> Interval:
        """Returns the ratio of the network's times in two assignments of precisions; unknown if one cannot be built."""
        batch = self._target.batch
        try:
            # Loaded for each timing, so that confirmations do not share the memory layout of one load.
            session, reference = (
                self._runtime.open(self._files(assignment), [], self._target.threads)
                for assignment in (precisions, reference_precisions)
            )
            protocol = self._protocol(session, reference)
            turns = session.turns(self._images, [TimedBatch(0, batch)], reference, batch, protocol)
            timing = time_pair(turns, [1.0], protocol, time.perf_counter)
        except (UserError, RuntimeError) as error:
            self._refused[str(error)] = None
            return UNKNOWN
        return Interval(timing.ratio, timing.half_width)

    def _protocol(self, *pair: Session) -> TimingProtocol:
        """Returns the protocol with enough time for `_TURNS` turns, however slow the two networks are."""
        call_s = sum(session.seconds(self._images, 2)[-1].wall for session in pair)
        return replace(PROTOCOL, limit_s=max(PROTOCOL.limit_s, _TURNS * PROTOCOL.burst * call_s))

    def _uniform(self, precision: str) -> dict[str, str]:
        return uniform(self._dense.precision, precision, self._precisions[0])

    def _files(self, precisions: Mapping[str, str]) -> tuple[bytes, ...]:
        return self._builder.build(self._network, self._candidate(precisions)).deployed

    def _candidate(self, precisions: Mapping[str, str]) -> Candidate:
        return replace(self._dense, precision=precisions)
