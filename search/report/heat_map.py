"""The sensitivity profile as tables for a terminal."""

import math
from collections.abc import Callable

from rich import box
from rich.table import Table
from rich.text import Text

from search.results.sensitivity import EIGHTHS, Point, Profile

_COLORS = ("#ffffff", "#ffeda0", "#feb24c", "#fc4e2a", "#b10026")
_LOWEST, _HIGHEST = 0.003, 1.0
"""Range of the colours in nats, on a logarithmic scale."""


def heat_maps(profile: Profile) -> list[Table]:
    """Returns two tables: divergence and change of the loss, a row for each group, a column for each share kept."""
    return [
        _table(profile, "KL divergence by share of channels kept", lambda point: point.divergence),
        _table(profile, "change of the loss by share of channels kept", lambda point: point.loss),
    ]


def _table(profile: Profile, title: str, value: Callable[[Point], float]) -> Table:
    columns = sorted({point.eighth for point in profile.points if point.share < 1}, reverse=True)
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column("group", overflow="fold")
    for heading in ("of", *(f"{column / EIGHTHS:.0%}" for column in columns)):
        table.add_column(heading, justify="right", no_wrap=True)
    for group, points in profile.groups.items():
        cells = {point.eighth: _cell(value(point)) for point in points[1:]}
        table.add_row(group, str(points[0].channels), *(cells.get(column, Text("")) for column in columns))
    return table


def _cell(value: float) -> Text:
    position = math.log(max(value, _LOWEST) / _LOWEST) / math.log(_HIGHEST / _LOWEST)
    color = _COLORS[min(round(position * (len(_COLORS) - 1)), len(_COLORS) - 1)]
    return Text(f"{value:.3f}", style=f"{'white' if color == _COLORS[-1] else 'black'} on {color}")
