"""The front as pictures: self-contained HTML, and PNG."""

from collections.abc import Sequence
from pathlib import Path

import plotly.graph_objects as go
from matplotlib.figure import Figure

from search.budget import Budget
from search.front import Version
from search.text import exit_shares, int8_layers, kept_channels, milliseconds, percent

_FRONT, _FEASIBLE, _OTHER, _DENSE = "#d62728", "#1f77b4", "#b0b0b0", "#000000"


def split(versions: Sequence[Version], front: Sequence[Version], good: Sequence[Version]) -> dict[str, list[Version]]:
    """Returns the fully measured versions in the groups that the pictures tell apart."""
    on_front = {version.number for version in front}
    within = {version.number for version in good}
    complete = [version for version in versions if version.is_complete]
    return {
        "over the budget": [version for version in complete if version.number not in within],
        "within the budget": [v for v in complete if v.number in within and v.number not in on_front],
        "front": list(front),
    }


def front_html(groups: dict[str, list[Version]], dense: Version, budget: Budget) -> str:
    """Returns a page that works offline: accuracy over latency, with what each version is under the pointer."""
    figure = go.Figure()
    colors = dict(zip(groups, (_OTHER, _FEASIBLE, _FRONT), strict=True))
    for name, versions in [*groups.items(), ("dense", [dense])]:
        figure.add_trace(
            go.Scatter(
                x=[version.measured["latency"].value * 1e3 for version in versions],
                y=[version.measured["accuracy"].value * 100 for version in versions],
                text=[_hover(version, dense) for version in versions],
                hoverinfo="text",
                name=name,
                mode="lines+markers" if name == "front" else "markers",
                line={"shape": "hv", "width": 1},
                marker={
                    "color": colors.get(name, _DENSE),
                    "size": 11 if name in ("front", "dense") else 7,
                    "symbol": "star" if name == "dense" else "circle",
                },
            )
        )
    for axis, value, label in _limit_lines(budget, dense):
        draw = figure.add_vline if axis == "x" else figure.add_hline
        draw(value, line_dash="dash", line_color=_OTHER, annotation_text=label)
    figure.update_layout(
        title=f"Versions within {budget}",
        xaxis_title=f"latency per batch, ms ({dense.measured['latency'].target})",
        yaxis_title="validation accuracy, %",
        template="plotly_white",
    )
    return str(figure.to_html(include_plotlyjs=True, full_html=True))


def save_front_png(groups: dict[str, list[Version]], dense: Version, budget: Budget, file: Path) -> None:
    """Writes the same picture as a PNG."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for (name, versions), color in zip(groups.items(), (_OTHER, _FEASIBLE, _FRONT), strict=True):
        ordered = sorted(versions, key=lambda version: version.measured["latency"].value)
        x = [version.measured["latency"].value * 1e3 for version in ordered]
        y = [version.measured["accuracy"].value * 100 for version in ordered]
        axes.scatter(x, y, color=color, s=45 if name == "front" else 20, label=f"{name} ({len(ordered)})", zorder=2)
    at = (dense.measured["latency"].value * 1e3, dense.measured["accuracy"].value * 100)
    axes.scatter(*at, color=_DENSE, marker="*", s=140, label="dense", zorder=3)
    for axis, value, label in _limit_lines(budget, dense):
        draw = axes.axvline if axis == "x" else axes.axhline
        draw(value, linestyle="--", color=_OTHER, label=label, zorder=1)
    axes.set_xlabel(f"latency per batch, ms\n({dense.measured['latency'].target})")
    axes.set_ylabel("validation accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize="small")
    figure.savefig(file, dpi=120)


def _hover(version: Version, dense: Version) -> str:
    measured, candidate = version.measured, version.evaluation.candidate
    name = "dense" if version is dense else f"trial {version.number}"
    return "<br>".join(
        [
            f"<b>{name}</b>",
            f"accuracy {percent(measured['accuracy'].value)} ± {measured['accuracy'].spread * 100:.2f} points",
            f"latency {milliseconds(measured['latency'].value)} ± {milliseconds(measured['latency'].spread)}",
            f"FLOPs {measured['flops'].value / dense.measured['flops'].value:.1%} of dense",
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
