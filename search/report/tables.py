"""Numbers and tables as people read them: SI inside, units here."""

import math
from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table

from evaluators.accuracy import wilson
from evaluators.latency.slow_layers import Examined, Slower, Whole
from evaluators.measurement import Measurement
from evaluators.streams import KEY_FRAMES
from search.config.budget import Budget, Constraint
from search.results.pareto import Version
from search.results.simple_versions import Given
from spaces.candidate import Candidate

ZEROS = (
    "Zeros inside layers make nothing faster on this target, whose kernels are dense, and FLOPs count them; the notes"
    " of flops and params in --json tell the share that hardware which skips zeros would need."
)
"""Is said below a front in which layers may have zeros anywhere."""
_DECIMAL = ((1e9, "G"), (1e6, "M"), (1e3, "K"))


def milliseconds(seconds: float) -> str:
    """Returns seconds as milliseconds, `4.97 ms`."""
    return f"{seconds * 1e3:.{2 if seconds < 0.1 else 0}f} ms"


def millijoules(joules: float) -> str:
    """Returns joules as millijoules, `2.04 mJ`."""
    return f"{joules * 1e3:.3g} mJ"


def percent(share: float) -> str:
    """Returns a share as a percentage: `98.57%`."""
    return f"{share:.2%}"


def points(difference: float) -> str:
    """Returns a difference of shares in points, signed: `-0.29`."""
    return f"{difference * 100:+.2f}"


def examined_layers(examined: Examined) -> str:
    """Returns, in a line, what each lower precision comes to for the whole network, and which layers it is not for."""
    cost = f"{examined.timings} timings, {examined.seconds:.1f} s"
    if examined.refused:
        more = f", and for {len(examined.refused) - 1} more reasons" if len(examined.refused) > 1 else ""
        cost += f"; some could not be taken: {examined.refused[0]}{more}"
    if examined.unfinished:
        cost += f"; the time was up before every part was looked at in {' and '.join(examined.unfinished)}"
    lost = [whole.precision for whole in examined.wholes if whole.is_slower]
    told = [_as_a_whole(whole, examined.left_out(whole.precision)) for whole in examined.wholes]
    found = [_slower(each) for each in examined.slower if each.precision not in lost]
    if found:
        more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
        told.append(f"Left out as slower: {'; '.join(found[:3])}{more}")
    elif not lost:
        told.append("No layer is measurably slower in a lower precision")
    return f"{'. '.join(told)} ({cost})."


def _as_a_whole(whole: Whole, left_out: int) -> str:
    """Returns what a network's time in one precision is to that in another, and to how many layers it is offered."""
    name, times, half_width = whole.precision, 1 / whole.ratio, whole.half_width / whole.ratio
    if not whole.is_slower:
        return f"{name} as a whole takes {times:.2f} ± {half_width:.2f} of {whole.instead}'s time here"
    offered = whole.layers - left_out
    to = (
        f"{offered} of {whole.layers} layers, where it was proved faster"
        if offered
        else "no layer: none was proved faster"
    )
    return (
        f"{name} as a whole takes {times:.2f} ± {half_width:.2f} times as long as {whole.instead} here; it is offered"
        f" to {to}"
    )


def _slower(each: Slower) -> str:
    them = "them" if len(each.layers) > 1 else "it"
    seen = "" if each.is_confirmed else ", seen once"
    return (
        f"{' + '.join(each.layers)} not in {each.precision} (with {them} in {each.instead} the network takes"
        f" {each.ratio:.3f} ± {each.ratio * each.half_width:.3f} of its time{seen})"
    )


def simple_lines(given: Given) -> list[str]:
    """Returns the network as it is in each precision, a line each below one that says what they are."""
    dense = given.simple[0].evaluation.measurements
    lines = [
        f"The network as it is, per batch on {dense['latency'].target}, accuracy on {dense['accuracy'].n} validation"
        " images; these are the lines to beat:"
    ]
    for each in given.simple:
        measured = each.evaluation.measurements
        share = measured["latency"].value / dense["latency"].value
        lines.append(
            f"  {each.precision}  {milliseconds(measured['latency'].value):>9}  {share:>6.1%} of dense"
            f"  accuracy {percent(measured['accuracy'].value)}  {size(measured['size'].value)}"
        )
    return lines


