"""What each command does, once its arguments are read."""

import shlex
import signal
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import optuna
from rich.console import Console

from search.commands.front import NO_VERSION, front_json, print_front
from search.commands.libraries import set_up_libraries
from search.config.overrides import Ending, Request
from search.config.registries import SAMPLERS
from search.config.study import Study
from search.config.units import milliseconds, percent
from search.report.describe import examined_layers, simple_lines
from search.report.display import Display, SearchView
from search.report.output import SPOKEN, Output, write_json, write_lines
from search.report.overview import Overview, write_profile
from search.results.simple_versions import Given
from search.results.store import Baseline, SearchFolder, StoredSearch, StoreError, given_of, keep_given, keep_sampler
from search.tracking.store import Tracking, quiet, remember, remembered
from spaces.errors import UserError

if TYPE_CHECKING:
    from search.loop.coordinator import Outcome
    from search.pipeline.given_network import GivenNetwork
    from search.pipeline.workbench import Workbench
    from search.results.sensitivity import Profile

NEAR_CHANCE = 1.5
"""A network whose accuracy is below so many times that of a guess is probably not trained."""
_AS_SEARCHED = "# As it was searched: every key, and paths that hold from any folder.\n"


def run_search(
    request: Request,
    ending: Ending,
    sampler: str | None,
    seed: int,
    name: str | None,
    runs: Path,
    download: bool,
    tracking_uri: str | None = None,
    output: Output = SPOKEN,
) -> int:
    """Runs a search, or goes on with it, and shows its front; returns the exit code."""
    set_up_libraries()
    study = request.to_study()
    request.check_budget()
    sampler = SAMPLERS.known(sampler or study.search.sampler)
    folder = SearchFolder(runs / (name or f"{study.name}-{study.question_key}-{sampler}-{seed}"))
    _check_same_question(folder, study)
    _check_reachable(tracking_uri, runs)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console = output.console()
    with Display(output.beside(), output.quiet) as display:
        code = _search(folder, study, ending.of(study), sampler, seed, download, display, tracking_uri)
    overview = Overview.of(StoredSearch.read(folder))
    if output.as_json:
        write_json(front_json(overview))
        return code or (0 if overview.front else NO_VERSION)
    print_front(overview, console)
    if overview.front and not output.quiet:
        here = [] if runs == Path("runs") else ["--runs", str(runs)]
        asked = ["--budget", str(overview.budget)]
        lines = [["ui"], ["report"], ["pick", *asked, "--out", "deploy/"]]
        said = [shlex.join(["python", "-m", "search", *line, "--search", folder.name, *here]) for line in lines]
        write_lines(console, ["Go on with:", *(f"  {line}" for line in said)])
    return code or (0 if overview.front else NO_VERSION)


def _check_reachable(tracking_uri: str | None, runs: Path) -> None:
    """Checks that an MLflow server that was named answers, before anything is trained."""
    if tracking_uri is None:
        return
    from search.tracking.mirror import reason

    place = Tracking.of(runs, tracking_uri)
    try:
        with quiet():
            place.client().search_experiments(max_results=1)
    except Exception as error:  # MLflow has no common class for what may be wrong with an address
        raise UserError(
            f"--tracking-uri is where MLflow answers, got {place.shown} ({reason(error)}); start its server, or leave"
            " the option out and run sync later"
        ) from error


def _check_same_question(folder: SearchFolder, study: Study) -> None:
    if not folder.journal.is_file():
        return
    stored = folder.open().user_attrs.get("study")
    if stored is not None and Study.stored(stored).question_key != study.question_key:
        other = Study.stored(stored)
        raise StoreError(
            f"a search answers one question, got {folder.path}, which belongs to study {other.name!r} with"
            f" {other.budget} on {other.target.runtime}; give another --search or --runs"
        )


def check_same_network(folder: SearchFolder, then: str | None, now: str) -> None:
    """Checks that a search goes on with the network and the images that it began with.

    Raises:
        StoreError: others lie there now.
    """
    if then not in (None, now):
        raise StoreError(
            f"a search goes on with the network and the images that it began with, got others for {folder.path};"
            " give another --search, or bring the earlier ones back"
        )


