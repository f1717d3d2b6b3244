"""`python -m search pick`: from the front to a bundle, and into MLflow's model registry."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.commands.front import NO_VERSION, print_front
from search.commands.libraries import set_up_libraries
from search.config.budget import Budget
from search.config.study import finetuning
from search.config.units import milliseconds, percent, points, size
from search.deploy.fresh_timing import content, lines, wider_budget
from search.loop.resume import check_same_network
from search.report.describe import accuracy_half_width
from search.report.display import Display
from search.report.output import TEXT_OUTPUT, Output, write_json, write_lines
from search.report.overview import Overview
from search.results.pareto import Version, choose, feasible
from search.results.store import StoredSearch, find_search
from search.results.violations import limited, violation_line
from search.tracking.store import Tracking, remembered
from spaces.candidate import Candidate
from spaces.errors import UserError

if TYPE_CHECKING:
    from search.deploy.bundle import Confirmed
    from search.tracking.model_registry import Registered


def run_pick(
    budget: Budget | None,
    prefer: str,
    out: Path,
    name: str | None,
    runs: Path,
    finetune: str | None = None,
    tracking_uri: str | None = None,
    output: Output = TEXT_OUTPUT,
    trial: str | None = None,
) -> int:
    """Picks, confirms, writes and registers a version; returns the exit code."""
    set_up_libraries()
    search = StoredSearch.read(find_search(runs, name))
    more = finetuning(finetune, search.study.recovery.final) if finetune else None
    overview, console = Overview.of(search, budget), output.console()
    limits = overview.budget
    if not overview.front:
        print_front(overview, console)
        return NO_VERSION
    from search.deploy.bundle import confirm, count_pick, finetune_version, time_again, write_bundle
    from search.pipeline.pipeline import build_pipeline

    with Display(output.progress_console(), output.quiet) as display:
        pipeline = build_pipeline(search.study, display.step, widths=search.widths)
        check_same_network(search.folder, search.folder.open().user_attrs.get("fingerprint"), pipeline.fingerprint)
        versions: Sequence[Version] = [*feasible(overview.simple, limits, overview.dense.measured), *overview.feasible]
        versions = versions if trial is None else [_named(trial, versions, overview)]
        if more is not None:
            best = choose(overview.front if trial is None else versions, prefer, search.objectives)
            pruned = next((version for version in best if version.number >= 0), best[0])
            versions = [finetune_version(pipeline, search, pruned, more)]
        display.say("Measuring the picked version afresh, in a new process...")
        dense = overview.dense.measured
        timings = time_again(pipeline, search, versions, limits, prefer, display.say)
        wider = wider_budget(
            timings,
            versions if more or trial else [*overview.simple, *overview.versions],
            prefer,
            limits,
            dense,
            search.objectives,
        )
        if timings.chosen is None:
            if output.as_json:
                failed = {"trial": None, "prefer": prefer, "budget": str(limits)}
                write_json(failed | content(timings, wider, limits, dense))
            for line in lines(timings, wider, prefer, limits, dense):
                display.warn(line)
            return NO_VERSION
        confirmed = confirm(pipeline, search, timings.chosen)
        used = count_pick(search, confirmed)
        write_bundle(out, pipeline, search, limits, confirmed)
        tracking = Tracking.of(runs, tracking_uri, remembered(search.folder.open()))
        registered = _registered(tracking, search, confirmed, out, display)
    if output.as_json:
        fresh = content(timings, wider, limits, dense)
        write_json(_content(confirmed, prefer, limits, out, registered) | fresh)
        return 0
    text = _confirmation(confirmed, overview.dense, prefer, limits, used)
    text += lines(timings, wider, prefer, limits, dense)
    text.append(f"Wrote {out}/. Check it anywhere: {_check(out)}")
    if registered:
        text += [f"Registered as version {registered.version} of model {registered.name}:", f"  {registered.serve}"]
    write_lines(console, text)
    return 0


def _named(trial: str, versions: Sequence[Version], overview: Overview) -> Version:
    """Returns the version of a trial.

    Raises:
        UserError: it was not measured, or breaks a limit.
    """
    found = next((version for version in versions if str(version.trial) == trial), None)
    if found is None:
        front = ", ".join(str(version.trial) for version in overview.front)
        raise UserError(f"--trial is a version within {overview.budget}, got {trial!r}; on the front are {front}")
    return found


def _registered(
    tracking: Tracking, search: StoredSearch, confirmed: "Confirmed", out: Path, display: Display
) -> "Registered | None":
    """Registers the bundle in MLflow; if that fails, warns and returns None, because the bundle is written already."""
    from search.tracking.mirror import reason
    from search.tracking.model_registry import register

    try:
        return register(tracking, search, confirmed, out)
    except Exception as error:  # MLflow has no common class of errors
        display.warn(
            f"Careful: MLflow at {tracking.shown} cannot be written ({reason(error)}), so the version is not"
            " registered; pick it again once MLflow answers."
        )
        return None


def _content(
    confirmed: "Confirmed", prefer: str, limits: Budget, out: Path, registered: "Registered | None"
) -> dict[str, Any]:
    """Returns the picked version, JSON-ready."""
    return {
        "trial": confirmed.version.trial,
        "prefer": prefer,
        "budget": str(limits),
        "bundle": str(out),
        "latency": confirmed.latency.to_dict(),
        "machine_speed": confirmed.speed,
        "test_accuracy": confirmed.test.to_dict(),
        "dense_test_accuracy": confirmed.dense_test.to_dict(),
        "same_artifact": confirmed.is_same_artifact,
        "search": confirmed.version.evaluation.to_dict(),
        "model": {"name": registered.name, "version": registered.version} if registered else None,
    }


def _check(out: Path) -> str:
    return f"python {shlex.quote(str(out / 'run.py'))}  (needs onnxruntime and numpy, and pillow for pictures)"


def _confirmation(confirmed: "Confirmed", dense: Version, prefer: str, limits: Budget, used: int) -> list[str]:
    """Returns lines that compare a picked version's new figures with those of the search."""
    searched = confirmed.version.measured
    latency = confirmed.latency
    test = confirmed.test
    change = latency.value / searched["latency"].value - 1
    lost, interval = points(test.value - confirmed.dense_test.value), accuracy_half_width(test) * 100
    lines = [
        f"Picked {confirmed.version.title} by {prefer}, within {limits}:",
        f"  latency   {milliseconds(latency.value)} measured again, {change:+.1%} against the search's"
        f" {milliseconds(searched['latency'].value)}; dense {milliseconds(dense.measured['latency'].value)}",
        f"  accuracy  {percent(test.value)} ± {interval:.1f} points on {test.n} test images (validation:"
        f" {percent(searched['accuracy'].value)}); dense {percent(confirmed.dense_test.value)}, so {lost} points",
        *_shape_lines(confirmed.version.evaluation.candidate),
        f"  recovery  {confirmed.version.evaluation.effort}",
        f"  size      {size(searched['size'].value)}; dense {size(dense.measured['size'].value)}",
    ]
    lines += _other_limits(confirmed, dense, limits)
    if abs(confirmed.speed - 1) > 0.1:
        lines.append(
            f"  This machine now takes {confirmed.speed:.2f} times as long as when the search began; by the clock a"
            f" batch takes {milliseconds(latency.notes['wall_median'])}."
        )
    lines += [f"  Careful: {remark}" for remark in latency.remarks]
    apart = abs(test.value - searched["accuracy"].value)
    if apart > accuracy_half_width(test) + accuracy_half_width(searched["accuracy"]):
        lines.append(
            "  Careful: accuracies on test and validation images differ by more than chance: the images differ, or the"
            " search chose what suits its own."
        )
    if not confirmed.is_same_artifact:
        lines.append("  The rebuilt files differ from those that the search measured: another version of a library?")
    if used > 1:
        lines.append(f"  {used} versions of this search have now seen the test images: the figure is less blind.")
    return lines


