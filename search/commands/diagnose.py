"""`python -m search diagnose`: shows the causes of differences first, then the layers."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from evaluators.diagnosis.evidence import LOW_DB, Finding, ratio
from evaluators.diagnosis.tensor_errors import TensorErrors
from search.commands.libraries import set_up_libraries
from search.config.diagnosis_request import DiagnosisRequest
from search.config.overrides import Request
from search.config.study import Study
from search.config.units import percent
from search.report.display import Display
from search.report.output import Output
from search.results.store import StoredSearch, find_search

if TYPE_CHECKING:
    from search.pipeline.diagnosis import Diagnosis

ROWS = 20
"""Layers that are shown; --json has all."""
_CLEAN_DB = 60.0
HEADINGS = ("layer", "input", "output", "cosine", "largest", "dead", "silent")


def run_diagnose(
    request: Request, comparison: DiagnosisRequest, name: str | None, runs: Path, download: bool, output: Output
) -> int:
    """Compares a version with the same network in fp32 and shows the causes of differences; returns the exit code."""
    set_up_libraries()
    from search.pipeline.diagnosis import diagnose, evaluation_of
    from search.pipeline.pipeline import build_pipeline

    search = StoredSearch.read(find_search(runs, name)) if name is not None or comparison.trial is not None else None
    evaluation = evaluation_of(comparison, search)
    study = _study(request, search)
    console = output.console()
    with Display(output.progress_console(), output.quiet) as display:
        widths = search.widths if search else {}
        pipeline = build_pipeline(study, display.step, say=display.say, download=download, widths=widths)
        diagnosis = diagnose(pipeline, comparison, evaluation, display.step)
    if output.as_json:
        sys.stdout.write(diagnosis.to_json() + "\n")
    else:
        show(diagnosis, console)
    return 0


def _study(request: Request, search: StoredSearch | None) -> Study:
    """Returns the search's study, on another target if the command line names one, or else the requested study."""
    if search is None:
        return request.to_study()
    target = search.study.target.model_copy(update={"runtime": request.target or search.study.target.runtime})
    return search.study.model_copy(update={"target": target})


def show(diagnosis: "Diagnosis", console: Console) -> None:
    """Prints the comparison, the findings, and the figures of the layers."""
    for line in [*_head(diagnosis), *_findings(diagnosis.findings)]:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    console.print(layer_table(diagnosis))


def _head(diagnosis: "Diagnosis") -> list[str]:
    answered = diagnosis.answered
    before, right = answered.before / answered.images, answered.right / answered.images
    error = (right * (1 - right) / answered.images) ** 0.5
    return [
        f"{diagnosis.version} against {diagnosis.reference}, {answered.images} validation images; {diagnosis.target}",
        f"  accuracy  {percent(before)} -> {percent(right)}, standard error {error * 100:.1f} points; the same answer"
        f" to {answered.same} of {answered.images} images",
        *(f"  Note: {remark}." for remark in diagnosis.remarks),
    ]


def _findings(findings: Sequence[Finding]) -> list[str]:
    alarms = [finding for finding in findings if finding.alarm]
    notes = [finding for finding in findings if not finding.alarm]
    lines = [] if alarms else [f"No alarm: every tensor is above {LOW_DB:.0f} dB, finite, and in its place."]
    for number, finding in enumerate(alarms, 1):
        lines += [f"{number}. {_capital(finding.text)}.", f"   -> {_capital(finding.remedy)}."]
    for finding in notes:
        lines += [f"Worth knowing: {finding.text}.", f"   -> {_capital(finding.remedy)}."]
    return lines


def _capital(text: str) -> str:
    """Returns the text with a capital letter, unless it begins with a layer's name, which has dots or digits."""
    first = text.split(" ", 1)[0]
    return text[0].upper() + text[1:] if first.isalpha() else text


def layer_table(diagnosis: "Diagnosis") -> Table:
    """Returns a table of the layers that lose most, in the order in which they run, for 80 characters or more.

    Layers whose output is exact are left out.
    """
    layers = [layer for layer in diagnosis.compared.layers if layer.sqnr_db < math.inf]
    exact = len(diagnosis.compared.layers) - len(layers)
    falls = sorted(layers, key=_fall, reverse=True)[:ROWS]
    shown = [layer for layer in layers if layer in falls]
    title = "all tensors that differ"
    if len(shown) < len(layers):
        title = f"the {len(shown)} of {len(layers)} tensors where most is lost, in order"
    if exact:
        title += f"; {exact} more {'is' if exact == 1 else 'are'} exact"
    table = Table(title=title, title_justify="left", caption=_caption(diagnosis), caption_justify="left")
    table.box = box.SIMPLE_HEAD
    table.pad_edge = False
    table.padding = (0, 0, 0, 1)
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "layer" else "right", no_wrap=heading != "layer")
    for layer in shown:
        table.add_row(*_row(layer), style="bold" if layer.sqnr_db < LOW_DB else None)
    return table


def _fall(layer: TensorErrors) -> float:
    """Returns by how many dB a layer's output is noisier than its input, both clipped to `_CLEAN_DB`."""
    before, behind = (min(max(ratio_db, -_CLEAN_DB), _CLEAN_DB) for ratio_db in (layer.input_db, layer.sqnr_db))
    return before - behind


def _caption(diagnosis: "Diagnosis") -> str:
    return (
        "input, output: signal to noise at a layer's input and behind it; largest: magnitude in the reference; dead:"
        f" channels that never vary; silent: channels that do, but not in {diagnosis.version}"
    )


def _row(layer: TensorErrors) -> list[str]:
    return [
        layer.name,
        ratio(layer.input_db),
        ratio(layer.sqnr_db),
        f"{layer.cosine:.4f}",
        f"{layer.largest:.3g}",
        str(layer.dead or "-"),
        str(layer.died or "-"),
    ]
