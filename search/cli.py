"""The command line. It imports no heavy libraries, so that `--help` and error messages appear at once."""

import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Annotated, Literal

import typer

from evaluators.runtimes.registry import check_target
from search.commands.options import (
    AsJson,
    Budgets,
    Data,
    Download,
    Model,
    OtherTarget,
    Quiet,
    Runs,
    Search,
    SearchOfStudy,
    SearchToRun,
    StudyName,
    Target,
    TrackingUri,
    Weights,
)
from search.config.budget import Budget
from search.config.command_lines import RUNS, command_line
from search.config.objectives import check_preference
from search.config.overrides import Ending, Request, read_dimensions, read_objectives
from search.config.registries import SAMPLERS
from search.config.study import finetuning
from search.deploy.folders import check_bundle, check_out
from search.report.output import REPORT_FORMS, Output
from search.results.folders import known_search, side_of
from spaces.errors import UserError

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_COLOURS = re.compile("\x1b\\[[0-9;]*m")
_INTERRUPTED = 130
EXIT_THRESHOLDS: Mapping[str, Literal["solved", "searched"]] = {
    "solved": "solved",
    "searched": "searched",
    "inner": "solved",
    "outer": "searched",
}
"""The value of a study for each choice of `--exit-thresholds`; `inner` and `outer` are former names."""


def run(arguments: list[str]) -> int:
    """Returns the exit code of a command line: 0, 1 if no version keeps the budget, 2 for an error of the user."""
    try:
        result = app(arguments, prog_name="python -m search", standalone_mode=False)
    except UserError as error:
        return _error_code(str(error))
    except typer.Exit as exit_:
        return exit_.exit_code
    except (typer.Abort, KeyboardInterrupt):
        result = _INTERRUPTED
    except BrokenPipeError:
        return 0
    except Exception as error:
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        return _error_code(message().rstrip(".") + _quoting_hint(message(), arguments))
    if result == _INTERRUPTED:  # typer returns this code for Ctrl-C without a message
        sys.stderr.write("Interrupted; finished work is kept, and the same command goes on where it was.\n")
    return result if isinstance(result, int) else 0


def _limits(texts: list[str] | None) -> Budget | None:
    """Returns the budget of `--budget`; None for that of the study or the search."""
    return Budget.parse(texts) if texts else None


def _check_no_options(context: typer.Context) -> None:
    """Checks that no option is before a command's name, where the command would ignore it.

    Raises:
        UserError: there is one.
    """
    for name in context.params:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            command = context.invoked_subcommand
            raise UserError(
                f"options of {command!r} come after its name, got --{name} before it; move it behind {command}"
            )


def _quoting_hint(message: str, arguments: list[str]) -> str:
    """Returns a hint if words are left over because a value with spaces was not quoted; else an empty text."""
    if "No such command" not in message and "unexpected extra argument" not in message:
        return ""
    commands = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}
    words = arguments[1:] if arguments[0] in commands else arguments
    groups = [list(group) for is_option, group in groupby(words, lambda word: word.startswith("-")) if not is_option]
    value = next((" ".join(group) for group in groups if len(group) > 1), "")
    return f"; a value with spaces is quoted: {shlex.quote(value)}" if value else ""


def _error_code(message: str) -> int:
    """Writes an error message in one line, without colours that a library put there, and returns the exit code 2."""
    sys.stderr.write(f"error: {' '.join(_COLOURS.sub('', message).split())}\n")
    return 2


