"""What each command does, once its arguments are read."""

import csv
import json
import shlex
import signal
import sys
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import optuna
from rich.console import Console

from search.budget import Budget
from search.display import Display, SearchView
from search.front import PREFERENCES, Version, choose, feasible, nearest_miss, pareto
from search.request import Ending, Request
from search.samplers import check_sampler
from search.store import Baseline, SearchFolder, StoredSearch, StoreError, find_search
from search.study import Study, finetuning
from search.text import (
    HEADINGS,
    ZEROS,
    broken_limits,
    examined_layers,
    front_row,
    front_table,
    milliseconds,
    percent,
    points,
    size,
)
from spaces.errors import UserError

if TYPE_CHECKING:
    from search.coordinator import Outcome
    from search.deploy import Confirmed
    from search.profile import Profile
    from search.workbench import Workbench

optuna.logging.set_verbosity(optuna.logging.ERROR)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
warnings.filterwarnings("ignore", "`torch.jit", category=FutureWarning)

NO_VERSION = 1
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
) -> int:
    """Runs a search, or goes on with it, and shows its front; returns the exit code."""
    study = request.to_study()
    sampler = sampler or study.search.sampler
    check_sampler(sampler)
    folder = SearchFolder(runs / (name or f"{study.name}-{study.question_key}-{sampler}-{seed}"))
    _check_same_question(folder, study)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console = Console()
    with Display(console) as display:
        code = _search(folder, study, ending.of(study), sampler, seed, download, display)
    search = StoredSearch.read(folder)
    found = _print_front(search, search.budget, console)
    if found:
        here = [] if runs == Path("runs") else ["--runs", str(runs)]
        console.print("Go on with:", highlight=False)
        for command in (["ui"], ["pick", "--budget", str(search.budget), "--out", "deploy/"]):
            line = shlex.join(["python", "-m", "search", *command, "--search", folder.name, *here])
            console.print(f"  {line}", highlight=False, soft_wrap=True)
    return code or (0 if found else NO_VERSION)


def _check_same_question(folder: SearchFolder, study: Study) -> None:
    if not folder.journal.is_file():
        return
    stored = folder.open().user_attrs.get("study")
    if stored is not None and Study.stored(stored).question_key != study.question_key:
        other = Study.stored(stored)
        raise StoreError(
            f"a search answers one question, got {folder.path}, which belongs to study {other.name!r} with"
            f" {other.limits} on {other.target.runtime}; give another --search or --runs"
        )


def _check_same_network(folder: SearchFolder, then: str | None, now: str) -> None:
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
) -> int:
    trials = ending.trials or study.search.trials
    from evaluators.target import runtime

    library = runtime(study.target.runtime)  # one that is not here says so before anything is trained or written
    with folder.lock():
        from search.coordinator import Coordinator, is_counted, measure_baseline, put_right_running
        from search.greedy import greedy_seeds
        from search.tracking import Mirror
        from search.workbench import Workbench

        display.say(f"Searching study {study.name} within {study.limits} on {study.target.runtime}.")
        bench = Workbench(study, display.step, library, display.say, download)
        display.say(f"{bench.exit_places} {bench.groups}")
        stored = folder.create()
        _check_same_network(folder, stored.user_attrs.get("fingerprint"), bench.fingerprint)
        put_right_running(stored)
        display.say(f"Recovery of pruned versions: {bench.recovery.effort}.")
        for remark in bench.remarks:
            display.say(f"Note: {remark}.")
        if "baseline" not in stored.user_attrs:
            display.say("Measuring the dense network...")
            if bench.examines:
                display.say(f"Looking for layers slower in a lower precision: at most {bench.examination_limit}.")
            (folder.path / "study.toml").write_text(_AS_SEARCHED + study.to_toml(), encoding="utf-8")
            bench.loaded.write(folder.path)
            stored.set_user_attr("study", study.model_dump(mode="json"))
            stored.set_user_attr("fingerprint", bench.fingerprint)
            stored.set_user_attr("structure", bench.structure())
            stored.set_user_attr("baseline", measure_baseline(bench).to_dict())
        search = StoredSearch.read(folder)
        _say_baseline(search.baseline, bench.data.classes, display)
        mirror = Mirror(folder.path.parent, search)
        mirror.catch_up(search.trials)
        done = sum(is_counted(trial) for trial in search.trials)
        if done:
            display.say(f"Going on with search {folder.name}: {done} trials are there")
        dense = Version(-1, search.baseline.evaluation)
        view = SearchView(display, search.versions, search.budget, dense, done, trials)
        seeds = greedy_seeds(bench, display.step, display.say) if study.search.profile else []
        coordinator = Coordinator(bench, stored, search.baseline, sampler, seed, [mirror, view], seeds)
        outcome = coordinator.run(trials, ending.timeout_s, ending.patience)
        if outcome.code == 0:
            outcome = _recover(bench, stored, search.baseline, outcome, display)
        mirror.finish(StoredSearch.read(folder))
    display.say(f"Ended: {outcome.reason}.")
    for remark in outcome.remarks:
        display.say(f"Note: {remark}.")
    for remark in library.remarks():
        display.say(f"Note: {remark}.")
    return outcome.code


