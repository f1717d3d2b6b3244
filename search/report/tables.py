"""The front as a table for a terminal, with units."""

from collections.abc import Sequence

from rich import box
from rich.table import Table

from evaluators.streams import KEY_FRAMES
from search.config.units import milliseconds, percent, points, size
from search.report.describe import accuracy_half_width, exit_shares, int8_layers, kept_channels
from search.results.pareto import Version

HEADINGS = ("trial", "accuracy", "points", "latency", "speed", "FLOPs", "size", "kept", "int8", "exits")
_POINTS = HEADINGS.index("points")
_FITTING = ((80, 10), (72, 9), (58, 7), (0, 5))
"""Pairs of the minimum width of a terminal, in characters, and the number of columns that fit."""
_KEYS, _KEYS_INDEX = "keys", HEADINGS.index("speed") + 1
"""Heading and position of the share of key frames, in searches on streams."""


def front_table(
    front: Sequence[Version], dense: Version, title: str, width: int, lines: Sequence[Version] | None = None
) -> Table:
    """Returns the front, and the simple versions below it, for a terminal of `width` characters.

    Args:
        front: its versions, simple ones included.
        dense: the dense network.
        title: above the table.
        width: of the terminal.
        lines: simple versions that are not on the front; by default the dense network.
    """
    below = [dense] if lines is None else lines
    columns = next(columns for min_width, columns in _FITTING if width >= min_width)
    if _has_frames(dense):
        columns = 1 + next(columns for min_width, columns in _FITTING if width >= min_width + len(_KEYS) + 1)
    rows = [front_row(version, dense) for version in [*front, *below]]
    shown = _fitting_columns([headings(dense), *rows], columns, width)
    caption = legend([headings(dense)[column] for column in shown], front, dense, below)
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    table.box = box.SIMPLE_HEAD
    table.pad_edge = False
    table.padding = (0, 0, 0, 1)
    for column in shown:
        table.add_column(headings(dense)[column], justify="right", no_wrap=True)
    for index, row in enumerate(rows):
        is_last = index == len(front) - 1 and bool(below)
        table.add_row(
            *(row[column] for column in shown), style="dim" if index >= len(front) else None, end_section=is_last
        )
    return table


def _fitting_columns(rows: Sequence[Sequence[str]], columns: int, width: int) -> list[int]:
    """Returns the indices of the columns that fit without truncated numbers.

    The column of points is dropped first, because it follows from the accuracy, then the last columns.
    """
    widths = [max(map(len, cells)) + 2 for cells in zip(*rows, strict=True)]
    shown = list(range(columns))
    for dropped in [_POINTS, *reversed(range(1, columns))]:
        if sum(widths[column] for column in shown) <= width:
            break
        shown = [column for column in shown if column != dropped]
    return shown


def headings(dense: Version) -> list[str]:
    """Returns the headings of a front's columns."""
    return [*HEADINGS[:_KEYS_INDEX], *([_KEYS] if _has_frames(dense) else []), *HEADINGS[_KEYS_INDEX:]]


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


def legend(shown: Sequence[str], front: Sequence[Version], dense: Version, below: Sequence[Version]) -> str:
    """Returns what each column of a front means.

    Args:
        shown: the headings of its columns.
        front: its versions.
        dense: the dense network.
        below: the simple versions below the front.
    """
    accuracy = dense.measured["accuracy"]
    half_width = max(accuracy_half_width(version.measured["accuracy"]) for version in [*front, dense])
    per, images = ("frame", "frames of a stream of ") if _has_frames(dense) else ("batch", "")
    simple = [str(version.trial) for version in [*front, *below] if version.number < 0]
    against = [heading for heading in ("points", "speed", "FLOPs") if heading in shown]
    candidates = [version.evaluation.candidate for version in front]
    stored = any("int4" in candidate.precision.values() for candidate in candidates)
    shortened = any(candidate.removed_blocks for candidate in candidates)
    resized = any(candidate.input_size for candidate in candidates)
    kept = (
        f"kept: channels{', and how many residual blocks are left out' if shortened else ''}"
        f"{'; @: images are resized to that size, which is not timed' if resized else ''}"
    )
    by_heading = {
        _KEYS: "keys: frames that are computed",
        "size": "size: of the files",
        "kept": kept,
        "int8": f"int8: layers in int8{' + stored in int4' if stored else ''}, of all",
        "exits": "exits: share of the images that each answers",
    }
    return "; ".join([
        f"latency per {per} on {dense.measured['latency'].target}",
        f"accuracy on {accuracy.n} {images}validation images, known to within {half_width * 100:.1f} points at 95%",
        *([f"{', '.join(against)}: against dense"] if against else []),
        *(by_heading[heading] for heading in shown if heading in by_heading),
        f"{'rows' if len(simple) > 1 else 'row'} {' and '.join(simple)}: the network as it is, to be beaten",
    ])  # fmt: skip