def _search(
    folder: SearchFolder,
    study: Study,
    ending: Ending,
    sampler: str,
    seed: int,
    download: bool,
    display: Display,
    tracking_uri: str | None,
) -> int:
    trials = ending.trials or study.search.trials
    from evaluators.runtimes.registry import runtime

    library = runtime(study.target.runtime)  # one that is not here says so before anything is trained or written
    with folder.lock():
        from search.loop.coordinator import Coordinator, is_counted, measure_baseline, put_right_running
        from search.loop.greedy_widths import greedy_seeds
        from search.pipeline.given_network import GivenNetwork
        from search.pipeline.sensitivity_profiler import Profiler
        from search.pipeline.workbench import Workbench
        from search.tracking.mirror import Follower

        display.say(f"Searching study {study.name} within {study.budget} on {study.target.runtime}.")
        given = GivenNetwork(study, display.step, library, display.say, download)
        stored = folder.create()
        simple = None if "baseline" in stored.user_attrs else _measure_given(given, stored, display)
        bench = Workbench(study, display.step, library, display.say, download, given)
        display.say(f"{bench.exit_places} {bench.groups}")
        check_same_network(folder, stored.user_attrs.get("fingerprint"), bench.fingerprint)
        put_right_running(stored)
        needed = f"Recovery of pruned versions: {bench.recovery.effort}."
        display.say(needed if bench.recovers else "No version loses channels or weights, so none is recovered.")
        for remark in bench.remarks:
            display.say(f"Note: {remark}.")
        if "baseline" not in stored.user_attrs:
            display.say("Measuring the dense network...")
            (folder.path / "study.toml").write_text(_AS_SEARCHED + study.to_toml(), encoding="utf-8")
            bench.loaded.write(folder.path)
            stored.set_user_attr("study", study.model_dump(mode="json"))
            stored.set_user_attr("fingerprint", bench.fingerprint)
            stored.set_user_attr("structure", bench.structure())
            baseline = measure_baseline(bench, simple, trials, ending.timeout_s)
            stored.set_user_attr("baseline", baseline.to_dict())
        keep_sampler(stored, sampler)
        tracking = Tracking.of(folder.path.parent, tracking_uri, remembered(stored))
        remember(stored, tracking, folder.path.parent)
        search = StoredSearch.read(folder)
        _say_baseline(search.baseline, bench.data.classes, display)
        mirror = Follower(tracking, search, display.warn)
        mirror.begin()
        done = sum(is_counted(trial) for trial in search.trials)
        if done:
            display.say(f"Going on with search {folder.name}: {done} trials are there")
        lines = search.baseline.lines_to_beat
        view = SearchView(display, search.versions, search.budget, lines[0], done, trials, lines)
        seeds = greedy_seeds(bench, display.step, display.say) if study.search.profile else []
        coordinator = Coordinator(bench, stored, search.baseline, sampler, seed, [mirror, view], seeds)
        outcome = coordinator.run(trials, ending.timeout_s, ending.patience)
        if outcome.code == 0:
            outcome = _recover(bench, stored, search.baseline, outcome, display)
        if profiled := Profiler(bench).known:
            write_profile(folder.path, profiled)
        mirror.finish(StoredSearch.read(folder))
    display.say(f"Ended: {outcome.reason}.")
    for remark in outcome.remarks:
        display.say(f"Note: {remark}.")
    for remark in library.remarks():
        display.say(f"Note: {remark}.")
    return outcome.code


def _measure_given(given: "GivenNetwork", stored: optuna.Study, display: Display) -> Given:
    """Returns what the network as it is comes to in each precision, measured now or earlier, and says it.

    That is before exits, gates or weights for pruned versions are trained: the first answer comes first.
    """
    found = given_of(stored)
    if found is None or (found.question, found.network) != (given.study.question_key, given.fingerprint):
        found = given.measured(display.step)
        keep_given(stored, found)
    for line in simple_lines(found):
        display.say(line)
    return found


def _recover(
    bench: "Workbench", stored: optuna.Study, baseline: Baseline, outcome: "Outcome", display: Display
) -> "Outcome":
    """Recovers the front in full where the study asks for it; returns how the search ended then."""
    from search.loop.front_recovery import recover_front

    try:
        done = recover_front(bench, stored, baseline, display.say)
    except KeyboardInterrupt:
        return replace(outcome, reason="interrupted", code=130)
    if done:
        return replace(outcome, reason=f"{outcome.reason}, and {done} versions of the front were recovered in full")
    return outcome


