"""`python -m search profile`: the sensitivity profile of a network, as a picture and tables."""

from pathlib import Path

from search.commands.libraries import set_up_libraries
from search.config.overrides import Request
from search.report.display import Display
from search.report.output import TEXT_OUTPUT, Output, write_json, write_lines
from search.report.overview import write_profile
from search.results.sensitivity import Profile
from search.results.store import SearchFolder, StoredSearch
from spaces.errors import UserError


def run_profile(request: Request, name: str | None, runs: Path, download: bool, output: Output = TEXT_OUTPUT) -> int:
    """Shows the sensitivity profile of a network, and writes its picture; returns the exit code."""
    set_up_libraries()
    folder = SearchFolder(runs / name) if name else None
    search = StoredSearch.read(folder) if folder else None
    study = search.study if search else request.to_study()
    from search.loop.greedy_widths import greedy_versions
    from search.pipeline.channel_steps import measured_widths
    from search.pipeline.given_network import GivenNetwork
    from search.pipeline.pipeline import build_pipeline
    from search.pipeline.sensitivity_profiler import Profiler
    from search.report.heat_map import heat_maps

    console = output.console()
    with Display(output.progress_console(), output.quiet) as display:
        given = GivenNetwork(study, display.step, None, display.say, download)
        measured = measured_widths(given.study, given.runtime, given.target, display.step, display.say)
        pipeline = build_pipeline(study, display.step, given=given, widths=search.widths if search else measured)
        profiler = Profiler(pipeline)
        if not profiler.groups:
            raise UserError(f"a profile needs a group of channels that may shrink, got none in study {study.name!r}")
        profile = profiler.run(display.step)
    picture = folder.path / "profile.png" if folder else runs / f"profile-{study.name}.png"
    _write_picture(profile, f"{study.name}: one group at a time, after recovery {profile.effort!r}", picture)
    if folder:
        write_profile(folder.path, profile)
    greedy = greedy_versions(pipeline, profile)
    if output.as_json:
        proposals = [{"flops": share, "channels": kept} for share, kept in greedy]
        content = {"study": study.name, "picture": str(picture), **profile.to_dict(), "greedy": proposals}
        write_json(content)
        return 0
    for table in heat_maps(profile):
        console.print(table)
    lines = [
        f"In nats, against the dense network, on {profile.images} calibration images after recovery {profile.effort}."
        " Each number is the network with that one group cut to that share of its channels, all others whole."
        " Divergence: how far its answers move from the dense network's; 0 is not at all, 0.01 hardly, 1 to others."
        " Loss: how much less it believes in the right class; 0.1 is 10% less, below 0 more. Groups with small numbers"
        " can be cut first."
    ]
    if study.recovery.level == "finetune":
        lines.append("The study fine-tunes, which would take hours here, so batch statistics alone were measured anew.")
    for share, kept in greedy:
        narrow = [f"{name} {kept[name]}" for name, points in profile.groups.items() if kept[name] < points[0].channels]
        lines.append(f"{share:.0%} of the FLOPs at the least divergence: {', '.join(narrow)}")
    write_lines(console, [*lines, f"Wrote {picture}"])
    return 0


def _write_picture(profile: Profile, title: str, picture: Path) -> None:
    from search.report.matplotlib_figures import DPI, profile_picture

    try:
        picture.parent.mkdir(parents=True, exist_ok=True)
        profile_picture(profile.groups, title).savefig(picture, dpi=DPI)
    except OSError as error:
        raise UserError(f"a picture goes into a writable folder, got {picture}: {error.strerror}") from error
