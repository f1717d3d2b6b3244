"""The pictures of a search as PNG files, drawn with matplotlib."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import SymLogNorm, to_rgb
from matplotlib.figure import Figure

from search.report.axes import accuracy_view, caption, coordinates, flops_share, limit_lines, staircase
from search.report.importance import IMPORTANCE
from search.report.layers import HeatMap, heat_map, leaving_shares, parallel_axes
from search.report.overview import DENSE, FRONT, OVER, WITHIN, Overview
from search.report.palette import (
    BLACK,
    BLUE,
    GREY,
    LIMIT,
    MARKS,
    NOTABLE_SHAPES,
    ORANGE,
    PRECISIONS,
    SEQUENTIAL,
    SERIES,
)
from search.results.sensitivity import EIGHTHS, Point

DPI = 120
_MAX_LABELLED_COLUMNS = 20
"""The maximum number of columns of a heat map with numbers in its cells."""
_COLUMN, _ROW = 0.32, 0.22
"""Width and height of a heat map's cell, in inches."""
_LINEAR = 0.01
"""The colours of the profile are linear up to this value, in nats, and logarithmic above it."""
_DARK = 0.45
"""Text is white on colours whose lightness is lower than this."""


def save_pictures(overview: Overview, folder: Path) -> None:
    """Writes every picture for which the search has data."""
    drawn: Mapping[str, Callable[[Overview], Figure | None]] = {
        "front.png": front_picture,
        "parallel.png": parallel_picture,
        "layers.png": layers_picture,
        "hypervolume.png": hypervolume_picture,
        "exits.png": exits_picture,
        "profile.png": _profile_of,
        "importance.png": importance_picture,
    }
    for name, draw in drawn.items():
        if (figure := draw(overview)) is not None:
            figure.savefig(folder / name, dpi=DPI)