def count(value: float) -> str:
    """Returns a count with its decimal prefix: `40.9 M`."""
    for scale, prefix in _DECIMAL:
        if value >= scale:
            return f"{value / scale:.3g} {prefix}"
    return f"{value:.0f}"


def size(byte_count: float) -> str:
    """Returns bytes with their decimal prefix: `320 KB`."""
    return count(byte_count) + "B" if byte_count >= 1e3 else f"{byte_count:.0f} B"


def threshold(value: float) -> str:
    """Returns an exit's threshold with as many digits as tell it from 1: `0.951`, `0.99986`."""
    return f"{value:.{max(3, 1 - math.floor(math.log10(1 - value))) if value < 1 else 3}g}"


def kept_share(candidate: Candidate, dense: Candidate) -> float:
    """Returns the share of the channels that a candidate keeps, 0 to 1."""
    return sum(candidate.channels.values()) / max(sum(dense.channels.values()), 1)


def kept_channels(candidate: Candidate, dense: Candidate) -> str:
    """Returns the share of the channels that a candidate keeps: `55%`."""
    return f"{kept_share(candidate, dense):.0%}"


def int8_layers(candidate: Candidate) -> str:
    """Returns how many layers are int8, of how many: `20/24`; `16+4/24` where four more are stored in int4.

    Heads of exits that never answer are not deployed.
    """
    heads = {layer for layer in candidate.precision if layer.startswith("exits.")}
    idle = {layer for layer in heads if layer.split(".")[1] not in candidate.active_exits}
    chosen = [precision for layer, precision in candidate.precision.items() if layer not in idle]
    stored = f"+{chosen.count('int4')}" if "int4" in chosen else ""
    return f"{chosen.count('int8')}{stored}/{len(chosen)}"


def exit_shares(accuracy: Measurement) -> str:
    """Returns the share of the inputs that leaves at each exit: `86% 9%`; a dash without exits."""
    return " ".join(f"{share:.0%}" for name, share in accuracy.notes.items() if name != KEY_FRAMES) or "-"


def violation_line(constraint: Constraint, measured: Measurement, dense: Measurement) -> str:
    """Returns by how much a version oversteps a limit: `latency 5.6 ms, 12% over latency<5ms`."""
    side = "over" if constraint.metric.sign > 0 else "under"
    return f"{limited(constraint, measured, dense)}, {constraint.violation(measured, dense):.0%} {side} {constraint}"


def limited(constraint: Constraint, measured: Measurement, dense: Measurement) -> str:
    """Returns what a limit is about, and its value: `latency.p99 5.6 ms`."""
    shows = {"s": milliseconds, "byte": size, "ratio": percent, "joule": millijoules}
    return f"{constraint.name} {shows.get(constraint.metric.unit, count)(constraint.value(measured, dense))}"


def broken_limits(version: Version, budget: Budget, dense: Mapping[str, Measurement]) -> str:
    """Returns every limit that a version oversteps, and by how much."""
    return "; ".join(
        violation_line(constraint, version.measured[constraint.measured_as], dense[constraint.measured_as])
        for constraint in budget.constraints
        if constraint.measured_as in version.measured
        and constraint.violation(version.measured[constraint.measured_as], dense[constraint.measured_as]) > 0
    )


HEADINGS = ("trial", "accuracy", "points", "latency", "speed", "FLOPs", "size", "kept", "int8", "exits")
_POINTS = HEADINGS.index("points")
_FITTING = ((80, 10), (72, 9), (58, 7), (0, 5))
"""How many of the columns fit from which width on."""
_KEYS, _BEHIND = "keys", HEADINGS.index("speed") + 1
"""The share of key frames, where a search has frames, and where it stands."""


