"""`python -m search`: runs a search and shows its front."""

import signal
from pathlib import Path

from evaluators.runtimes.registry import runtime as open_runtime
from search.commands.front import NO_VERSION, front_json, print_front
from search.commands.libraries import set_up_libraries
from search.config.command_lines import command_line
from search.config.overrides import Ending, Request, named_before
from search.config.registries import SAMPLERS
from search.config.study import Study
from search.report.display import Display
from search.report.output import TEXT_OUTPUT, Output, write_json, write_lines
from search.report.overview import Overview
from search.results.folders import StoreError
from search.results.store import SearchFolder, StoredSearch
from search.tracking.store import Tracking, quiet
from spaces.errors import UserError


def run_search(
    request: Request,
    ending: Ending,
    sampler: str | None,
    seed: int,
    name: str | None,
    runs: Path,
    download: bool,
    tracking_uri: str | None = None,
    output: Output = TEXT_OUTPUT,
) -> int:
    """Runs a search, new or resumed, and shows its front; returns the exit code."""
    set_up_libraries()
    study = request.to_study()
    request.check_budget()
    requested_sampler = sampler or study.search.sampler
    sampler = SAMPLERS.known(requested_sampler)
    study.check_extensions()
    study, folder = _as_begun(study, sampler, seed, runs, name)
    study = study.with_objectives(folder.objectives(study.search.objectives))
    _check_reachable(tracking_uri, runs)
    runtime = open_runtime(study.target.runtime)  # fails before anything is trained or written if it is missing
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console = output.console()
    with Display(output.progress_console(), output.quiet) as display:
        from search.commands.search_run import SearchRun  # imports torch

        if requested_sampler != sampler:
            display.say(f"Note: the sampler {requested_sampler!r} is called {sampler!r} now.")
        run = SearchRun(folder, study, ending.of(study), sampler, seed, display, runtime, download, tracking_uri)
        code = run.run()
    overview = Overview.of(StoredSearch.read(folder))
    if output.as_json:
        write_json(front_json(overview))
        return code or (0 if overview.front else NO_VERSION)
    print_front(overview, console)
    if overview.front and not output.quiet:
        lines = [["ui"], ["report"], ["pick", "--budget", str(overview.budget), "--out", "deploy/"]]
        commands = [command_line(*line, search=folder.path) for line in lines]
        write_lines(console, ["Go on with:", *(f"  {command}" for command in commands)])
    return code or (0 if overview.front else NO_VERSION)


def _folder_of(study: Study, sampler: str, seed: int, runs: Path) -> SearchFolder:
    """Returns the folder of a search without a name.

    An existing one under an earlier name is kept: of the sampler, or of before there was a choice of objectives.
    """
    names = [name.replace(":", ".") for name in SAMPLERS.names_of(sampler)]
    asked = study.search.objectives
    keys = dict.fromkeys([study.question_key, study.with_objectives(None).question_key])
    folders = [SearchFolder(runs / f"{study.name}-{key}-{name}-{seed}") for key in keys for name in names]
    known = (folder for folder in folders if folder.journal.is_file())
    return next((folder for folder in known if asked in (None, folder.objectives(None))), folders[0])


def _check_reachable(tracking_uri: str | None, runs: Path) -> None:
    """Checks that the named MLflow server answers, before anything is trained."""
    if tracking_uri is None:
        return
    from search.tracking.mirror import reason

    tracking = Tracking.of(runs, tracking_uri)
    try:
        with quiet():
            tracking.client().search_experiments(max_results=1)
    except Exception as error:  # MLflow has no common class for what may be wrong with an address
        raise UserError(
            f"--tracking-uri is where MLflow answers, got {tracking.shown} ({reason(error)}); start its server, or"
            " leave the option out and run sync later"
        ) from error


def _as_begun(study: Study, sampler: str, seed: int, runs: Path, name: str | None) -> tuple[Study, SearchFolder]:
    """Returns the study under the name that its search began with, perhaps an earlier version's, and its folder.

    Raises:
        StoreError: the folder belongs to another study.
    """
    other = None
    for each in (study, named_before(study)):
        folder = SearchFolder(runs / name) if name else _folder_of(each, sampler, seed, runs)
        if folder.journal.is_file():
            stored = folder.open().user_attrs.get("study")
            other = Study.stored(stored) if stored else each
            if other.with_objectives(None).question_key == each.with_objectives(None).question_key:
                return each, folder
    if other is not None:
        raise StoreError(
            f"a search answers one question, got {folder.path}, which belongs to study {other.name!r} with"
            f" {other.budget} on {other.target.runtime}; give another --search or --runs"
        )
    return study, SearchFolder(runs / name) if name else _folder_of(study, sampler, seed, runs)