def front_picture(overview: Overview) -> Figure:
    """Returns accuracy over latency, with FLOPs as size and names in the legend, so that none hides another."""
    figure = Figure(figsize=(9, 5.8), layout="constrained")
    axes = figure.add_subplot()
    if overview.front:
        axes.plot(*zip(*staircase(overview.front), strict=True), color=MARKS[FRONT].color, linewidth=1, zorder=1)
    for order, (name, versions) in enumerate(overview.groups.items(), 2):
        _scatter(axes, overview, name, versions, order)
    for (name, version), (shape, _) in zip(overview.notable, NOTABLE_SHAPES, strict=False):
        label = f"{name}: {version.title}"
        ring: dict[str, Any] = {"s": 170, "facecolors": "none", "edgecolors": BLACK, "linewidths": 1.6}
        axes.scatter(*coordinates(version), marker=shape, label=label, zorder=7, **ring)
    for line in limit_lines(overview.budget, overview.dense):
        draw = axes.axvline if line.axis == "x" else axes.axhline
        draw(line.value, linestyle="--", color=LIMIT, label=line.label, zorder=1)
    below = _set_view(axes, overview)
    title, *rest = caption(overview)
    rest = [*rest[:-1], f"{rest[-1]}; {below}"] if below else rest
    axes.set_title("\n".join(rest), fontsize="small", color=GREY, loc="left")
    figure.suptitle(title, fontsize="large", x=0.01, ha="left")
    axes.set(xlabel="latency per batch, ms", ylabel="validation accuracy, %")
    axes.grid(alpha=0.3)
    legend = figure.legend(loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    for handle in legend.legend_handles:
        if isinstance(handle, PathCollection):
            handle.set_sizes([45])
    return figure


def _scatter(axes: Axes, overview: Overview, name: str, versions: Sequence[Any], order: int) -> None:
    if not versions:
        return
    mark = MARKS[name]
    sizes = [160 if name == DENSE else 18 + 60 * flops_share(version, overview.dense) for version in versions]
    label = name if name == DENSE else f"{name} ({len(versions)})"
    edge: dict[str, Any] = {"linewidths": 1.2} if name == OVER else {"edgecolors": "white", "linewidths": 0.5}
    x, y = zip(*map(coordinates, versions), strict=True)
    axes.scatter(x, y, s=sizes, color=mark.color, marker=mark.matplotlib, label=label, zorder=order, **edge)


def _set_view(axes: Axes, overview: Overview) -> str:
    """Limits the view to most versions; returns a text with the number of versions outside, or an empty one."""
    view = accuracy_view(overview)
    if view is None:
        return ""
    axes.set_ylim(*view)
    return f"{sum(coordinates(version)[1] < view[0] for version in overview.complete)} are below this view"


def parallel_picture(overview: Overview) -> Figure | None:
    """Returns the parallel coordinates of the fully measured versions: accuracy, costs and compression."""
    names = [name for name in (OVER, WITHIN, FRONT) if overview.groups[name]]
    versions = [version for name in names for version in overview.groups[name]]
    if len(versions) < 2:
        return None
    columns = parallel_axes(versions, overview.dense)
    values = np.array([axis.values for axis in columns])
    low, high = values.min(axis=1, keepdims=True), values.max(axis=1, keepdims=True)
    scaled = np.where(high > low, (values - low) / np.where(high > low, high - low, 1), 0.5)
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    axes = figure.add_subplot()
    start = 0
    for order, name in enumerate(names):
        count = len(overview.groups[name])
        look: dict[str, Any] = {"linewidth": 1.6, "alpha": 0.9} if name == FRONT else {"linewidth": 0.7, "alpha": 0.45}
        style = "--" if name == OVER else "-"
        lines = axes.plot(scaled[:, start : start + count], color=MARKS[name].color, ls=style, zorder=order, **look)
        lines[0].set_label(f"{name} ({count})")
        start += count
    for index, axis in enumerate(columns):
        axes.axvline(index, color=BLACK, linewidth=0.8)
        for at, value in ((-0.03, min(axis.values)), (1.03, max(axis.values))):
            side = "top" if at < 0 else "bottom"
            axes.text(index, at, f"{value:.3g}", ha="center", va=side, fontsize=9)
    axes.set_xticks(range(len(columns)), [axis.title for axis in columns], fontsize=9)
    axes.tick_params(axis="x", length=0, pad=16)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_ylim(-0.02, 1.02)
    figure.suptitle("All measured versions, each axis from its minimum to its maximum", x=0.01, ha="left")
    figure.legend(loc="outside lower center", ncols=3, fontsize="small", frameon=False)
    return figure


def layers_picture(overview: Overview) -> Figure | None:
    """Returns heat maps of the channels and precisions of the front's versions, the fastest first."""
    if not overview.front:
        return None
    heat = heat_map(overview.by_latency, overview.dense)
    heights = [len(heat.groups), len(heat.layers)]
    longest = max(len(name) for name in (*heat.groups, *heat.layers))
    width = max(6.5, 1.8 + 0.08 * longest + _COLUMN * len(heat.versions) + 1.2)
    figure = Figure(figsize=(width, 2.3 + _ROW * sum(heights)), layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=heights, sharex=True)
    drawn = upper.imshow(heat.share, aspect="auto", cmap=SEQUENTIAL, vmin=0, vmax=1)
    figure.colorbar(drawn, ax=upper, format="{x:.0%}", label="share of the channels")
    upper.set_yticks(range(heights[0]), heat.groups, fontsize=8)
    upper.set_title("channels kept", fontsize="medium", loc="left")
    _draw_precision(lower, heat)
    if len(heat.versions) <= _MAX_LABELLED_COLUMNS:
        for (row, column), value in np.ndenumerate(heat.kept):
            _write(upper, row, column, str(value), drawn.cmap(heat.share[row, column]))
    lower.set_xticks(range(len(heat.versions)), [each.title for each in heat.versions], rotation=90, fontsize=8)
    figure.suptitle("Layers along the front, the fastest version first", x=0.01, ha="left")
    return figure


def _draw_precision(axes: Axes, heat: HeatMap) -> None:
    white = np.ones(3)
    colors = [[to_rgb(PRECISIONS.get(name, GREY)) if name else white for name in row] for row in heat.precision]
    axes.imshow(np.array(colors), aspect="auto")
    axes.set_yticks(range(len(heat.layers)), heat.layers, fontsize=8)
    axes.set_title("precision", fontsize="medium", loc="left")
    if len(heat.versions) <= _MAX_LABELLED_COLUMNS:
        for row, names in enumerate(heat.precision):
            for column, name in enumerate(names):
                _write(axes, row, column, name, colors[row][column])
    for name in heat.precisions:
        axes.scatter([], [], marker="s", s=70, color=PRECISIONS.get(name, GREY), label=name)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8, frameon=False)


def _write(axes: Axes, row: int, column: int, text: str, background: Any) -> None:
    lightness = float(np.dot(np.asarray(background)[:3], (0.299, 0.587, 0.114)))
    color = "white" if lightness < _DARK else "black"
    axes.text(column, row, text, ha="center", va="center", fontsize=7, color=color)