def _show_version(is_asked: bool) -> None:
    """Prints the program's version and ends, if that is asked for."""
    if is_asked:
        from search.config.environment import package_version

        typer.echo(f"deployfront {package_version('deployfront') or 'from source'}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def search(
    context: typer.Context,
    budget: Budgets = None,
    study: StudyName = None,
    model: Model = None,
    weights: Weights = None,
    data: Data = None,
    download: Download = False,
    size: Annotated[
        int | None, typer.Option(min=1, help="Height and width of the input that the network was trained with.")
    ] = None,
    mean: Annotated[
        str | None, typer.Option(metavar="VALUES", help="Mean of each channel, such as 0.5,0.5,0.5; one for grey.")
    ] = None,
    std: Annotated[str | None, typer.Option(metavar="VALUES", help="Standard deviation of each channel.")] = None,
    labels: Annotated[
        str | None, typer.Option(metavar="FILE", help="Names of the classes in the network's order, one a line.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Batch size of the deployed network.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of the deployed network.")] = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Stop after this many trials in total; default: as in the study.")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(min=0, metavar="SECONDS", help="Stop after this many seconds.")
    ] = None,
    patience: Annotated[
        int | None, typer.Option(min=1, metavar="TRIALS", help="Stop after this many trials in a row without progress.")
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(help="ehvi, tpe, nsga2, gp or random; default: as in the study, which is ehvi unless set."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the sampler.")] = 0,
    target: Target = None,
    exit_thresholds: Annotated[
        str | None,
        typer.Option(
            metavar="HOW", help="Thresholds of exits: solved for each version, or searched like other dimensions."
        ),
    ] = None,
    gates: Annotated[str | None, typer.Option(hidden=True)] = None,
    search_only: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Dimensions to search, comma-separated: channels, depth, precision, exits, skips, masks, patterns,"
            " frames, size.",
        ),
    ] = None,
    objectives: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="What to improve: accuracy and some of latency, flops, params, size; default: accuracy,latency.",
        ),
    ] = None,
    tracking_uri: TrackingUri = None,
    name: SearchToRun = None,
    runs: Runs = RUNS,
    quiet: Quiet = False,
    as_json: AsJson = False,
    show_version: Annotated[  # noqa: ARG001  its callback ends the program
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> int:
    """Searches for the versions of a trained network that are worth deploying within a budget.

    The same command resumes a search that was stopped.
    """
    if context.invoked_subcommand is not None:
        _check_no_options(context)
        return 0
    thresholds = _exit_thresholds(exit_thresholds, gates)
    only = read_dimensions(search_only) if search_only is not None else None
    aims = read_objectives(objectives) if objectives is not None else None
    request = Request(
        study,
        _limits(budget),
        model,
        weights,
        data,
        target,
        batch,
        threads,
        thresholds,
        only,
        aims,
        size=size,
        mean=mean,
        std=std,
        labels=labels,
    )
    chosen = request.to_study()  # errors are told before heavy libraries are imported
    request.check_budget()
    output, ending = Output(quiet, as_json), Ending(trials, timeout, patience)
    if request.is_demo and not quiet:
        typer.echo(request.demo_line(ending), err=as_json)
    SAMPLERS.known(sampler or chosen.search.sampler)
    check_target(chosen.target.runtime)
    from search.commands.run import run_search

    return run_search(request, ending, sampler, seed, name, runs, download, tracking_uri, output)


def _exit_thresholds(given: str | None, gates: str | None) -> Literal["solved", "searched"] | None:
    """Returns how thresholds of exits are found; None for the value of the study. `gates` is the former option."""
    name = given or gates
    if name is not None and name not in EXIT_THRESHOLDS:
        raise UserError(
            f"thresholds of exits are solved or searched, got {name!r}; leave --exit-thresholds out for what the"
            " study says"
        )
    if name in ("inner", "outer"):
        sys.stderr.write("--gates inner and outer are now called --exit-thresholds solved and searched\n")
    return EXIT_THRESHOLDS[name] if name else None


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder for the study.")],
) -> int:
    """Writes a study to start from, with the files study.toml, model.py and data.py, which runs as it is."""
    from search.config.template import write_template

    write_template(folder)
    command = command_line("--study", str(folder / "study.toml"))
    typer.echo(f"Wrote {folder}/. It runs as it is; then edit its files:\n  {command}")
    return 0


@app.command("list")
def list_searches(runs: Runs = RUNS, as_json: AsJson = False) -> int:
    """Lists the searches of a folder, with their budgets, their states and their best versions."""
    from search.commands.list import list_searches as show

    return show(runs, Output(as_json=as_json))


@app.command()
def front(
    budget: Budgets = None,
    name: Search = None,
    runs: Runs = RUNS,
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print the front as CSV.")] = False,
    every_trial: Annotated[
        bool, typer.Option("--all", help="Every trial, whatever became of it, with its figures and its choices.")
    ] = False,
) -> int:
    """Shows the front of a search, within its own budget or another one."""
    limits = _limits(budget)
    if as_json and as_csv:
        raise UserError("the front is written in one form, got --json and --csv; leave one out")
    found = known_search(runs, name)
    from search.commands.front import show_front, show_trials

    show = show_trials if every_trial else show_front
    return show(limits, found, runs, "json" if as_json else "csv" if as_csv else "table")