def _shape_lines(candidate: Candidate) -> list[str]:
    """Returns what a version lacks of the network, and the size of its input where it is another."""
    lines = []
    if candidate.removed_blocks:
        lines.append(f"  without   {', '.join(candidate.removed_blocks)}")
    if candidate.input_size is not None:
        size = candidate.input_size
        lines.append(f"  input     resized to {size}x{size} first, which is not timed; run.py does it")
    return lines


def _other_limits(confirmed: "Confirmed", dense: Version, limits: Budget) -> list[str]:
    """Returns lines on limits that the other lines do not show, and on limits that the test images break."""
    now = {**confirmed.version.measured, "latency": confirmed.latency}
    shown = [
        f"{limited(limit, now[limit.measured_as], dense.measured[limit.measured_as])} (asked: {limit})"
        for limit in limits.constraints
        if limit.measured_as != "accuracy" and not (limit.measured_as == "latency" and limit.limits_default_statistic)
    ]
    broken = [
        f"  Careful: on the test images {violation_line(limit, confirmed.test, confirmed.dense_test)}."
        for limit in limits.constraints
        if limit.measured_as == "accuracy" and limit.violation(confirmed.test, confirmed.dense_test) > 0
    ]
    return [*([f"  limits    {'; '.join(shown)}"] if shown else []), *broken]
