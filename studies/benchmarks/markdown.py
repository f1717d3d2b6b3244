"""Tables in Markdown, as the benchmarks print them."""

from collections.abc import Iterable, Sequence


def print_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a table, row by row as they come."""
    for cells in (heads, ["---"] * len(heads)):
        _print_row(cells)
    for cells in rows:
        _print_row(cells)


def _print_row(cells: Sequence[str]) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)