def _recover(
    bench: "Workbench", stored: optuna.Study, baseline: Baseline, outcome: "Outcome", display: Display
) -> "Outcome":
    """Recovers the front in full where the study asks for it; returns how the search ended then."""
    from search.final import recover_front

    try:
        done = recover_front(bench, stored, baseline, display.say)
    except KeyboardInterrupt:
        return replace(outcome, reason="interrupted; the same command goes on from here", code=130)
    if done:
        return replace(outcome, reason=f"{outcome.reason}, and {done} versions of the front were recovered in full")
    return outcome


def _say_baseline(baseline: Baseline, classes: int, display: Display) -> None:
    measured = baseline.evaluation.measurements
    display.say(
        f"Dense network: {milliseconds(measured['latency'].value)} per batch on {measured['latency'].target},"
        f" accuracy {percent(measured['accuracy'].value)}."
    )
    if measured["accuracy"].value < NEAR_CHANCE / classes:
        display.say(
            f"CAREFUL: that is hardly better than guessing among {classes} classes. Is the network trained? Give"
            " --weights, or train it with a section [training] in a study file. Is its input as it was trained with?"
        )
    if baseline.examined is not None:
        display.say(examined_layers(baseline.examined))
    half_width = measured["latency"].notes["half_width"]
    if half_width > 0.1:
        display.say(f"Careful: its latency is known to within {half_width:.0%} only; fewer threads are timed better.")
    if abs(baseline.same_twice - 1) > 0.05:
        display.say(
            f"Careful: this machine is noisy. The same network timed against itself differed by"
            f" {abs(baseline.same_twice - 1):.0%}; latencies are no better than that."
        )


def show_front(budget: Budget | None, name: str | None, runs: Path, form: str) -> int:
    """Shows a search's front as a table, JSON or CSV; returns the exit code."""
    search = StoredSearch.read(find_search(runs, name))
    limits = budget or search.budget
    dense = Version(-1, search.baseline.evaluation)
    front = pareto(feasible(search.versions, limits, dense.measured))
    if form == "json":
        entries = [{"trial": version.number, **version.evaluation.to_dict()} for version in front]
        found = {"search": search.folder.name, "budget": str(limits), "front": entries}
        sys.stdout.write(json.dumps(found | {"dense": dense.evaluation.to_dict()}, indent=2) + "\n")
    elif form == "csv":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(HEADINGS)
        writer.writerows(front_row(version, dense) for version in [*front, dense])
    else:
        _print_front(search, limits, Console())
    return 0 if front else NO_VERSION


