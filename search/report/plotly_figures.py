"""The pictures of a search for a browser, drawn with plotly; they work offline."""

from collections.abc import Callable, Mapping, Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from search.report.axes import accuracy_view, coordinates, flops_share, limit_lines, staircase
from search.report.hover import hover
from search.report.importance import IMPORTANCE
from search.report.layers import HeatMap, heat_map, leaving_shares, parallel_axes
from search.report.overview import DENSE, FRONT, OVER, WITHIN, Overview
from search.report.palette import BLUE, GREY, LIMIT, MARKS, NOTABLE_SHAPES, ORANGE, PRECISIONS, SEQUENTIAL, SERIES
from search.results.sensitivity import EIGHTHS, Profile

_ROW = 20
"""Height of a heat map's row, in pixels."""


def figures(overview: Overview) -> dict[str, go.Figure]:
    """Returns every picture for which the search has data, by its heading."""
    drawn: Mapping[str, Callable[[Overview], go.Figure | None]] = {
        "Front": front_figure,
        "All measured versions": parallel_figure,
        "Layers along the front": layers_figure,
        "Progress": hypervolume_figure,
        "Where inputs leave": exits_figure,
        "Which channels matter": profile_figure,
        IMPORTANCE: importance_figure,
    }
    return {heading: figure for heading, draw in drawn.items() if (figure := draw(overview)) is not None}


def _laid_out(figure: go.Figure, height: int, **settings: object) -> go.Figure:
    figure.update_layout(template="plotly_white", height=height, margin={"t": 40, "r": 20, "l": 60, "b": 60})
    figure.update_layout(font={"size": 13}, **settings)
    return figure


