"""Hover text of a version in plotly's pictures."""

from search.config.units import milliseconds, percent, size, threshold
from search.report.describe import accuracy_half_width, exit_shares, int8_layers, kept_channels
from search.report.layers import layers_of
from search.results.pareto import Version

_LAYERS = 24
"""Layers, at most, that are listed."""
_PER_LINE = 2


def hover(version: Version, dense: Version) -> str:
    """Returns the description of a version in plotly's HTML: its measurements, then its layers."""
    measured, candidate = version.measured, version.evaluation.candidate
    accuracy, latency = measured["accuracy"], measured["latency"]
    lines = [
        "<b>dense network</b>" if version is dense else f"<b>{version.title}</b>",
        f"accuracy {percent(accuracy.value)} ± {accuracy_half_width(accuracy) * 100:.1f} points,"
        f" latency {milliseconds(latency.value)} ± {latency.half_width:.1%}",
        f"FLOPs {measured['flops'].value / dense.measured['flops'].value:.1%} of dense, {size(measured['size'].value)}",
        f"channels {kept_channels(candidate, dense.evaluation.candidate)}, int8 layers {int8_layers(candidate)}",
    ]
    if candidate.removed_blocks:
        lines.append(f"without {len(candidate.removed_blocks)} residual blocks: {', '.join(candidate.removed_blocks)}")
    if candidate.input_size:
        lines.append(f"images resized to {candidate.input_size}x{candidate.input_size}")
    if candidate.active_exits:
        confidences = zip(candidate.active_exits, candidate.thresholds.confidences, strict=True)
        thresholds = ", ".join(f"{name} from {threshold(confidence)}" for name, confidence in confidences)
        lines.append(f"exits: {thresholds}; shares answered: {exit_shares(accuracy)}")
    if candidate.active_skips:
        lines.append(f"{len(candidate.active_skips)} blocks that images may skip")
    if candidate.thresholds.masks:
        lines.append(f"masks in {len(candidate.thresholds.masks)} blocks: they save FLOPs, but no time")
    return "<br>".join([*lines, *_layer_lines(version, dense)])


def _layer_lines(version: Version, dense: Version) -> list[str]:
    """Returns the layers, `_PER_LINE` on each line."""
    layers = layers_of(version.evaluation.candidate, dense.evaluation.candidate, {})
    entries = [f"{layer.name} {layer}" for layer in layers[:_LAYERS] if str(layer) != "-"]
    lines = ["; ".join(entries[start : start + _PER_LINE]) for start in range(0, len(entries), _PER_LINE)]
    more = len(layers) - _LAYERS
    return [f"<i>{line}</i>" for line in lines] + ([f"<i>and {more} more layers</i>"] if more > 0 else [])