def _print_front(search: StoredSearch, budget: Budget, console: Console) -> bool:
    """Writes the front, or the nearest miss; returns whether there is a front."""
    dense = Version(-1, search.baseline.evaluation)
    front = pareto(feasible(search.versions, budget, dense.measured))
    if front:
        title = f"{search.folder.name}: {len(front)} versions within {budget}, none beaten by another"
        console.print(front_table(front, dense, title, console.width))
        if any(pattern.endswith("%") for pattern in search.study.space.patterns):
            console.print(ZEROS, highlight=False, soft_wrap=True)
        if str(budget) != str(search.budget):
            _say_unmeasured(search, console)
        return True
    console.print(f"No version keeps {budget}.", highlight=False, soft_wrap=True)
    miss = nearest_miss(search.versions, budget, dense.measured)
    if miss:
        text = f"The nearest, trial {miss[0].number}: {broken_limits(miss[0], budget, dense.measured)}."
        console.print(text, highlight=False, soft_wrap=True)
    _say_unmeasured(search, console)
    return False


def _say_unmeasured(search: StoredSearch, console: Console) -> None:
    unknown = [version for version in search.versions if not version.is_complete]
    if unknown:
        console.print(f"{len(unknown)} versions broke {search.budget} and were not measured further.", highlight=False)


def run_pick(
    budget: Budget | None, prefer: str, out: Path, name: str | None, runs: Path, finetune: str | None = None
) -> int:
    """Picks, confirms and writes a version; returns the exit code."""
    if prefer not in PREFERENCES:
        raise UserError(f"a preference is one of {', '.join(PREFERENCES)}, got {prefer!r}")
    search = StoredSearch.read(find_search(runs, name))
    more = finetuning(finetune, search.study.recovery.final) if finetune else None
    limits = budget or search.budget
    console = Console()
    dense = Version(-1, search.baseline.evaluation)
    front = pareto(feasible(search.versions, limits, dense.measured))
    if not front:
        _print_front(search, limits, console)
        return NO_VERSION
    from search.deploy import check_out, confirm, count_pick, recover_more, write_bundle
    from search.workbench import Workbench

    check_out(out)
    with Display(console) as display:
        bench = Workbench(search.study, display.step)
        _check_same_network(search.folder, search.folder.open().user_attrs.get("fingerprint"), bench.fingerprint)
        ranked = choose(front, prefer)
        if more is not None:
            ranked = [recover_more(bench, search, ranked[0], more)]
        display.say("Measuring the picked version afresh, in a new process...")
        confirmed = confirm(bench, search, ranked, limits, display.say)
        if confirmed is None:
            display.say("No version tried kept the budget when measured again; search longer, or allow more.")
            return NO_VERSION
        used = count_pick(search, confirmed)
        write_bundle(out, bench, search, limits, confirmed)
    for line in [
        *_confirmation(confirmed, dense, prefer, limits, used),
        f"Wrote {out}/. Check it anywhere: {_check(out)}",
    ]:
        console.print(line, highlight=False, soft_wrap=True)
    return 0


def run_profile(request: Request, name: str | None, runs: Path, as_json: bool, download: bool) -> int:
    """Shows the sensitivity profile of a study's network, or a search's, and writes its picture."""
    folder = SearchFolder(runs / name) if name else None
    study = StoredSearch.read(folder).study if folder else request.to_study()
    from search.greedy import greedy_versions
    from search.heatmap import heat_maps
    from search.profile import Profiler
    from search.workbench import Workbench

    console = Console(stderr=as_json)
    with Display(console) as display:
        bench = Workbench(study, display.step, say=display.say, download=download)
        profiler = Profiler(bench)
        if not profiler.groups:
            raise UserError(f"a profile needs a group of channels that may shrink, got none in study {study.name!r}")
        found = profiler.run(display.step)
    picture = folder.path / "profile.png" if folder else runs / f"profile-{study.name}.png"
    _write_picture(found, f"{study.name}: one group at a time, after recovery {found.effort!r}", picture)
    greedy = greedy_versions(bench, found)
    if as_json:
        proposals = [{"flops": share, "channels": kept} for share, kept in greedy]
        content = {"study": study.name, "picture": str(picture), **found.to_dict(), "greedy": proposals}
        sys.stdout.write(json.dumps(content, indent=2) + "\n")
        return 0
    for table in heat_maps(found):
        console.print(table)
    lines = [f"In nats, against the dense network, on {found.images} calibration images after recovery {found.effort}."]
    if study.recovery.level == "finetune":
        lines.append("The study fine-tunes, which would take hours here, so batch statistics alone were measured anew.")
    for share, kept in greedy:
        narrow = [f"{name} {kept[name]}" for name, points in found.groups.items() if kept[name] < points[0].channels]
        lines.append(f"{share:.0%} of the FLOPs at the least divergence: {', '.join(narrow)}")
    for line in [*lines, f"Wrote {picture}"]:
        console.print(line, highlight=False, soft_wrap=True)
    return 0


