"""`python -m search measure`: a bundle, measured again."""

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

    found = measure_bundle(bundle, target)
    same = found.correct == found.expected
    if as_json:
        write_json(asdict(found))
        return 0 if same else NO_VERSION
    tails = ", ".join(f"{name} {milliseconds(value)}" for name, value in found.percentiles.items())
    share = percent(found.correct / found.images)
    lines = [
        f"{bundle} on {found.target}:",
        f"  latency   {milliseconds(found.latency_s)} per batch ({tails}; {found.calls} batches), as `pick` tells it:",
        f"            {found.protocol}",
        f"  accuracy  {share} on {found.images} check images: {found.correct} right, {found.expected} when it was made",
        *(f"  launch    {milliseconds(seconds)} per batch {way}" for way, seconds in found.launches.items()),
        *(f"  {remark}" for remark in found.remarks),
    ]
    write_lines(Console(), lines)
    return 0 if same else NO_VERSION
