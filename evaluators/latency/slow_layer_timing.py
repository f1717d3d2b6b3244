"""Timing the flips that tell which layers are slower in a lower precision, on one target."""

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
    Hunt,
    Interval,
    Slower,
    SlowLayers,
    Timed,
    Whole,
)
from evaluators.runtimes.base import Runtime, Session, Target, TimedBatch
from evaluators.runtimes.paired_timing import TimingProtocol, time_pair
from spaces.candidate import Candidate
from spaces.dynamic.exit_network import ExitNetwork
from spaces.errors import UserError
from spaces.precision import uniform

PROTOCOL = TimingProtocol(half_width=0.01, limit_s=0.4)
_TURNS = 10
"""A slow network is timed longer than the protocol says: for about so many turns."""

Step = Callable[[str, int, int], object]


class SlowLayerFinder:
    """Examines one dense network on one target.

    The heads of exits are left alone: the dense network is deployed without them.

    Args:
        builder: writes its files.
        network: dense, with its exits.
        dense: the candidate that changes nothing.
        precisions: what the target runs, the reference first.
        runtime: what runs them.
        target: batch size and threads.
        images: at least one batch.
        cache: of earlier examinations, by structure.
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

    def examine(self, progress: Step, limit_s: float) -> SlowLayers:
        """Returns what is slower in which precision, measured now or kept from the same network on this target.

        What was kept from an examination that had less time, and did not come to its end, is measured anew.

        Args:
            progress: told about every timing.
            limit_s: for at most so many seconds in all, the network as a whole aside.
        """
        whole = [self._files(self._uniform(precision)) for precision in self._precisions]
        form = " ".join(field.name for field in fields(SlowLayers))  # what another form kept cannot be read
        circumstances = (self._runtime.version(), str(self._target), str(PROTOCOL), f"{TIMINGS} {GROUPS}", form)
        key = structure_key([file for files in whole for file in files], *circumstances)
        kept = self._cache.find(key)
        if kept is not None:
            earlier = SlowLayers.from_dict(kept)
            if not earlier.unfinished or earlier.limit_s >= limit_s:
                return earlier
        found = self._measured(progress, limit_s)
        if not found.refused:  # a reason such as a full GPU may be gone the next time
            self._cache.keep(key, found.to_dict())
        return found

    def _measured(self, progress: Step, limit_s: float) -> SlowLayers:
        begin = time.monotonic()
        found = SlowLayers(limit_s=limit_s)
        self._refused.clear()
        for index in range(1, len(self._precisions)):
            share = limit_s / (len(self._precisions) - 1)
            found = self._with(self._precisions[index], self._precisions[:index], found, progress, share)
        return replace(found, seconds=time.monotonic() - begin, refused=tuple(self._refused))

    def _with(
        self, precision: str, higher: Sequence[str], found: SlowLayers, progress: Step, limit_s: float
    ) -> SlowLayers:
        """Returns what was found before, and what is slower in `precision` than in the best of the `higher` ones."""
        begin = time.monotonic()
        best = self._fastest(higher)
        able = found.allowed(tuple(self._dense.precision), higher)
        instead = {layer: best if best in left else left[-1] for layer, left in able.items()}
        record: list[Timed] = []

        def times(group: Group, kept: Group) -> Interval:
            progress(f"layers slower in {precision}", min(hunt.spent, TIMINGS), TIMINGS)
            beside = self._uniform(precision) | {layer: instead[layer] for layer in kept}
            seen = self._time(beside | {layer: instead[layer] for layer in group}, beside)
            if seen is not UNKNOWN:
                record.append(Timed(group, precision, best, len(kept), seen.ratio, seen.half_width))
            return seen

        hunt = Hunt(times, TIMINGS, lambda: time.monotonic() - begin > limit_s)
        layers = self._layers(precision)
        lost = [
            Slower(each.group, precision, best, each.interval.ratio, each.interval.half_width, each.is_confirmed)
            for each in hunt.run(layers)
        ]
        known = hunt.whole is not UNKNOWN
        whole = Whole(precision, best, len(layers), hunt.whole.ratio, hunt.whole.half_width, hunt.has_lost_whole)
        return replace(
            found,
            slower=(*found.slower, *lost),
            timings=found.timings + hunt.spent,
            wholes=(*found.wholes, *([whole] if known else [])),
            record=(*found.record, *record),
            unfinished=(*found.unfinished, *([precision] if hunt.is_cut else [])),
        )

    def _layers(self, precision: str) -> Group:
        """Returns the layers that are deployed, and written in this precision where a candidate asks for it."""
        everywhere = self._candidate(self._uniform(precision))
        written = self._builder.written_precisions(self._network, everywhere)
        return tuple(layer for layer, given in written.items() if given == precision and not layer.startswith("exits."))

    def _fastest(self, precisions: Sequence[str]) -> str:
        whole = [self._uniform(precision) for precision in precisions]
        ratios = [1.0, *(self._time(other, whole[0]).ratio for other in whole[1:])]
        return precisions[ratios.index(min(ratios))]

    def _time(self, flipped: Mapping[str, str], beside: Mapping[str, str]) -> Interval:
        batch = self._target.batch
        try:
            # Loaded for each timing, so that confirmations do not share one load's luck.
            opened, reference = (
                self._runtime.open(self._files(precisions), [], self._target.threads)
                for precisions in (flipped, beside)
            )
            protocol = self._protocol(opened, reference)
            turns = opened.turns(self._images, [TimedBatch(0, batch)], reference, batch, protocol)
            timing = time_pair(turns, [1.0], protocol, time.perf_counter)
        except (UserError, RuntimeError) as error:
            self._refused[str(error)] = None
            return UNKNOWN  # what cannot be built proves nothing
        return Interval(timing.ratio, timing.half_width)

    def _protocol(self, *pair: Session) -> TimingProtocol:
        """Returns the protocol with time enough for `_TURNS` turns, however slow both networks are."""
        call_s = sum(each.seconds(self._images, 2)[-1].wall for each in pair)
        return replace(PROTOCOL, limit_s=max(PROTOCOL.limit_s, _TURNS * PROTOCOL.burst * call_s))

    def _uniform(self, precision: str) -> dict[str, str]:
        return uniform(self._dense.precision, precision, self._precisions[0])

    def _files(self, precisions: Mapping[str, str]) -> tuple[bytes, ...]:
        return self._builder.build(self._network, self._candidate(precisions)).deployed

    def _candidate(self, precisions: Mapping[str, str]) -> Candidate:
        return replace(self._dense, precision=precisions)
