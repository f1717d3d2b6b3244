"""The report of a search as data and Markdown: question, front, layers, caveats, protocol."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from search.config.command_lines import command_line
from search.config.objectives import together
from search.config.units import count, milliseconds, percent, points, size
from search.report.caveats import caveats
from search.report.describe import accuracy_half_width, exit_shares, slow_layers_line
from search.report.importance import IMPORTANCE
from search.report.layers import layers_of
from search.report.limits import what_limits
from search.report.overview import NOTABLE, Overview, beaten_lines
from search.report.tables import front_row, headings, legend
from search.report.unmet_budget import unmet_budget
from search.results.pareto import Version
from search.results.store import REMARKS


@dataclass(frozen=True)
class Table:
    """Headings and rows of text."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """One part of a report.

    Args:
        heading: its title.
        lines: paragraphs, or items of a list.
        is_list: whether they are items.
        tables: below the lines.
        pictures: headings of the pictures below the tables; Markdown leaves them out.
    """

    heading: str
    lines: Sequence[str] = ()
    is_list: bool = False
    tables: Sequence[Table] = ()
    pictures: Sequence[str] = ()


@dataclass(frozen=True)
class Report:
    """A report in parts."""

    title: str
    sections: Sequence[Section] = field(default_factory=tuple)

    def to_markdown(self) -> str:
        """Returns the report as Markdown, without the pictures."""
        parts = [f"# {self.title}"]
        for section in self.sections:
            if not section.lines and not section.tables:
                continue  # pictures only
            parts.append(f"## {section.heading}")
            parts += ["\n".join(f"- {line}" for line in section.lines)] if section.is_list else section.lines
            parts += [markdown(table) for table in section.tables]
        return "\n\n".join(part for part in parts if part) + "\n"


def markdown(table: Table) -> str:
    """Returns a table as Markdown."""
    lines = [table.headings, ["---"] * len(table.headings), *table.rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def report_of(overview: Overview) -> Report:
    """Returns the report of a search."""
    search = overview.search
    sections = [
        _question(overview),
        _front(overview),
        _worth(overview),
        Section("How the search went", _progress(overview), pictures=("Progress", "All measured versions")),
        Section("What would gain most", what_limits(overview), is_list=True),
        Section("Along the front", pictures=("Layers along the front", "Where inputs leave", "Which channels matter")),
        _importance(overview),
        _dense(overview),
        Section("Caveats", caveats(overview), is_list=True),
        Section("How it was measured", _protocol(overview), is_list=True, tables=[_environment(overview)]),
    ]
    return Report(f"{search.study.name} within {overview.budget}", sections)


def _question(overview: Overview) -> Section:
    study = overview.search.study
    lines = [
        f"{study.question}",
        f"Budget: {overview.budget}. Device: {overview.dense.measured['latency'].target}."
        f" Search: {overview.search.folder.name}, {overview.search.finished} trials.",
    ]
    return Section("Question", lines)


def front_of(overview: Overview, name: Callable[[Version], str] | None = None) -> Table:
    """Returns the front and the simple versions below it as a table; `name` replaces a version's number."""
    rows = []
    for version in [*overview.front, *overview.other_simple]:
        number, *rest = front_row(version, overview.dense)
        rows.append([name(version) if name else number, *rest])
    return Table(headings(overview.dense), rows)


def _front(overview: Overview) -> Section:
    if not overview.front:
        return Section("Front", unmet_budget(overview), pictures=["Front"])
    versions = "1 version" if len(overview.front) == 1 else f"{len(overview.front)} versions"
    line = f"{versions} within {overview.budget} that no other beats in {together(overview.objectives)} together."
    table = front_of(overview)
    meaning = legend(table.headings, overview.front, overview.dense, overview.other_simple)
    lines = [line, *beaten_lines(overview), f"{meaning[0].upper()}{meaning[1:]}."]
    return Section("Front", lines, tables=[table], pictures=["Front"])


def _worth(overview: Overview) -> Section:
    if not overview.front:
        return Section("Worth deploying", ["None."])
    chosen = overview.notable
    names = [f"{name}: {version.title}" for name, version in chosen]
    facts = Table(["", "dense", *names], _facts(overview, [overview.dense, *(version for _, version in chosen)]))
    folder, pick = overview.search.folder.path, ["pick", "--budget", str(overview.budget), "--prefer"]
    commands = [f"{name}: {command_line(*pick, NOTABLE[name.split(' and ')[0]], search=folder)}" for name, _ in chosen]
    return Section("Worth deploying", commands, is_list=True, tables=[facts, layer_table(overview, chosen, names)])


