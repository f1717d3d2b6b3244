"""What a version is and what its figures are worth, in words."""

from evaluators.accuracy import wilson
from evaluators.latency.slow_layers import Slower, SlowLayers, Whole
from evaluators.measurement import Measurement
from evaluators.streams import KEY_FRAMES
from search.config.units import milliseconds, percent, size
from search.results.simple_versions import GivenMeasurements
from spaces.candidate import Candidate

ZEROS = (
    "Zeros inside layers make nothing faster on this target, whose kernels are dense, and FLOPs count them; the notes"
    " of flops and params in --json tell the share that hardware which skips zeros would need."
)
"""Is said below a front in which layers may have zeros anywhere."""


def examined_layers(examined: SlowLayers) -> str:
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


def _slower(each: Slower) -> str:
    them = "them" if len(each.layers) > 1 else "it"
    seen = "" if each.is_confirmed else ", seen once"
    return (
        f"{' + '.join(each.layers)} not in {each.precision} (with {them} in {each.instead} the network takes"
        f" {each.ratio:.3f} ± {each.ratio * each.half_width:.3f} of its time{seen})"
    )


def simple_lines(given: GivenMeasurements) -> list[str]:
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


def accuracy_doubt(accuracy: Measurement) -> float:
    """Returns how far the true accuracy may lie from the measured one, at 95%: also where every image was right.

    Frames of a clip are right or wrong together, which the standard error knows and the interval of a share does not.
    """
    low, high = wilson(accuracy.value, accuracy.n)
    return max(accuracy.value - low, high - accuracy.value, 1.96 * accuracy.spread)
