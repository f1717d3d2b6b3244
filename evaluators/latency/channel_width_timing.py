"""Times small networks whose layers are of several widths, in each precision of a target."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import pairwise

import numpy as np
import torch
from torch import nn

from evaluators.artifact_builder import ArtifactBuilder
from evaluators.latency.cache import LatencyCache
from evaluators.latency.channel_widths import TOLERANCE, WidthTimes
from evaluators.latency.slow_layers import Interval
from evaluators.runtimes.base import Runtime, Session, Target, TimedBatch
from evaluators.runtimes.paired_timing import TimingProtocol, time_pair
from spaces import cache
from spaces.candidate import Candidate
from spaces.dynamic.exit_network import ExitNetwork
from spaces.precision import uniform

MULTIPLES = 8
"""The table has so many widths: the multiples of the runtime's own step."""
LIMIT_S = 5.0
"""After so many seconds nothing is timed a second time, and what is undecided counts as no slower."""
QUICK = TimingProtocol(burst_s=0.006, turns=6, half_width=0.03, limit_s=0.1)
"""How every pair of neighbouring widths is timed first."""
PROTOCOL = TimingProtocol(half_width=0.01, limit_s=0.5)
"""How a pair is timed that may be slower, `CONFIRMATIONS` times."""
CONFIRMATIONS = 2
"""Longer timings that must agree that a width is slower."""
_BLOCKS = 2
"""Pairs of a 3x3 and a 1x1 convolution in a network of the table."""
_SIZE = 16
"""Height and width of its feature maps."""
_MOST_IMAGES = 4
"""The batch is the target's, up to so many images, which is enough to choose a kernel by."""

TimePair = Callable[[int, int, TimingProtocol], Interval]
"""Returns the time of the network of the first width divided by that of the second; each call loads both anew."""
Progress = Callable[[str, int, int], object]


def known_widths(
    runtime: Runtime, target: Target, kept: LatencyCache, progress: Progress = lambda *_: None
) -> dict[str, WidthTimes]:
    """Returns a table for each precision that the target computes in, as it was timed before, else timed now.

    Args:
        runtime: executes the networks.
        target: batch size and threads.
        kept: earlier tables, by the runtime's version, device, batch, threads and what the runtime does in int8.
        progress: called at every pair of widths.

    Raises:
        UserError: a network cannot be written for the target, or not be run on it.
        RuntimeError: the same, in the words of the library.
    """
    able = runtime.capabilities()
    steps = [f"{precision} {able.channel_steps[precision]}" for precision in able.precisions]
    files = f"{able.weight_bits} {able.quantized_add} {able.features} {' '.join(able.int8_operators)}"
    timing = [json.dumps(asdict(protocol)) for protocol in (QUICK, PROTOCOL)]
    table = f"{MULTIPLES} {_BLOCKS} {_SIZE} {_MOST_IMAGES} {CONFIRMATIONS} widths ratios"
    timed = replace(target, batch=min(target.batch, _MOST_IMAGES))
    key = cache.key(runtime.version(), str(timed), *steps, files, *timing, table)
    entry = kept.find(key)
    if entry is not None:
        return {precision: WidthTimes.from_dict(content) for precision, content in entry.items()}
    tables = measure_widths(runtime, timed, progress)
    kept.keep(key, {precision: times.to_dict() for precision, times in tables.items()})
    return tables


def measure_widths(
    runtime: Runtime, target: Target, progress: Progress = lambda *_: None, limit_s: float = LIMIT_S
) -> dict[str, WidthTimes]:
    """Returns a table for each precision that the target computes in, timed now.

    The table's widths are the multiples of the smallest of the runtime's own steps.

    Args:
        runtime: executes the networks.
        target: batch size, of at most four images, and threads.
        progress: called at every pair of widths.
        limit_s: the seconds after which no pair is timed again.

    Raises:
        UserError: a network cannot be written for the target, or not be run on it.
        RuntimeError: the same, in the words of the library.
    """
    capabilities = runtime.capabilities()
    finest = min(capabilities.channel_steps[precision] for precision in capabilities.precisions)
    widths = tuple(finest * multiple for multiple in range(1, MULTIPLES + 1))
    networks = _Networks(runtime, target, widths)
    end, total = time.monotonic() + limit_s, len(capabilities.precisions) * (len(widths) - 1)
    tables: dict[str, WidthTimes] = {}
    for precision in capabilities.precisions:
        ratios: list[Interval] = []
        for narrow, wide in pairwise(widths):
            progress("Timing layers of several widths", len(tables) * (len(widths) - 1) + len(ratios), total)
            ratios.append(timed_ratio(networks.in_precision(precision), narrow, wide, lambda: time.monotonic() > end))
        tables[precision] = WidthTimes(widths, tuple(ratios))
    progress("Timing layers of several widths", total, total)
    return tables


def timed_ratio(times: TimePair, narrow: int, wide: int, is_late: Callable[[], bool]) -> Interval:
    """Returns the time of a width divided by that of the next one, timed again where it may be slower.

    Of the longer timings the one with the smallest ratio counts, so that a width is slower only if all agree. One that
    may be slower when the time is up is undecided: its interval is as wide as the ratio.

    Args:
        times: times the two.
        narrow: the width.
        wide: the next one of the table.
        is_late: returns whether the time is up.
    """
    first = times(narrow, wide, QUICK)
    if first.high <= 1 + TOLERANCE:
        return first
    again: list[Interval] = []
    while len(again) < CONFIRMATIONS:
        if is_late():
            return Interval(first.ratio, 1.0)
        again.append(times(narrow, wide, PROTOCOL))
        if again[-1].high <= 1 + TOLERANCE:
            break
    return min(again, key=lambda interval: interval.low)


class _Networks:
    """Small networks of equal structure, whose layers all have the same width.

    Args:
        runtime: executes them.
        target: batch size and threads.
        widths: channels of their layers, ascending.
    """

    def __init__(self, runtime: Runtime, target: Target, widths: Sequence[int]) -> None:
        self._runtime = runtime
        self._target = target
        self._images = np.random.default_rng(0).normal(size=(_MOST_IMAGES, 3, _SIZE, _SIZE)).astype(np.float32)
        with torch.random.fork_rng(devices=[]):  # so that later trainings are the same, timed or not
            torch.manual_seed(0)
            self._networks = {width: _network(width) for width in widths}
        self._builder = ArtifactBuilder(self._networks[widths[-1]], self._images, runtime, target.fp32_in)

    def in_precision(self, precision: str) -> TimePair:
        """Returns what times two widths with all layers in a precision."""
        candidate = Candidate({}, uniform(self._builder.layers, precision))

        def timed(narrow: int, wide: int, protocol: TimingProtocol) -> Interval:
            batch = self._target.batch
            pair = [self._open(width, candidate) for width in (narrow, wide)]
            turns = pair[0].turns(self._images, [TimedBatch(0, batch)], pair[1], batch, protocol)
            timing = time_pair(turns, [1.0], protocol, time.perf_counter)
            return Interval(timing.ratio, timing.half_width)

        return timed

    def _open(self, width: int, candidate: Candidate) -> Session:
        files = self._builder.build(self._networks[width], candidate).deployed
        return self._runtime.open(files, [], self._target.threads)


def _network(width: int) -> ExitNetwork:
    """Returns a network of convolutions, 3x3 and 1x1 in turn, from `width` channels to as many."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), nn.ReLU()]
    for kernel in (3, 1) * _BLOCKS:
        layers += [nn.Conv2d(width, width, kernel, padding=kernel // 2), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)]
    return ExitNetwork(nn.Sequential(*layers), [], []).eval()
