"""`python -m search compare`: two versions or two searches side by side."""

from pathlib import Path

from search.commands.libraries import set_up_libraries
from search.report.compare import Comparison, compare, parse_side
from search.report.output import Output, write_json


def run_compare(first: str, second: str, runs: Path, output: Output) -> int:
    """Compares two versions or two searches; returns the exit code."""
    set_up_libraries()
    comparison: Comparison = compare(parse_side(first, runs), parse_side(second, runs))
    if output.as_json:
        write_json(comparison.to_dict())
        return 0
    console = output.console()
    for part in comparison.parts():
        console.print(part, highlight=False, soft_wrap=isinstance(part, str), markup=False)
    return 0