def front_table(
    front: Sequence[Version], dense: Version, title: str, width: int, lines: Sequence[Version] | None = None
) -> Table:
    """Returns the front, and below it what it has to beat, for a terminal `width` characters wide.

    Args:
        front: its versions, simple ones among them.
        dense: the dense network.
        title: above the table.
        width: of the terminal.
        lines: simple versions that are not on the front; the dense network where not given.
    """
    below = [dense] if lines is None else lines
    columns = next(columns for least, columns in _FITTING if width >= least)
    if _has_frames(dense):
        columns = 1 + next(columns for least, columns in _FITTING if width >= least + len(_KEYS) + 1)
    rows = [front_row(version, dense) for version in [*front, *below]]
    shown = _whole([headings(dense), *rows], columns, width)
    table = Table(title=title, title_justify="left", caption=_caption(front, dense, below), caption_justify="left")
    table.box, table.pad_edge, table.padding = box.SIMPLE_HEAD, False, (0, 0, 0, 1)
    for at in shown:
        table.add_column(headings(dense)[at], justify="right", no_wrap=True)
    for place, row in enumerate(rows):
        is_last = place == len(front) - 1 and bool(below)
        table.add_row(*(row[at] for at in shown), style="dim" if place >= len(front) else None, end_section=is_last)
    return table


def _whole(rows: Sequence[Sequence[str]], columns: int, width: int) -> list[int]:
    """Returns which of the first columns are shown: a figure that is cut is none.

    Points follow from the accuracy, so they give way first; then the last columns do.
    """
    widths = [max(map(len, cells)) + 2 for cells in zip(*rows, strict=True)]
    shown = list(range(columns))
    for gone in [_POINTS, *reversed(range(1, columns))]:
        if sum(widths[at] for at in shown) <= width:
            break
        shown = [at for at in shown if at != gone]
    return shown


def headings(dense: Version) -> list[str]:
    """Returns what stands above the columns of a front."""
    return [*HEADINGS[:_BEHIND], *([_KEYS] if _has_frames(dense) else []), *HEADINGS[_BEHIND:]]


def _has_frames(version: Version) -> bool:
    return KEY_FRAMES in version.measured["accuracy"].notes


def front_row(version: Version, dense: Version) -> list[str]:
    """Returns one version's cells, one for each of its `headings`."""
    measured, baseline = version.measured, dense.measured
    keys = [f"{measured['accuracy'].notes[KEY_FRAMES]:.0%}"] if _has_frames(dense) else []
    return [
        str(version.trial),
        percent(measured["accuracy"].value),
        points(measured["accuracy"].value - baseline["accuracy"].value),
        milliseconds(measured["latency"].value),
        f"{baseline['latency'].value / measured['latency'].value:.2f}x",
        *keys,
        f"{measured['flops'].value / baseline['flops'].value:.1%}",
        size(measured["size"].value),
        kept_channels(version.evaluation.candidate, dense.evaluation.candidate),
        int8_layers(version.evaluation.candidate),
        exit_shares(measured["accuracy"]),
    ]


def _caption(front: Sequence[Version], dense: Version, below: Sequence[Version]) -> str:
    accuracy = dense.measured["accuracy"]
    doubt = max(accuracy_doubt(version.measured["accuracy"]) for version in [*front, dense])
    per, shown = ("frame", "frames of a stream of ") if _has_frames(dense) else ("batch", "")
    simple = [str(version.trial) for version in [*front, *below] if version.number < 0]
    stored = any("int4" in version.evaluation.candidate.precision.values() for version in front)
    return (
        f"latency per {per} on {dense.measured['latency'].target}; accuracy on {accuracy.n} {shown}validation images,"
        f" known to within {doubt * 100:.1f} points at 95%{'; layers in int8 + stored in int4' if stored else ''};"
        f" {' and '.join(simple)}: the network as it is, to be beaten"
    )


def accuracy_doubt(accuracy: Measurement) -> float:
    """Returns how far the true accuracy may lie from the measured one, at 95%: also where every image was right.

    Frames of a clip are right or wrong together, which the standard error knows and the interval of a share does not.
    """
    low, high = wilson(accuracy.value, accuracy.n)
    return max(accuracy.value - low, high - accuracy.value, 1.96 * accuracy.spread)
