"""Compares two versions or two searches, and tells differences from noise."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from evaluators.measurement import METRICS
from search.config.objectives import together
from search.config.units import count, milliseconds, percent, points, size, threshold
from search.report.describe import exit_shares
from search.report.layers import Layer, layers_of
from search.report.overview import Overview
from search.report.significance import Difference, difference
from search.results.folders import WHOLE_SEARCH, side_of
from search.results.pareto import Version
from search.results.store import SearchFolder, StoredSearch
from spaces.errors import UserError

_METRICS = ("accuracy", "latency", "flops", "params", "size")


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Args:
        overview: of its search.
        version: one of the search; None for the search as a whole.
    """

    overview: Overview
    version: Version | None

    @property
    def name(self) -> str:
        """The name of the search, and the version if there is one."""
        if self.version is None:
            return self.overview.search.folder.name
        return f"{self.overview.search.folder.name}: {self.version.title}"


def parse_side(text: str, runs: Path) -> Side:
    """Returns the side that a user names: `SEARCH`, `SEARCH:TRIAL`, `SEARCH:dense`, `SEARCH:int8`, or without a search.

    Raises:
        UserError: there is no such search or trial, or it was not measured.
    """
    search, trial = side_of(text, runs)
    overview = Overview.of(StoredSearch.read(SearchFolder(runs / search)))
    if trial == WHOLE_SEARCH:
        return Side(overview, None)
    matches = [version for version in [*overview.simple, *overview.versions] if str(version.trial) == trial]
    if not matches:
        known = ", ".join(str(version.trial) for version in overview.front) or "none on the front"
        raise UserError(f"a side is SEARCH or SEARCH:TRIAL with a measured trial, got {text!r}; the front has {known}")
    return Side(overview, matches[0])


@dataclass(frozen=True)
class MetricRow:
    """One metric of both versions, as a row of a table.

    Args:
        metric: a name in `METRICS`.
        first: as text.
        second: as text.
        difference: of the second from the first; None if one of them was not measured.
        verdict: the difference, and whether it is noise, as text.
    """

    metric: str
    first: str
    second: str
    difference: Difference | None
    verdict: str


@dataclass(frozen=True)
class LayerPair:
    """One layer in both versions."""

    name: str
    first: str
    second: str

    @property
    def differs(self) -> bool:
        """Whether it differs."""
        return self.first != self.second