def hypervolume_picture(overview: Overview) -> Figure | None:
    """Returns the hypervolume over the trials."""
    if not overview.hypervolume_history:
        return None
    trials, shares = zip(*overview.hypervolume_history, strict=True)
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.add_subplot()
    axes.step(trials, [share * 100 for share in shares], where="post", color=LIMIT)
    axes.set(xlabel="trial", ylabel="hypervolume, %")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.suptitle(f"Share of the box within {overview.budget} that the front dominates", x=0.01, ha="left")
    return figure


def exits_picture(overview: Overview) -> Figure | None:
    """Returns the share of the inputs that each exit answers, along the front; None without exits."""
    exits = overview.dense.evaluation.candidate.thresholds.exits
    if not exits or not overview.front:
        return None
    versions = overview.by_latency
    shares = np.array([[*leaving_shares(version), 1 - sum(leaving_shares(version))] for version in versions]).T * 100
    figure = Figure(figsize=(max(6.5, 2 + _COLUMN * len(versions)), 4), layout="constrained")
    axes = figure.add_subplot()
    bottom = np.zeros(len(versions))
    for index, (name, values) in enumerate(zip([*exits, "end"], shares, strict=True)):
        color = PRECISIONS["fp32"] if name == "end" else SERIES[index % len(SERIES)]
        axes.bar(range(len(versions)), values, bottom=bottom, color=color, edgecolor="white", label=name)
        bottom += values
    axes.set_xticks(range(len(versions)), [each.title for each in versions], rotation=90, fontsize=8)
    axes.set(ylabel="answered there, %", ylim=(0, 100))
    figure.suptitle("Where inputs leave, the fastest version of the front first", x=0.01, ha="left")
    figure.legend(loc="outside lower center", ncols=6, fontsize="small", frameon=False)
    return figure


def importance_picture(overview: Overview) -> Figure | None:
    """Returns the effect of each change on latency and accuracy as bars, the largest reduction of latency on top."""
    importance = overview.importance
    if importance is None or not importance.effects:
        return None
    effects = importance.effects[::-1]
    figure = Figure(figsize=(9, 1.6 + _ROW * len(effects)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    left.barh(range(len(effects)), [each.latency * 100 for each in effects], color=BLUE)
    right.barh(range(len(effects)), [each.accuracy * 100 for each in effects], color=ORANGE)
    left.set_yticks(range(len(effects)), [f"{each.name}: {each.change}" for each in effects], fontsize=8)
    left.set_xlabel(f"latency, % of the dense network's (R² {importance.latency_r2:.2f})")
    right.set_xlabel(f"accuracy, points (R² {importance.accuracy_r2:.2f})")
    for axes in (left, right):
        axes.axvline(0, color=BLACK, linewidth=0.8)
        axes.margins(y=0.01)
    figure.suptitle(f"{IMPORTANCE}, on average over all versions", x=0.01, ha="left")
    return figure


def _profile_of(overview: Overview) -> Figure | None:
    profile = overview.profile
    return (
        profile_picture(profile.groups, f"One group at a time, after recovery {profile.effort!r}") if profile else None
    )


def profile_picture(groups: Mapping[str, Sequence[Point]], title: str) -> Figure:
    """Returns the sensitivity profile as two heat maps: KL divergence, and change of the loss.

    Args:
        groups: the points of each group, widest first.
        title: of the picture.
    """
    shares = sorted({point.eighth for points in groups.values() for point in points}, reverse=True)
    figure = Figure(figsize=(4 + 1.1 * len(shares), 1.8 + 0.3 * len(groups)), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left")
    for axes, (label, attribute) in zip(
        figure.subplots(1, 2, sharey=True),
        (("KL divergence, nats", "divergence"), ("change of the loss, nats", "loss")),
        strict=True,
    ):
        values = np.full((len(groups), len(shares)), np.nan)
        for row, points in enumerate(groups.values()):
            for point in points:
                values[row, shares.index(point.eighth)] = getattr(point, attribute)
        # If cutting makes nothing worse, all values may be equal, but the colour scale needs a range.
        lowest = min(float(np.nanmin(values)), 0.0)
        norm = SymLogNorm(_LINEAR, vmin=lowest, vmax=max(float(np.nanmax(values)), lowest + _LINEAR))
        drawn = axes.imshow(values, aspect="auto", cmap=f"{SEQUENTIAL}_r", norm=norm)
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                _write(axes, row, column, f"{value:.2g}", drawn.cmap(drawn.norm(value)))
        axes.set_xticks(range(len(shares)), [f"{share / EIGHTHS:.0%}" for share in shares], fontsize=8)
        axes.set_yticks(range(len(groups)), list(groups), fontsize=8)
        axes.set_xlabel("share of the group's channels kept")
        axes.set_title(label, fontsize="medium")
    return figure