def _write_picture(found: "Profile", title: str, picture: Path) -> None:
    from search.plots import save_profile_png

    try:
        picture.parent.mkdir(parents=True, exist_ok=True)
        save_profile_png(found.groups, title, picture)
    except OSError as error:
        raise UserError(f"a picture goes into a writable folder, got {picture}: {error.strerror}") from error


def run_measure(bundle: Path, target: str | None, as_json: bool) -> int:
    """Measures a bundle again; returns the exit code."""
    from search.measure import measure_bundle

    found = measure_bundle(bundle, target)
    same = found.correct == found.expected
    if as_json:
        sys.stdout.write(json.dumps(asdict(found), indent=2) + "\n")
        return 0 if same else NO_VERSION
    tails = ", ".join(f"{name} {milliseconds(value)}" for name, value in found.percentiles.items())
    share = percent(found.correct / found.images)
    lines = [
        f"{bundle} on {found.target}:",
        f"  latency   {milliseconds(found.latency_s)} per batch ({tails}; {found.calls} batches)",
        f"  accuracy  {share} on {found.images} check images: {found.correct} right, {found.expected} when it was made",
        *(f"  launch    {milliseconds(seconds)} per batch {way}" for way, seconds in found.launches.items()),
        *(f"  {remark}" for remark in found.remarks),
    ]
    Console().print("\n".join(lines), highlight=False, soft_wrap=True)
    return 0 if same else NO_VERSION


def _check(out: Path) -> str:
    return f"python {shlex.quote(str(out / 'run.py'))}  (needs onnxruntime and numpy)"


def _confirmation(confirmed: "Confirmed", dense: Version, prefer: str, limits: Budget, used: int) -> list[str]:
    """Returns how a picked version's fresh figures compare with those of the search."""
    searched, latency, test = confirmed.version.measured, confirmed.latency, confirmed.test
    change = latency.value / searched["latency"].value - 1
    lost = points(test.value - confirmed.dense_test.value)
    lines = [
        f"Picked trial {confirmed.version.number} by {prefer}, within {limits}:",
        f"  latency   {milliseconds(latency.value)} measured again, {change:+.1%} against the search's"
        f" {milliseconds(searched['latency'].value)}; dense {milliseconds(dense.measured['latency'].value)}",
        f"  accuracy  {percent(test.value)} ± {test.spread * 100:.2f} points on {test.n} test images (validation:"
        f" {percent(searched['accuracy'].value)}); dense {percent(confirmed.dense_test.value)}, so {lost} points",
        f"  recovery  {confirmed.version.evaluation.effort}",
        f"  size      {size(searched['size'].value)}; dense {size(dense.measured['size'].value)}",
    ]
    if abs(confirmed.speed - 1) > 0.1:
        lines.append(
            f"  This machine now takes {confirmed.speed:.2f} times as long as when the search began; by the clock a"
            f" batch takes {milliseconds(latency.notes['wall_median'])}."
        )
    lines += [f"  Careful: {remark}" for remark in latency.remarks]
    if not confirmed.is_same_artifact:
        lines.append("  The rebuilt files differ from those that the search measured: another version of a library?")
    if used > 1:
        lines.append(f"  {used} versions of this search have now seen the test images: the figure is less blind.")
    return lines
