"""`python -m search measure`: measures a bundle again."""

from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from search.commands.front import NO_VERSION
from search.commands.libraries import set_up_libraries
from search.config.units import milliseconds, percent
from search.report.output import write_json, write_lines


def run_measure(bundle: Path, target: str | None, as_json: bool) -> int:
    """Measures a bundle again; returns the exit code."""
    set_up_libraries()
    from search.deploy.measure_bundle import measure_bundle

    result = measure_bundle(bundle, target)
    is_same = result.correct == result.expected
    if as_json:
        write_json(asdict(result))
        return 0 if is_same else NO_VERSION
    tails = ", ".join(f"{name} {milliseconds(value)}" for name, value in result.percentiles.items())
    share = percent(result.correct / result.images)
    lines = [
        f"{bundle} on {result.target}:",
        f"  latency   {milliseconds(result.latency_s)} per batch ({tails}; {result.calls} batches), as"
        " `pick` tells it:",
        f"            {result.protocol}",
        f"  accuracy  {share} on {result.images} check images: {result.correct} right,"
        f" {result.expected} when it was made",
        *(f"  launch    {milliseconds(seconds)} per batch {mode}" for mode, seconds in result.launches.items()),
        *(f"  {remark}" for remark in result.remarks),
    ]
    write_lines(Console(), lines)
    return 0 if is_same else NO_VERSION
