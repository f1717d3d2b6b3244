"""The front as pictures: self-contained HTML, and PNG."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure

from search.budget import Budget
from search.front import Version, choose
from search.profile import EIGHTHS, Point
from search.text import exit_shares, int8_layers, kept_channels, milliseconds, percent

_COLORS = {"over the budget": "#b0b0b0", "within the budget": "#1f77b4", "front": "#d62728", "dense": "#000000"}
_LIMIT = "#808080"


def group(
    versions: Sequence[Version], front: Sequence[Version], good: Sequence[Version], dense: Version
) -> dict[str, list[Version]]:
    """Returns the fully measured versions in the groups that the pictures tell apart."""
    on_front = {version.number for version in front}
    within = {version.number for version in good}
    complete = [version for version in versions if version.is_complete]
    return {
        "over the budget": [version for version in complete if version.number not in within],
        "within the budget": [v for v in complete if v.number in within and v.number not in on_front],
        "front": list(front),
        "dense": [dense],
    }


def caption(versions: Sequence[Version], budget: Budget, dense: Version) -> list[str]:
    """Returns the pictures' title and, below it, how to read them and what is not shown."""
    given_up = sum(not version.is_complete for version in versions)
    lines = [
        f"Front within {budget}: unbeaten in accuracy, latency and FLOPs together",
        f"{dense.measured['latency'].target}; the larger a point, the more FLOPs",
    ]
    return [*lines, f"{given_up} more versions broke {budget} and were not scored"] if given_up else lines


def front_html(groups: dict[str, list[Version]], title: Sequence[str], budget: Budget) -> str:
    """Returns a page that works offline: accuracy over latency, FLOPs as size, details under the pointer."""
    (dense,) = groups["dense"]
    figure = go.Figure()
    for name, versions in groups.items():
        figure.add_trace(
            go.Scatter(
                x=[version.measured["latency"].value * 1e3 for version in versions],
                y=[version.measured["accuracy"].value * 100 for version in versions],
                hovertext=[_hover(version, dense) for version in versions],
                hoverinfo="text",
                name=f"{name} ({len(versions)})" if name != "dense" else name,
                mode="markers",
                marker={
                    "color": _COLORS[name],
                    "size": [6 + 14 * _flops_share(version, dense) for version in versions],
                    "symbol": "star" if name == "dense" else "circle",
                    "opacity": 0.8,
                },
            )
        )
    for axis, value, label in _limit_lines(budget, dense):
        draw = figure.add_vline if axis == "x" else figure.add_hline
        draw(value, line_dash="dash", line_color=_LIMIT, annotation_text=label)
    figure.update_layout(
        title={"text": f"{title[0]}<br><sub>{'<br>'.join(title[1:])}</sub>", "font": {"size": 16}},
        margin={"t": 110},
        legend={"orientation": "h", "y": -0.15},
        xaxis_title="latency per batch, ms",
        yaxis_title="validation accuracy, %",
        template="plotly_white",
    )
    return str(figure.to_html(include_plotlyjs=True, full_html=True))


def save_front_png(groups: dict[str, list[Version]], title: Sequence[str], budget: Budget, file: Path) -> None:
    """Writes the same picture as a PNG."""
    (dense,) = groups["dense"]
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    for name, versions in groups.items():
        if not versions:
            continue
        x = [version.measured["latency"].value * 1e3 for version in versions]
        y = [version.measured["accuracy"].value * 100 for version in versions]
        sizes = [10 + 80 * _flops_share(version, dense) for version in versions]
        label = name if name == "dense" else f"{name} ({len(versions)})"
        marker = "*" if name == "dense" else "o"
        axes.scatter(x, y, s=sizes, color=_COLORS[name], marker=marker, alpha=0.8, label=label, zorder=2)
    for version in {found.number: found for found in _notable(groups["front"])}.values():
        at = (version.measured["latency"].value * 1e3, version.measured["accuracy"].value * 100)
        axes.annotate(f"trial {version.number}", at, textcoords="offset points", xytext=(6, 6), fontsize=8)
    for axis, value, label in _limit_lines(budget, dense):
        draw = axes.axvline if axis == "x" else axes.axhline
        draw(value, linestyle="--", color=_LIMIT, label=label, zorder=1)
    axes.set_title(title[0], fontsize="large", loc="left", pad=36)
    axes.text(0, 1.02, "\n".join(title[1:]), transform=axes.transAxes, fontsize="small", color=_LIMIT)
    axes.set_xlabel("latency per batch, ms")
    axes.set_ylabel("validation accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize="small")
    figure.savefig(file, dpi=120)


def _notable(front: Sequence[Version]) -> list[Version]:
    """Returns the most accurate version, the knee and the fastest one."""
    return [choose(front, prefer)[0] for prefer in ("accuracy", "knee", "latency")] if front else []


def _flops_share(version: Version, dense: Version) -> float:
    return version.measured["flops"].value / dense.measured["flops"].value


def _hover(version: Version, dense: Version) -> str:
    measured, candidate = version.measured, version.evaluation.candidate
    name = "dense" if version is dense else f"trial {version.number}"
    return "<br>".join(
        [
            f"<b>{name}</b>",
            f"accuracy {percent(measured['accuracy'].value)} ± {measured['accuracy'].spread * 100:.2f} points",
            f"latency {milliseconds(measured['latency'].value)} ± {milliseconds(measured['latency'].spread)}",
            f"FLOPs {_flops_share(version, dense):.1%} of dense",
            f"channels {kept_channels(candidate, dense.evaluation.candidate)}, int8 layers {int8_layers(candidate)}",
            f"leave at exits {exit_shares(measured['accuracy'])}",
        ]
    )


def _limit_lines(budget: Budget, dense: Version) -> list[tuple[str, float, str]]:
    """Returns the budget's limits on the picture's two axes: axis, position, label."""
    lines = []
    for constraint in budget.constraints:
        base = dense.measured[constraint.measured_as].value
        if constraint.name == "latency":
            lines.append(("x", constraint.limit * (base if constraint.relative else 1) * 1e3, str(constraint)))
        elif constraint.name == "accuracy":
            lines.append(("y", constraint.limit * 100, str(constraint)))
        elif constraint.name == "accuracy_drop":
            lines.append(("y", (base - constraint.limit) * 100, str(constraint)))
    return lines


def save_profile_png(groups: Mapping[str, Sequence[Point]], title: str, file: Path) -> None:
    """Writes the sensitivity profile as two heat maps, of the divergence and of the change of the loss.

    Args:
        groups: the points of each group, widest first.
        title: of the picture.
        file: a PNG.
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
        drawn = axes.imshow(values, aspect="auto", cmap="YlOrRd", norm=SymLogNorm(0.01, vmin=0))
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                shade = "white" if drawn.norm(value) > 0.7 else "black"
                axes.text(column, row, f"{value:.2g}", ha="center", va="center", fontsize=7, color=shade)
        axes.set_xticks(range(len(shares)), [f"{share / EIGHTHS:.0%}" for share in shares], fontsize=8)
        axes.set_yticks(range(len(groups)), list(groups), fontsize=8)
        axes.set_xlabel("share of the group's channels kept")
        axes.set_title(label, fontsize="medium")
    figure.savefig(file, dpi=120)
