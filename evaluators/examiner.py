"""Timing the flips that tell which layers are slower in a lower precision, on one target."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from evaluators.artifact.build import ArtifactBuilder
from evaluators.data import ImageStore
from evaluators.latency_cache import LatencyCache, structure_key
from evaluators.placement import GROUPS, TIMINGS, UNKNOWN, Examined, Group, Hunt, Interval, Slower
from evaluators.target import Runtime, Target, TimedBatch
from evaluators.timing import Protocol, time_pair
from spaces.candidate import Candidate
from spaces.errors import UserError
from spaces.gates import uniform
from spaces.network import ExitNetwork

LIMIT_S: Mapping[bool, float] = {False: 15.0, True: 300.0}
"""For at most so many seconds for each precision, by whether loading compiles."""
PROTOCOL = Protocol(half_width=0.01, limit_s=0.4)

Step = Callable[[str, int, int], object]


class PlacementExaminer:
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
        self._builder, self._network, self._dense = builder, network, dense
        self._precisions = tuple(precisions)
        self._runtime, self._target, self._images, self._cache = runtime, target, images[: target.batch], cache
        self._refused: dict[str, None] = {}

    def examine(self, progress: Step) -> Examined:
        """Returns what is slower in which precision, measured now or kept from the same network on this target.

        Args:
            progress: told about every timing.
        """
        whole = [self._files(self._uniform(precision)) for precision in self._precisions]
        circumstances = (self._runtime.version(), str(self._target), str(PROTOCOL), f"{TIMINGS} {GROUPS}")
        key = structure_key([file for files in whole for file in files], *circumstances)
        kept = self._cache.find(key)
        if kept is not None:
            return Examined.from_dict(kept)
        found = self._measured(progress)
        if not found.refused:  # a reason such as a full GPU may be gone the next time
            self._cache.keep(key, found.to_dict())
        return found

    def _measured(self, progress: Step) -> Examined:
        begin = time.monotonic()
        found = Examined()
        self._refused.clear()
        for index in range(1, len(self._precisions)):
            found = self._with(self._precisions[index], self._precisions[:index], found, progress)
        return replace(found, seconds=time.monotonic() - begin, refused=tuple(self._refused))

    def _with(self, precision: str, higher: Sequence[str], found: Examined, progress: Step) -> Examined:
        """Returns what was found before, and what is slower in `precision` than in the best of the `higher` ones."""
        best = self._fastest(higher)
        able = found.allowed(tuple(self._dense.precision), higher)
        instead = {layer: best if best in left else left[-1] for layer, left in able.items()}
        begin, limit_s = time.monotonic(), LIMIT_S[self._runtime.capabilities().compiles]

        def times(group: Group, kept: Group) -> Interval:
            progress(f"layers slower in {precision}", hunt.spent, TIMINGS)
            beside = self._uniform(precision) | {layer: instead[layer] for layer in kept}
            return self._time(beside | {layer: instead[layer] for layer in group}, beside)

        hunt = Hunt(times, TIMINGS, lambda: time.monotonic() - begin > limit_s)
        losers = hunt.run(self._layers(precision))
        slower = (Slower(group, precision, best, each.ratio, each.half_width) for group, each in losers)
        return Examined((*found.slower, *slower), found.timings + hunt.spent)

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
            turns = opened.turns(self._images, [TimedBatch(0, batch)], reference, batch, PROTOCOL)
            timing = time_pair(turns, [1.0], PROTOCOL, time.perf_counter)
        except (UserError, RuntimeError) as error:
            self._refused[str(error)] = None
            return UNKNOWN  # what cannot be built proves nothing
        return Interval(timing.ratio, timing.half_width)

    def _uniform(self, precision: str) -> dict[str, str]:
        return uniform(self._dense.precision, precision, self._precisions[0])

    def _files(self, precisions: Mapping[str, str]) -> tuple[bytes, ...]:
        return self._builder.build(self._network, self._candidate(precisions)).deployed

    def _candidate(self, precisions: Mapping[str, str]) -> Candidate:
        return replace(self._dense, precision=precisions)