@dataclass(frozen=True)
class Comparison:
    """Two sides and how they differ.

    Args:
        first: name of the side to compare with.
        second: name of the other side.
        facts: rows of text on both: budgets, targets, counts, efforts.
        figures: the metrics of the versions.
        layers: of the versions, in the network's order.
        remarks: on how comparable the values are.
    """

    first: str
    second: str
    facts: tuple[tuple[str, str, str], ...]
    figures: tuple[MetricRow, ...]
    layers: tuple[LayerPair, ...]
    remarks: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready copy."""
        return asdict(self)

    def parts(self) -> Iterator[Table | str]:
        """Yields the output for a terminal: the tables, then the remarks."""
        yield f"A  {self.first}\nB  {self.second}"
        yield _table("", ["", "A", "B"], [list(row) for row in self.facts])
        yield _table(
            "", ["", "A", "B", "B against A"], [[f.metric, f.first, f.second, f.verdict] for f in self.figures]
        )
        different = [layer for layer in self.layers if layer.differs]
        same = len(self.layers) - len(different)
        if different:
            rows = [[layer.name, layer.first, layer.second] for layer in different]
            yield _table(f"layers that differ; {same} have the same width and precision", ["layer", "A", "B"], rows)
        elif same:
            yield f"All {same} layers have the same width and precision."
        yield from self.remarks


def _table(title: str, headings: list[str], rows: list[list[str]]) -> Table:
    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if 0 < index < 3 else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def compare(first: Side, second: Side) -> Comparison:
    """Returns how `second` differs from `first`: two versions, or two searches by their most accurate versions.

    Raises:
        UserError: one is a version and the other a search, or a search has no front to compare.
    """
    if (first.version is None) != (second.version is None):
        raise UserError(
            f"two versions or two searches are compared, got {first.name!r} and {second.name!r};"
            " write both as SEARCH:TRIAL or both as SEARCH"
        )
    if first.version is None:
        return _searches(first, second)
    return _versions(first, second, ())


def _searches(first: Side, second: Side) -> Comparison:
    """Returns the comparison of two searches: their fronts as a whole, and their most accurate versions."""
    sides = (first.overview, second.overview)
    for overview in sides:
        if not overview.front:
            raise UserError(f"searches are compared by their fronts, got {overview.search.folder.name} without one")
    a, b = (Side(overview, overview.front[0]) for overview in sides)
    rows = [(name, one, other) for (name, one), (_, other) in zip(_counts(sides[0]), _counts(sides[1]), strict=True)]
    comparison = _versions(a, b, tuple(rows))
    remark = "Metrics and layers are those of each search's most accurate version."
    if str(sides[0].budget) != str(sides[1].budget):
        remark += " The budgets differ, so the hypervolumes are shares of different boxes."
    elif sides[0].objectives != sides[1].objectives:
        remark += " The objectives differ, so the hypervolumes are shares of different boxes."
    return Comparison(
        first.name, second.name, comparison.facts, comparison.figures, comparison.layers, (remark, *comparison.remarks)
    )


def _counts(overview: Overview) -> list[tuple[str, str]]:
    """Returns the question of a search and the counts of its results."""
    return [
        ("study", overview.search.study.name),
        ("budget", str(overview.budget)),
        ("objectives", together(overview.objectives)),
        ("trials", str(overview.search.finished)),
        ("within the budget", str(len(overview.feasible))),
        ("on the front", str(len(overview.front))),
        ("hypervolume", f"{overview.hypervolume:.1%}"),
        ("most accurate", overview.front[0].title),
    ]


def _versions(first: Side, second: Side, facts: tuple[tuple[str, str, str], ...]) -> Comparison:
    a, b = first.version, second.version
    assert a is not None
    assert b is not None
    rows = [
        *facts,
        ("target", _target(a), _target(b)),
        ("recovery", a.evaluation.effort, b.evaluation.effort),
        ("blocks left out", _blocks(a), _blocks(b)),
        ("input size", _input_size(a), _input_size(b)),
        ("exits", _exits(a), _exits(b)),
    ]
    machine, remarks = _machine(first.overview, second.overview, _identity(a) == _identity(b))
    figures = tuple(_metric_row(metric, a, b, machine) for metric in _METRICS)
    layers = _layer_pairs(_layers(first), _layers(second))
    early = tuple(
        f"{side.name} was ended early, so its accuracy is an estimate: {version.evaluation.ended}."
        for side, version in ((first, a), (second, b))
        if version.evaluation.ended
    )
    return Comparison(first.name, second.name, tuple(rows), figures, layers, (*remarks, *early))


def _target(version: Version) -> str:
    latency = version.measured.get("latency")
    return latency.target if latency else "not measured"


def _blocks(version: Version) -> str:
    return " ".join(version.evaluation.candidate.removed_blocks) or "-"


def _input_size(version: Version) -> str:
    return str(version.evaluation.candidate.input_size or "-")


def _exits(version: Version) -> str:
    accuracy, candidate = version.measured.get("accuracy"), version.evaluation.candidate
    if not candidate.active_exits:
        return "-"
    thresholds = " ".join(map(threshold, candidate.thresholds.confidences))
    return f"from {thresholds}: {exit_shares(accuracy)}" if accuracy else f"from {thresholds}"


def _machine(first: Overview, second: Overview, is_same: bool) -> tuple[float, tuple[str, ...]]:
    """Returns the relative noise of the machine between two latencies, and remarks on it.

    Args:
        first: the search of the one.
        second: the search of the other.
        is_same: whether they are of the same version.
    """
    a, b = first.search.baseline, second.search.baseline
    noise = max(abs(a.reference_self_ratio - 1), abs(b.reference_self_ratio - 1))
    if first.search.folder == second.search.folder:
        return noise, ()
    dense = [each.dense.measured for each in (first, second)]
    if dense[0]["latency"].target != dense[1]["latency"].target:
        return noise, ("The targets differ, so latencies compare devices as well as versions.",)
    if dense[0]["flops"].value != dense[1]["flops"].value:
        return noise, ("The dense networks differ, so the machine's speed in the two searches cannot be compared.",)
    repeated = _repeated(first, second)
    before, now = max(repeated, key=lambda pair: abs(math.log(pair[1] / pair[0])))
    subject = f"Of {len(repeated)} versions that both searches timed, the one that differs most"
    subject = subject if len(repeated) > 1 else "The same dense network"
    same = " A and B are the same version, so their difference in latency is nothing else." if is_same else ""
    text = (
        f"{subject} took {milliseconds(before)} in A and {milliseconds(now)} in B: that is noise, and a difference in"
        f" latency of this size is counted as noise.{same}"
    )
    return math.hypot(noise, math.log(now / before)), (text,)


def _repeated(first: Overview, second: Overview) -> list[tuple[float, float]]:
    """Returns the latencies of what two searches both timed, in the first and in the second, dense networks first."""
    a, b = (
        {
            _identity(version): version.measured["latency"].value
            for version in [*each.simple, *each.versions]
            if "latency" in version.measured
        }
        for each in (first, second)
    )
    dense = (first.dense.measured["latency"].value, second.dense.measured["latency"].value)
    return [dense, *((latency, b[key]) for key, latency in a.items() if key in b and key != _identity(first.dense))]


def _identity(version: Version) -> str:
    """Returns what versions with the same latency share: choices, or where images decide on paths, the very file."""
    candidate = version.evaluation.candidate
    return version.evaluation.digest if candidate.active_exits or candidate.active_skips else candidate.key


def _metric_row(metric: str, first: Version, second: Version, machine: float) -> MetricRow:
    a, b = first.measured.get(metric), second.measured.get(metric)
    first_text, second_text = (_value(metric, side.value) if side else "not measured" for side in (a, b))
    if a is None or b is None:
        return MetricRow(metric, first_text, second_text, None, "")
    change = difference(a, b, machine)
    return MetricRow(metric, first_text, second_text, change, _verdict(metric, change))


def _value(metric: str, value: float) -> str:
    shown = {"accuracy": percent, "latency": milliseconds, "size": size}
    return shown.get(metric, count)(value)


def _verdict(metric: str, difference: Difference) -> str:
    if METRICS[metric].is_counted:
        return "the same" if difference.is_noise else f"{difference.change:+.1%}"
    change = f"{points(difference.change)} points" if metric == "accuracy" else f"{difference.change:+.1%}"
    noise = f"{difference.noise * 100:.2f} points" if metric == "accuracy" else f"{difference.noise:.1%}"
    return f"{change}, within noise (± {noise})" if difference.is_noise else f"{change} (noise ± {noise})"


def _layers(side: Side) -> list[Layer]:
    assert side.version is not None
    whole = side.overview.dense.evaluation.candidate
    return layers_of(side.version.evaluation.candidate, whole, side.overview.search.members)


def _layer_pairs(first: list[Layer], second: list[Layer]) -> tuple[LayerPair, ...]:
    a, b = ({layer.name: str(layer) for layer in layers} for layers in (first, second))
    return tuple(LayerPair(name, a.get(name, "absent"), b.get(name, "absent")) for name in dict.fromkeys([*a, *b]))
