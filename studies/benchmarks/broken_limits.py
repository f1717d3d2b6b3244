"""How many trials of a search break a limit, by how much, and how many of them were scored all the same.

    python -m studies.benchmarks.broken_limits runs/digits-615a9240-front-0 runs/...

Prints Markdown, from the journals alone. Trials that are told from memory do not count, nor do those that failed.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from search.results.pareto import Version
from search.results.store import SearchFolder, StoredSearch
from studies.benchmarks.markdown import print_table

SKIPPED = 20
"""So many first trials are left out: what a search begins with is not yet told by what it has learned."""
STEPS = (0.02, 0.05, 0.10)
"""By how much a limit is missed."""


def excesses(search: StoredSearch, versions: Sequence[Version], metric: str | None = None) -> list[float]:
    """Returns by how much each version misses the limit that it misses most, as a share of it; 0 where it keeps all.

    Args:
        search: that measured them.
        versions: of it.
        metric: whose limits count; every metric's where not given.
    """
    budget, dense = search.budget, search.baseline.evaluation.measurements
    counted = {str(limit) for limit in budget.constraints if metric in (None, limit.measured_as)}
    found = [budget.violations(version.measured, dense).items() for version in versions]
    return [max([0.0, *(value for name, value in some if name in counted)]) for some in found]


def row(search: StoredSearch, skipped: int) -> list[str]:
    """Returns the cells of one search."""
    versions = [version for version in search.versions if version.number >= skipped]
    every, latency = excesses(search, versions), excesses(search, versions, "latency")
    broken = [excess for excess in every if excess > 0]
    scored = sum(version.is_complete for version, excess in zip(versions, every, strict=True) if excess > 0)
    steps = [sum(0 < excess <= step for excess in latency) for step in STEPS]
    return [
        search.folder.name,
        str(search.budget),
        str(len(versions)),
        _share(len(broken), len(versions)),
        _share(sum(excess > 0 for excess in latency), len(versions)),
        *map(str, steps),
        str(scored),
    ]


def _share(count: int, of: int) -> str:
    return f"{count} ({count / max(of, 1):.0%})"


def main() -> None:
    """Prints a row for each search."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("searches", nargs="+", type=Path, metavar="RUN", help="folders with a journal")
    parser.add_argument("--skipped", type=int, default=SKIPPED, help="first trials that do not count")
    chosen = parser.parse_args()
    heads = ["search", "budget", "versions", "break a limit", "break latency"]
    heads += [*(f"by up to {step:.0%}" for step in STEPS), "broken, yet scored"]
    found = [StoredSearch.read(SearchFolder(folder)) for folder in chosen.searches]
    print_table(heads, (row(search, chosen.skipped) for search in found))


if __name__ == "__main__":
    main()