def front_figure(overview: Overview) -> go.Figure:
    """Returns accuracy over latency, with FLOPs as size, and the candidate as hover text."""
    figure = go.Figure()
    corners = staircase(overview.front)
    figure.add_scatter(
        x=[at[0] for at in corners],
        y=[at[1] for at in corners],
        mode="lines",
        line={"color": MARKS[FRONT].color, "width": 1},
        hoverinfo="skip",
        showlegend=False,
    )
    for name, versions in overview.groups.items():
        places = [coordinates(version) for version in versions]
        sizes = [7 + 12 * flops_share(version, overview.dense) for version in versions]
        figure.add_scatter(
            x=[at[0] for at in places],
            y=[at[1] for at in places],
            hovertext=[hover(version, overview.dense) for version in versions],
            hoverinfo="text",
            name=name if name == DENSE else f"{name} ({len(versions)})",
            mode="markers",
            marker={"color": MARKS[name].color, "size": sizes, "symbol": MARKS[name].plotly, "opacity": 0.85}
            | {"line": {"width": 1.5 if name == OVER else 0.5}},
        )
    _add_notable(figure, overview)
    _add_limits(figure, overview)
    figure.update_xaxes(title="latency per batch, ms")
    view = accuracy_view(overview)
    figure.update_yaxes(title="validation accuracy, %", range=list(view) if view else None)
    return _laid_out(figure, 560, legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"})


def _add_notable(figure: go.Figure, overview: Overview) -> None:
    for (name, version), (_, shape) in zip(overview.notable, NOTABLE_SHAPES, strict=False):
        x, y = coordinates(version)
        marker = {"symbol": f"{shape}-open", "size": 19, "color": "black", "line": {"width": 2}}
        label = f"{name}: {version.title}"
        figure.add_scatter(x=[x], y=[y], mode="markers", name=label, marker=marker, hoverinfo="skip")


def _add_limits(figure: go.Figure, overview: Overview) -> None:
    for line in limit_lines(overview.budget, overview.dense):
        draw = figure.add_vline if line.axis == "x" else figure.add_hline
        where = "top left" if line.axis == "x" else "bottom right"
        draw(line.value, line_dash="dash", line_color=LIMIT, annotation_text=line.label, annotation_position=where)


def parallel_figure(overview: Overview) -> go.Figure | None:
    """Returns the parallel coordinates of the fully measured versions: accuracy, costs and compression."""
    groups = [name for name in (OVER, WITHIN, FRONT) if overview.groups[name]]
    versions = [version for name in groups for version in overview.groups[name]]
    if len(versions) < 2:
        return None
    codes = [index for index, name in enumerate(groups) for _ in overview.groups[name]]
    count = len(groups)
    axes = [{"label": axis.title, "values": axis.values} for axis in parallel_axes(versions, overview.dense)]
    bar = {"tickvals": list(range(count)), "ticktext": groups, "thickness": 12}
    line = {"color": codes, "colorscale": _stepped([MARKS[name].color for name in groups]), "colorbar": bar}
    line |= {"cmin": -0.5, "cmax": count - 0.5, "showscale": True}
    figure = go.Figure(
        go.Parcoords(
            line=line,
            dimensions=axes,
            labelfont={"size": 12},
            tickfont={"size": 10},
            rangefont={"color": "rgba(0,0,0,0)"},
        )
    )
    return _laid_out(figure, 420).update_layout(margin={"t": 80, "l": 70, "r": 30})


def layers_figure(overview: Overview) -> go.Figure | None:
    """Returns heat maps of the channels and precisions of the front's versions, the fastest first."""
    if not overview.front:
        return None
    heat = heat_map(overview.by_latency, overview.dense)
    names = [version.title for version in heat.versions]
    heights = [len(heat.groups), len(heat.layers)]
    titles = ("channels kept", "precision")
    gap = 60 / (_ROW * sum(heights) + 60)
    figure = make_subplots(2, 1, row_heights=heights, subplot_titles=titles, vertical_spacing=gap)
    few = len(names) <= 20
    figure.add_heatmap(
        row=1,
        col=1,
        x=names,
        y=list(heat.groups),
        z=heat.share,
        text=heat.kept,
        zmin=0,
        zmax=1,
        colorscale=SEQUENTIAL,
        texttemplate="%{text}" if few else None,
        xgap=1,
        ygap=1,
        hovertemplate="%{y}<br>%{x}: %{text} channels, %{z:.0%}<extra></extra>",
        colorbar={"title": "share", "tickformat": ".0%", "thickness": 12, "len": 0.4, "y": 1, "yanchor": "top"},
    )
    _add_precision(figure, heat, names, few)
    figure.update_yaxes(autorange="reversed", automargin=True, dtick=1, tickfont={"size": 11})
    figure.update_xaxes(tickangle=-90, dtick=1, type="category")
    figure.update_xaxes(showticklabels=False, row=1, col=1)
    return _laid_out(figure, _ROW * sum(heights) + 220)


def _add_precision(figure: go.Figure, heat: HeatMap, names: list[str], few: bool) -> None:
    known = heat.precisions
    codes = [[known.index(name) if name else None for name in row] for row in heat.precision]
    scale = _stepped([PRECISIONS.get(name, GREY) for name in known])
    bar = {"tickvals": list(range(len(known))), "ticktext": known, "thickness": 12, "len": 0.4, "y": 0}
    figure.add_heatmap(
        row=2, col=1, x=names, y=list(heat.layers), z=codes, text=heat.precision, zmin=-0.5, zmax=len(known) - 0.5,
        colorscale=scale, texttemplate="%{text}" if few else None, xgap=1, ygap=1,
        hovertemplate="%{y}<br>%{x}: %{text}<extra></extra>", colorbar=bar | {"yanchor": "bottom"},
    )  # fmt: skip


def _stepped(colors: Sequence[str]) -> list[list[float | str]]:
    """Returns a colour scale with one band for each colour, for the codes 0, 1, ... on an axis from -0.5."""
    width = 1 / len(colors)
    return [[at, color] for place, color in enumerate(colors) for at in (place * width, (place + 1) * width)]


def hypervolume_figure(overview: Overview) -> go.Figure | None:
    """Returns the hypervolume over the trials."""
    if not overview.hypervolume_history:
        return None
    trials, shares = zip(*overview.hypervolume_history, strict=True)
    figure = go.Figure(go.Scatter(x=trials, y=[share * 100 for share in shares], line={"shape": "hv", "color": LIMIT}))
    figure.update_traces(hovertemplate="after trial %{x}: %{y:.2f}%<extra></extra>")
    figure.update_xaxes(title="trial")
    figure.update_yaxes(title="hypervolume, %", rangemode="tozero")
    return _laid_out(figure, 340)


def exits_figure(overview: Overview) -> go.Figure | None:
    """Returns the share of the inputs that each exit answers, along the front; None without exits."""
    exits = overview.dense.evaluation.candidate.thresholds.exits
    if not exits or not overview.front:
        return None
    versions = overview.by_latency
    shares = [leaving_shares(version) for version in versions]
    shares = [[*some, 1 - sum(some)] for some in shares]
    names = [version.title for version in versions]
    figure = go.Figure()
    for index, name in enumerate([*exits, "end"]):
        values = [some[index] * 100 for some in shares]
        color = SERIES[index % len(SERIES)] if name != "end" else PRECISIONS["fp32"]
        figure.add_bar(x=names, y=values, name=name, marker={"color": color, "line": {"color": "white", "width": 1}})
    figure.update_traces(hovertemplate="%{x}: %{y:.1f}%<extra>%{fullData.name}</extra>")
    figure.update_xaxes(tickangle=-90, dtick=1, type="category", automargin=True)
    figure.update_yaxes(title="answered there, %")
    return _laid_out(figure, 380, barmode="stack", legend={"traceorder": "normal"})


def profile_figure(overview: Overview) -> go.Figure | None:
    """Returns the sensitivity profile: divergence by group and share of its channels; None if none was measured."""
    profile: Profile | None = overview.profile
    if profile is None:
        return None
    columns = sorted({point.eighth for point in profile.points if point.share < 1}, reverse=True)
    by_place = {(point.group, point.eighth): point.divergence for point in profile.points}
    values = [[by_place.get((group, column)) for column in columns] for group in profile.groups]
    # Colours show the square root, which distinguishes small divergences better; the texts are the divergences.
    shades = [[None if value is None else value**0.5 for value in row] for row in values]
    text = [["" if value is None else f"{value:.2g}" for value in row] for row in values]
    figure = go.Figure(go.Heatmap(
        x=[f"{column / EIGHTHS:.0%}" for column in columns], y=list(profile.groups), z=shades, text=text,
        xgap=1, ygap=1,
        colorscale=SEQUENTIAL, reversescale=True, texttemplate="%{text}", showscale=False,
        hovertemplate="%{y}, %{x} of its channels: %{text} nats<extra></extra>",
    ))  # fmt: skip
    figure.update_yaxes(autorange="reversed", automargin=True, dtick=1)
    figure.update_xaxes(title="share of the group's channels kept", type="category")
    return _laid_out(figure, _ROW * len(profile.groups) + 130)


def importance_figure(overview: Overview) -> go.Figure | None:
    """Returns the effect of each change on latency and accuracy as bars, the largest reduction of latency on top."""
    importance = overview.importance
    if importance is None or not importance.effects:
        return None
    effects = importance.effects[::-1]
    names = [f"{each.name}: {each.change}" for each in effects]
    titles = ("latency, % of the dense network's", "accuracy, points")
    figure = make_subplots(1, 2, shared_yaxes=True, subplot_titles=titles)
    figure.add_bar(
        y=names, x=[each.latency * 100 for each in effects], orientation="h", marker_color=BLUE, col=1, row=1
    )
    figure.add_bar(
        y=names, x=[each.accuracy * 100 for each in effects], orientation="h", marker_color=ORANGE, col=2, row=1
    )
    return _laid_out(figure, 120 + _ROW * len(effects), showlegend=False).update_layout(margin={"l": 220})
