"""The widths of layers that a study's target is offered: measured there, or the steps that its runtime states."""

from collections.abc import Mapping
from dataclasses import dataclass

from evaluators.latency.cache import LatencyCache
from evaluators.latency.channel_width_timing import known_widths
from evaluators.latency.channel_widths import WidthTimes, offered_widths
from evaluators.runtimes.base import Capabilities, Runtime, Target
from evaluators.runtimes.remote.runtime import RemoteRuntime
from search.config.cache import cache_folder
from search.config.progress import Progress, Say
from search.config.study import Study
from spaces.dynamic.exit_network import is_of_gate
from spaces.errors import UserError
from spaces.precision import PrecisionSpace

Widths = Mapping[str, WidthTimes]
"""A table of widths for each precision of the target; empty where none was timed."""
NOT_MEASURED: Widths = {}


@dataclass(frozen=True)
class ChannelSteps:
    """The widths of a search space, in channels of layers; see `spaces.channels.SparsitySpace`.

    Args:
        finest: the smallest step.
        widest: the step that suits every precision.
        least: the fewest channels.
    """

    finest: int
    widest: int
    least: int = 1


def channel_steps(study: Study, capabilities: Capabilities, precision: PrecisionSpace, widths: Widths) -> ChannelSteps:
    """Returns the widths that no layer is slower in than in a wider one, in every precision that it may have.

    Args:
        study: it may give the step itself.
        capabilities: of the target.
        precision: of each layer; gates, which keep the reference precision, do not count.
        widths: of the target, as measured; if empty, the runtime's own steps hold.
    """
    if study.space.channel_step is not None:
        return ChannelSteps(study.space.channel_step, study.space.channel_step)
    if not widths:
        steps = [capabilities.channel_steps[name] for name in capabilities.precisions]
        return ChannelSteps(min(steps), max(steps))
    layers = [layer for layer in precision.layers if not is_of_gate(layer)] or precision.layers
    offered = {name for layer in layers for name in precision.allowed[layer] if name in widths}
    tables = [widths[name] for name in offered or precision.computed[:1]]
    together = offered_widths(tables)
    return ChannelSteps(together.step, max(offered_widths([table]).step for table in tables), together.least)


def measured_widths(study: Study, runtime: Runtime, target: Target, progress: Progress, say: Say) -> Widths:
    """Returns the target's table in each precision, timed now or before; empty where the runtime's own steps hold.

    Args:
        study: what to search.
        runtime: of the study's target.
        target: batch size and threads.
        progress: called at every timing.
        say: told why nothing could be timed.
    """
    if not _needs_widths(study) or stated_reason(runtime) is not None:
        return NOT_MEASURED
    try:
        return known_widths(runtime, target, LatencyCache(cache_folder() / "widths"), progress)
    except (UserError, RuntimeError) as error:
        say(f"Note: widths of layers could not be timed, so the runtime's steps hold: {error}.")
        return NOT_MEASURED


def stated_reason(runtime: Runtime) -> str | None:
    """Returns why widths are not timed on a runtime; None where they are."""
    if isinstance(runtime, RemoteRuntime):
        return "every timing is a round trip to the board"
    return "it compiles every network that is timed" if runtime.capabilities().compiles else None


def width_remarks(study: Study, runtime: Runtime, widths: Widths) -> list[str]:
    """Returns one remark on the steps of widths and where they are from; none where channels stay or the step is given.

    Args:
        study: what to search.
        runtime: of the study's target.
        widths: its tables.
    """
    if not _needs_widths(study):
        return []
    if widths:
        steps = {name: str(offered_widths([table])) for name, table in widths.items()}
        slower = any(table.slower for table in widths.values())
        found = "layers of other widths are no faster" if slower else "no wider layer is faster"
        return [f"widths in {_by_precision(steps)}: measured on this target, {found}"]
    reason = stated_reason(runtime)
    if reason is None:
        return []
    stated = runtime.capabilities()
    steps = {name: f"steps of {stated.channel_steps[name]}" for name in stated.precisions}
    return [f"widths in {_by_precision(steps)}: as {runtime.version()} states, not measured: {reason}"]


def _by_precision(steps: Mapping[str, str]) -> str:
    """Returns the steps, each followed by its precisions where they differ."""
    names: dict[str, list[str]] = {}
    for precision, text in steps.items():
        names.setdefault(text, []).append(precision)
    if len(names) == 1:
        return next(iter(names))
    return ", ".join(f"{text} ({', '.join(precisions)})" for text, precisions in names.items())


def _needs_widths(study: Study) -> bool:
    """Returns whether the study searches channels and leaves their step to the target."""
    space = study.space
    return "channels" in space.only and space.keep_at_least < 1 and space.channel_step is None