def _facts(overview: Overview, versions: Sequence[Version]) -> list[list[str]]:
    """Returns the rows of a table with a row for each metric and a column for each version."""
    dense = overview.dense.measured
    columns = []
    for version in versions:
        measured = version.measured
        accuracy, latency = measured["accuracy"], measured["latency"]
        columns.append({
            "accuracy": f"{percent(accuracy.value)} ± {accuracy_half_width(accuracy) * 100:.1f} points",
            "against dense": points(accuracy.value - dense["accuracy"].value),
            "latency": f"{milliseconds(latency.value)} ± {latency.half_width:.1%}",
            "speed": f"{dense['latency'].value / latency.value:.2f}x",
            "longest path": milliseconds(latency.others.get("worst", latency.value)),
            "FLOPs": f"{count(measured['flops'].value)} ({measured['flops'].value / dense['flops'].value:.1%})",
            "parameters": count(measured["params"].value),
            "size": size(measured["size"].value),
            "blocks left out": " ".join(version.evaluation.candidate.removed_blocks) or "-",
            "input size": str(version.evaluation.candidate.input_size or "-"),
            "leave at exits": exit_shares(accuracy),
            "recovery": version.evaluation.effort,
        })  # fmt: skip
    return [[name, *(column[name] for column in columns)] for name in columns[0]]


def layer_table(overview: Overview, chosen: Sequence[tuple[str, Version]], names: Sequence[str]) -> Table:
    """Returns a table of the layers of some versions: channels kept of the dense network's, precision, pattern."""
    whole, members = overview.dense.evaluation.candidate, overview.search.members
    columns = [layers_of(version.evaluation.candidate, whole, members) for _, version in chosen]
    dense = layers_of(whole, whole, members)
    rows = [
        [layer.name, _of_dense(layer.of, layer.precision), *(str(column[row]) for column in columns)]
        for row, layer in enumerate(dense)
    ]
    return Table(["layer", "dense", *names], rows)


def _of_dense(channels: int | None, precision: str) -> str:
    return " ".join(part for part in ("" if channels is None else str(channels), precision) if part) or "-"


def _progress(overview: Overview) -> list[str]:
    share = overview.hypervolume
    ended = len(overview.ended_early)
    early = f" {ended} of which were ended early," if ended else ""
    return [
        f"{len(overview.versions)} different versions were measured,{early} {len(overview.feasible)} keep the budget,"
        f" {len(overview.front)} are on the front, which dominates {share:.1%} of the budget's box (hypervolume).",
        *(f"{remark[0].upper()}{remark[1:]}." for remark in overview.search.report.get(REMARKS, ())),
    ]


def _importance(overview: Overview) -> Section:
    effects = overview.importance
    if effects is None:
        return Section(IMPORTANCE)
    lines = [
        "The effect of each change, on average over all measured versions. Latency is that of the longest path, in"
        " percent of the dense network's.",
        f"Effects are predicted by surrogates, with R² {effects.latency_r2:.2f} for latency and"
        f" {effects.accuracy_r2:.2f} for accuracy on held-out versions; near 0 or below, the effects are noise.",
    ]
    rows = [
        [effect.name, effect.change, f"{effect.latency * 100:+.1f}%", points(effect.accuracy)]
        for effect in effects.effects
    ]
    return Section(
        IMPORTANCE, lines, tables=[Table(["layer", "change", "latency", "accuracy"], rows)], pictures=(IMPORTANCE,)
    )


def _dense(overview: Overview) -> Section:
    baseline = overview.search.baseline
    lines = [slow_layers_line(baseline.slow_layers)] if baseline.slow_layers else []
    lines.append(
        f"A reference timed against itself took {baseline.reference_self_ratio:.3f} times as long;"
        " how far that is from 1 is the noise of the machine."
    )
    return Section("Dense baseline", lines, tables=[Table(["", "dense"], _facts(overview, [overview.dense]))])


def _protocol(overview: Overview) -> list[str]:
    measured = overview.dense.measured
    return [f"{name}: {measured[name].protocol}." for name in ("latency", "accuracy", "flops", "size")]


def _environment(overview: Overview) -> Table:
    rows = [[name, value] for name, value in overview.search.baseline.environment.items() if value]
    return Table(["environment", ""], rows)


def to_json(overview: Overview) -> dict[str, Any]:
    """Returns the report, JSON-ready."""
    search = overview.search
    return {
        "search": search.folder.name,
        "study": search.study.name,
        "question": search.study.question,
        "budget": str(overview.budget),
        "target": overview.dense.measured["latency"].target,
        "environment": search.baseline.environment,
        "trials": search.finished,
        "objectives": list(overview.objectives),
        "hypervolume": overview.hypervolume,
        "front": [version.trial for version in overview.front],
        "worth": [
            {"why": name, "trial": version.trial, **version.evaluation.to_dict()} for name, version in overview.notable
        ],
        "dense": search.baseline.to_dict(),
        "importance": overview.importance.to_dict() if overview.importance else None,
        "limits": what_limits(overview),
        "caveats": caveats(overview),
    }
