"""Versions, and the uncertainty of their accuracies, as text."""

from evaluators.accuracy import interval
from evaluators.latency.slow_layers import SlowerLayers, SlowLayers, WholeNetwork
from evaluators.measurement import Measurement
from evaluators.streams import KEY_FRAMES
from search.config.units import milliseconds, percent, size
from search.results.simple_versions import GivenMeasurements
from spaces.candidate import Candidate

ZEROS = (
    "Zeros inside layers save no time on this target, whose kernels are dense, and FLOPs include them; the notes of"
    " flops and params in --json have the share that remains on hardware that skips zeros."
)
"""Note below a front whose layers may have unstructured zeros."""


def slow_layers_line(slow_layers: SlowLayers) -> str:
    """Returns a line on the speed of the whole network in lower precisions, and on layers that are slower in them."""
    cost = f"{slow_layers.timings} timings, {slow_layers.seconds:.1f} s"
    if slow_layers.refused:
        more = f", and for {len(slow_layers.refused) - 1} more reasons" if len(slow_layers.refused) > 1 else ""
        cost += f"; some could not be taken: {slow_layers.refused[0]}{more}"
    if slow_layers.unfinished:
        cost += f"; the time was up before every part was looked at in {' and '.join(slow_layers.unfinished)}"
    lost = [whole.precision for whole in slow_layers.wholes if whole.is_slower]
    sentences = [_as_a_whole(whole, slow_layers.left_out(whole.precision)) for whole in slow_layers.wholes]
    slower = [_slower(each) for each in slow_layers.slower if each.precision not in lost]
    if slower:
        more = f"; and {len(slower) - 3} more" if len(slower) > 3 else ""
        sentences.append(f"Left out as slower: {'; '.join(slower[:3])}{more}")
    elif not lost:
        sentences.append("No layer is measurably slower in a lower precision")
    return f"{'. '.join(sentences)} ({cost})."


def _as_a_whole(whole: WholeNetwork, left_out: int) -> str:
    """Returns a sentence on the latency of the whole network in a precision, and how many layers may have it."""
    name = whole.precision
    times = 1 / whole.ratio
    half_width = whole.half_width / whole.ratio
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


def _slower(each: SlowerLayers) -> str:
    them = "them" if len(each.layers) > 1 else "it"
    once = "" if each.is_confirmed else ", seen once"
    return (
        f"{' + '.join(each.layers)} not in {each.precision} (with {them} in {each.instead} the network takes"
        f" {each.ratio:.3f} ± {each.ratio * each.half_width:.3f} of its time{once})"
    )


def simple_lines(given: GivenMeasurements) -> list[str]:
    """Returns lines on the network in each precision, below a line that introduces them."""
    dense = given.simple[0].evaluation.measurements
    lines = [
        f"The network as it is, per batch on {dense['latency'].target}, accuracy on {dense['accuracy'].n} validation"
        " images; these are the lines to beat:"
    ]
    for simple in given.simple:
        measured = simple.evaluation.measurements
        share = measured["latency"].value / dense["latency"].value
        lines.append(
            f"  {simple.precision}  {milliseconds(measured['latency'].value):>9}  {share:>6.1%} of dense"
            f"  accuracy {percent(measured['accuracy'].value)}  {size(measured['size'].value)}"
        )
    return lines


def kept_share(candidate: Candidate, dense: Candidate) -> float:
    """Returns the share of the channels that a candidate keeps, 0 to 1, of those outside of blocks that it lacks."""
    present = [name for name in candidate.channels if not candidate.lacks(name)]
    kept = sum(candidate.channels[name] for name in present)
    return kept / max(sum(dense.channels[name] for name in present), 1)


def kept_channels(candidate: Candidate, dense: Candidate) -> str:
    """Returns the share of the channels that a candidate keeps, the blocks it lacks, its input size: `55% -3 @24`."""
    removed = f" -{len(candidate.removed_blocks)}" if candidate.removed_blocks else ""
    size = f" @{candidate.input_size}" if candidate.input_size else ""
    return f"{kept_share(candidate, dense):.0%}{removed}{size}"


def int8_layers(candidate: Candidate) -> str:
    """Returns the number of int8 layers and of all layers: `20/24`, or `16+4/24` if four more are stored in int4.

    Heads of inactive exits and blocks that are left out do not count, because they are not deployed.
    """
    heads = {layer for layer in candidate.precision if layer.startswith("exits.")}
    inactive = {layer for layer in heads if layer.split(".")[1] not in candidate.active_exits}
    deployed = [layer for layer in candidate.precision if layer not in inactive and not candidate.lacks(layer)]
    precisions = [candidate.precision[layer] for layer in deployed]
    stored = f"+{precisions.count('int4')}" if "int4" in precisions else ""
    return f"{precisions.count('int8')}{stored}/{len(precisions)}"


def exit_shares(accuracy: Measurement) -> str:
    """Returns the share of the inputs that each exit answers: `86% 9%`; a dash without exits."""
    return " ".join(f"{share:.0%}" for name, share in accuracy.notes.items() if name != KEY_FRAMES) or "-"


def accuracy_half_width(accuracy: Measurement) -> float:
    """Returns the half-width of the 95% interval of an accuracy; it is above 0 even if all images are correct.

    Frames of a clip are correlated, which the standard error takes into account.
    """
    low, high = interval(accuracy)
    return max(accuracy.value - low, high - accuracy.value, 1.96 * accuracy.spread)