@app.command()
def pick(
    budget: Budgets = None,
    prefer: Annotated[
        str, typer.Option(help="Which version within the budget: accuracy, latency, flops, params, size or knee.")
    ] = "accuracy",
    trial: Annotated[str | None, typer.Option(metavar="TRIAL", help="This version, in place of the best one.")] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the bundle.")] = Path("deploy"),
    finetune: Annotated[
        str | None,
        typer.Option(
            metavar="LENGTH", help="Fine-tune the pick further: 10epochs, 500steps or 20min of processor time."
        ),
    ] = None,
    tracking_uri: TrackingUri = None,
    name: Search = None,
    runs: Runs = RUNS,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> int:
    """Picks the best version within a budget, measures it again, writes it as a bundle and registers it in MLflow."""
    limits = _limits(budget)
    check_preference(prefer)
    if finetune:
        finetuning(finetune, None)
    check_out(out)
    found = known_search(runs, name)
    from search.commands.pick import run_pick

    return run_pick(limits, prefer, out, found, runs, finetune, tracking_uri, Output(quiet, as_json), trial)


@app.command()
def report(
    budget: Budgets = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A .html or .md file; default: both, in the search's folder.")
    ] = None,
    name: Search = None,
    runs: Runs = RUNS,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> int:
    """Writes a report on a search as one page: question, front, the versions most worth deploying, caveats."""
    limits = _limits(budget)
    if out is not None and out.suffix not in REPORT_FORMS:
        raise UserError(f"a report is a page or Markdown, got {out}; end its name in {' or '.join(REPORT_FORMS)}")
    found = known_search(runs, name)
    from search.commands.report import run_report

    return run_report(limits, found, runs, out, Output(quiet, as_json))


@app.command()
def compare(
    first: Annotated[
        str, typer.Argument(metavar="A", help="SEARCH, SEARCH:TRIAL, SEARCH:dense, or a TRIAL of the latest search.")
    ],
    second: Annotated[str, typer.Argument(metavar="B", help="The other one, in the same form.")],
    runs: Runs = RUNS,
    as_json: AsJson = False,
) -> int:
    """Compares two versions or two searches, layer by layer, and says which differences may be noise."""
    for side in (first, second):
        side_of(side, runs)
    from search.commands.compare import run_compare

    return run_compare(first, second, runs, Output(as_json=as_json))


@app.command()
def sync(
    tracking_uri: TrackingUri = None,
    name: Search = None,
    runs: Runs = RUNS,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> int:
    """Writes the results of a search to MLflow that are not there yet."""
    found = known_search(runs, name)
    from search.commands.sync import run_sync

    return run_sync(found, runs, tracking_uri, Output(quiet, as_json))


@app.command()
def profile(
    study: StudyName = None,
    model: Model = None,
    weights: Weights = None,
    data: Data = None,
    download: Download = False,
    name: SearchOfStudy = None,
    runs: Runs = RUNS,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> int:
    """Measures the sensitivity to pruning of each group of channels; shows a heat map and writes it as a PNG."""
    request = Request(study, None, model, weights, data)
    if name is not None and request != Request():
        raise UserError(f"a profile is of one study, got --search {name} and another; leave one out")
    found = known_search(runs, name) if name is not None else None
    if found is None:
        request.to_study()
    from search.commands.profile import run_profile

    return run_profile(request, found, runs, download, Output(quiet, as_json))


@app.command()
def diagnose(
    study: StudyName = None,
    model: Model = None,
    weights: Weights = None,
    data: Data = None,
    download: Download = False,
    target: Target = None,
    precision: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Precision of every layer: int8, fp16, fp8 or fp32; default: int8."),
    ] = None,
    trial: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="A trial of --search; default: of the latest search.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="An ONNX file of this network, from any exporter, or the folder of a bundle."
        ),
    ] = None,
    against_target: OtherTarget = None,
    images: Annotated[int, typer.Option(min=2, help="Number of validation images, at most.")] = 64,
    name: SearchOfStudy = None,
    runs: Runs = RUNS,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> int:
    """Finds the layer where a lower precision breaks a network, and the reason.

    Compares every layer's output with that of the same network in fp32, both on the target's runtime. The network is
    the whole one in one --precision, a --trial of a search, or a --file, whose tensors are matched by name; if none
    match, only its logits are compared.
    """
    from search.config.diagnosis_request import DiagnosisRequest

    comparison = DiagnosisRequest(precision, trial, file, against_target, images)
    comparison.check()
    request = Request(study, None, model, weights, data, target)
    named = request != Request(target=target)
    if named and (name is not None or trial is not None):
        raise UserError(f"a search has a study, got {'--search' if name else '--trial'} and another; leave one out")
    if not named and comparison.own_study is not None:
        request = replace(request, study=comparison.own_study)
    is_of_search = name is not None or trial is not None
    found = known_search(runs, name) if is_of_search else None
    if found is None and comparison.bundle is None:
        request.to_study()
    from search.commands.diagnose import run_diagnose

    return run_diagnose(request, comparison, found, runs, download, Output(quiet, as_json))


@app.command()
def ui(
    tracking_uri: TrackingUri = None,
    name: Search = None,
    runs: Runs = RUNS,
    port: Annotated[
        int, typer.Option(min=1, max=65535, help="Port of the server, which is reachable from this machine only.")
    ] = 5000,
) -> int:
    """Opens MLflow's user interface with the logged searches."""
    found = known_search(runs, name)
    from search.commands.ui import serve

    return serve(found, runs, port, tracking_uri)


@app.command()
def measure(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder that pick has written.")],
    target: Target = None,
    as_json: AsJson = False,
) -> int:
    """Measures a bundle again, here or on a board; exits with 1 if its answers differ from those recorded."""
    check_bundle(bundle)
    from search.commands.measure import run_measure

    return run_measure(bundle, target, as_json)


@app.command()
def doctor(target: Target = None, as_json: AsJson = False) -> int:
    """Lists the targets of this machine with their capabilities, and why others are not available."""
    from search.commands.doctor import examine

    examine(target, Output(as_json=as_json))
    return 0