def _say_baseline(baseline: Baseline, classes: int, display: Display) -> None:
    measured = baseline.evaluation.measurements
    display.say(
        f"Dense network: {milliseconds(measured['latency'].value)} per batch on {measured['latency'].target},"
        f" accuracy {percent(measured['accuracy'].value)}."
    )
    if not all(each.is_own for each in baseline.simple):
        display.say("That is with what was trained for it; what was given has to be beaten as well:")
        for line in baseline.lines_to_beat[1:]:
            told = milliseconds(line.measured["latency"].value), percent(line.measured["accuracy"].value)
            display.say(f"  {line.title}  {told[0]}  accuracy {told[1]}")
    if measured["accuracy"].value < NEAR_CHANCE / classes:
        display.warn(
            f"CAREFUL: that is hardly better than guessing among {classes} classes. Is the network trained? Give"
            " --weights, or train it with a section [training] in a study file. Is its input as it was trained with?"
        )
    if baseline.examined is not None:
        display.say(examined_layers(baseline.examined))
    half_width = measured["latency"].notes["half_width"]
    if half_width > 0.1:
        display.warn(f"Careful: its latency is known to within {half_width:.0%} only; fewer threads are timed better.")
    if abs(baseline.same_twice - 1) > 0.05:
        display.warn(
            f"Careful: this machine is noisy. The same network timed against itself differed by"
            f" {abs(baseline.same_twice - 1):.0%}; latencies are no better than that."
        )


def run_profile(request: Request, name: str | None, runs: Path, download: bool, output: Output = SPOKEN) -> int:
    """Shows the sensitivity profile of a study's network, or a search's, and writes its picture."""
    set_up_libraries()
    folder = SearchFolder(runs / name) if name else None
    study = StoredSearch.read(folder).study if folder else request.to_study()
    from search.loop.greedy_widths import greedy_versions
    from search.pipeline.sensitivity_profiler import Profiler
    from search.pipeline.workbench import Workbench
    from search.report.heat_map import heat_maps

    console = output.console()
    with Display(output.beside(), output.quiet) as display:
        bench = Workbench(study, display.step, say=display.say, download=download)
        profiler = Profiler(bench)
        if not profiler.groups:
            raise UserError(f"a profile needs a group of channels that may shrink, got none in study {study.name!r}")
        found = profiler.run(display.step)
    picture = folder.path / "profile.png" if folder else runs / f"profile-{study.name}.png"
    _write_picture(found, f"{study.name}: one group at a time, after recovery {found.effort!r}", picture)
    if folder:
        write_profile(folder.path, found)
    greedy = greedy_versions(bench, found)
    if output.as_json:
        proposals = [{"flops": share, "channels": kept} for share, kept in greedy]
        content = {"study": study.name, "picture": str(picture), **found.to_dict(), "greedy": proposals}
        write_json(content)
        return 0
    for table in heat_maps(found):
        console.print(table)
    lines = [f"In nats, against the dense network, on {found.images} calibration images after recovery {found.effort}."]
    if study.recovery.level == "finetune":
        lines.append("The study fine-tunes, which would take hours here, so batch statistics alone were measured anew.")
    for share, kept in greedy:
        narrow = [f"{name} {kept[name]}" for name, points in found.groups.items() if kept[name] < points[0].channels]
        lines.append(f"{share:.0%} of the FLOPs at the least divergence: {', '.join(narrow)}")
    write_lines(console, [*lines, f"Wrote {picture}"])
    return 0


def _write_picture(found: "Profile", title: str, picture: Path) -> None:
    from search.report.matplotlib_figures import DPI, profile_picture

    try:
        picture.parent.mkdir(parents=True, exist_ok=True)
        profile_picture(found.groups, title).savefig(picture, dpi=DPI)
    except OSError as error:
        raise UserError(f"a picture goes into a writable folder, got {picture}: {error.strerror}") from error


def run_measure(bundle: Path, target: str | None, as_json: bool) -> int:
    """Measures a bundle again; returns the exit code."""
    set_up_libraries()
    from search.deploy.measure_bundle import measure_bundle

    found = measure_bundle(bundle, target)
    same = found.correct == found.expected
    if as_json:
        write_json(asdict(found))
        return 0 if same else NO_VERSION
    tails = ", ".join(f"{name} {milliseconds(value)}" for name, value in found.percentiles.items())
    share = percent(found.correct / found.images)
    lines = [
        f"{bundle} on {found.target}:",
        f"  latency   {milliseconds(found.latency_s)} per batch ({tails}; {found.calls} batches), as `pick` tells it:",
        f"            {found.protocol}",
        f"  accuracy  {share} on {found.images} check images: {found.correct} right, {found.expected} when it was made",
        *(f"  launch    {milliseconds(seconds)} per batch {way}" for way, seconds in found.launches.items()),
        *(f"  {remark}" for remark in found.remarks),
    ]
    write_lines(Console(), lines)
    return 0 if same else NO_VERSION
