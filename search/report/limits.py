"""What limits the versions of a search, and what would gain most, each from figures of this search, as sentences."""

from collections.abc import Iterator, Sequence

from search.config.units import milliseconds, percent
from search.report.overview import Overview
from search.results.pareto import Version, hypervolume, pareto
from search.results.rounds import decay, forecast
from spaces.candidate import Candidate

_RECENT = 0.75
"""Share of the trials, after which the others count as the last ones."""
_FEW = 8
"""Trials of which the last quarter tells nothing."""
_NEAR = 1.25
"""A version that takes so many times the limit, at most, shows what a looser one would bring."""
_EDGE = 0.5
"""Share of the fastest version's groups, stages or layers at their least from which a dimension counts as spent."""


def what_limits(overview: Overview) -> list[str]:
    """Returns what would gain most, the largest gain first, then what a looser limit and other dimensions would do."""
    if not overview.front or not overview.complete:
        return []
    gains = [gain for gain in (_recovery(overview), _trials(overview)) if gain is not None]
    ordered = [sentence for _, sentence in sorted(gains, key=lambda gain: -gain[0])]
    return [*ordered, *_limit(overview), *_dimensions(overview)]


def _recovery(overview: Overview) -> tuple[float, str] | None:
    """Returns what one more round of final training would add to the hypervolume by the forecast, in a sentence."""
    rounds = overview.search.rounds
    trained = [version for version in overview.front if len(rounds.get(version.number, ())) > 1]
    if not trained:
        pruned = [version for version in overview.front if version.number >= 0]
        nothing = "More recovery: no version was trained further after the search, so what it would win is not known."
        return (0.0, nothing) if pruned else None
    share = decay(rounds)
    gains = {version.number: max(forecast(rounds[version.number], share), 0.0) for version in trained}
    last = [rounds[version.number][-1].accuracy - rounds[version.number][-2].accuracy for version in trained]
    raised = [version.more_accurate(gains.get(version.number, 0.0)) for version in overview.front]
    gain = _volume(overview, raised) - _volume(overview, overview.front)
    minutes = sum(rounds[version.number][-1].seconds for version in trained) / 60
    images = sum(rounds[version.number][-1].images for version in trained)
    return gain, (
        f"More recovery: {len(trained)} version{'s' * (len(trained) > 1)} of the front saw {images:,} images in"
        f" {minutes:.1f} processor minutes after the search. The last round changed their accuracy by"
        f" {_points(last)}; one more, twice as long, would win {_points(list(gains.values()))} by the forecast,"
        f" {_share(gain)} of hypervolume."
    )


def _trials(overview: Overview) -> tuple[float, str] | None:
    """Returns what the last quarter of the trials added to the hypervolume, in a sentence."""
    history = overview.hypervolume_history
    count = overview.search.finished
    if count < _FEW:
        return None
    first_of_last = round(_RECENT * count)
    before = max((share for number, share in history if number < first_of_last), default=0.0)
    gain = overview.hypervolume - before
    still = "it still rises" if gain > 0.01 * overview.hypervolume else "it hardly rises any more"
    return (
        gain,
        f"More trials: the last {count - first_of_last} of {count} added {_share(gain)} of hypervolume; {still}.",
    )


def _limit(overview: Overview) -> Iterator[str]:
    """Yields what the most accurate version just beyond the limit on latency would bring."""
    ceiling = overview.budget.ceiling("latency", overview.dense.measured)
    if ceiling is None or "latency" not in overview.objectives:
        return
    best = overview.front[0]
    beyond = [
        version
        for version in overview.complete
        if ceiling < version.measured["latency"].value <= _NEAR * ceiling
        and version.measured["accuracy"].value > best.measured["accuracy"].value
    ]
    if not beyond:
        if len(overview.complete) > len(overview.feasible):
            yield f"A looser limit: no version that takes up to {_NEAR:g} times as long is more accurate."
        return
    found = max(beyond, key=lambda version: version.measured["accuracy"].value)
    accuracy, latency = found.measured["accuracy"].value, found.measured["latency"].value
    yield (
        f"A looser limit: {found.title} takes {milliseconds(latency)} and reaches {percent(accuracy)},"
        f" {_points([accuracy - best.measured['accuracy'].value])} against the best within {overview.budget}."
    )


def _dimensions(overview: Overview) -> Iterator[str]:
    """Yields which dimensions the fastest version has used up, and which were not searched."""
    candidates = [version.evaluation.candidate for version in overview.versions]
    fastest = overview.by_latency[0]
    used = fastest.evaluation.candidate
    spent = [f"{least} of {count} {what}" for what, least, count in _spent(used, candidates) if least >= _EDGE * count]
    if spent and fastest.number >= 0 and "latency" in overview.objectives:
        yield (
            f"Other dimensions: the fastest version, {fastest.title}, has {', '.join(spent)} at the least that any"
            " version has: there, only another dimension or a smaller least is faster."
        )
    space = overview.search.study.space
    if "size" in space.only and not space.sizes:
        yield 'Another dimension: smaller images were not tried; [space] sizes = "auto" does.'


def _spent(used: Candidate, candidates: Sequence[Candidate]) -> Iterator[tuple[str, int, int]]:
    """Yields, for each dimension that varied, how many of its parts a candidate has at the least of all, and of how
    many.
    """
    varied = {
        name: min(candidate.channels[name] for candidate in candidates)
        for name in used.channels
        if len({candidate.channels[name] for candidate in candidates}) > 1
    }
    if varied:
        yield "groups of channels", sum(used.channels[name] == least for name, least in varied.items()), len(varied)
    gone = {block for candidate in candidates for block in candidate.removed_blocks}
    if gone:
        yield "blocks that can be left out", len(gone & set(used.removed_blocks)), len(gone)
    layers = [name for name in used.precision if len({candidate.precision[name] for candidate in candidates}) > 1]
    if layers:
        yield "layers in int8", sum(used.precision[name] == "int8" for name in layers), len(layers)
    sizes = {candidate.input_size for candidate in candidates} - {None}
    if sizes:
        yield "input sizes", int(used.input_size == min(size for size in sizes if size is not None)), 1


def _volume(overview: Overview, versions: Sequence[Version]) -> float:
    objectives = overview.objectives
    return hypervolume(pareto(versions, objectives), overview.budget, overview.dense.measured, objectives)


def _points(gains: Sequence[float]) -> str:
    """Returns the mean of some gains of accuracy: `+0.8 points`."""
    return f"{100 * sum(gains) / len(gains):+.1f} points"


def _share(gain: float) -> str:
    return f"{100 * gain:.1f}%"
