"""`python -m search report`, `compare` and `sync`, once their arguments are read."""

from pathlib import Path
from typing import Any

from search.commands.libraries import set_up_libraries
from search.config.budget import Budget
from search.report.compare import Comparison, compare, parse_side
from search.report.output import Output, write_json, write_lines
from search.report.overview import Overview
from search.report.report import report_of, to_json
from search.results.store import StoredSearch, find_search
from search.tracking.store import Tracking, remembered
from spaces.errors import UserError

_FORMS = (".html", ".md")


def run_report(budget: Budget | None, name: str | None, runs: Path, out: Path | None, output: Output) -> int:
    """Writes the report of a search as a page and as Markdown, or one of them to a file; returns the exit code."""
    set_up_libraries()
    search = StoredSearch.read(find_search(runs, name))
    overview = Overview.of(search, budget)
    if out is not None and out.suffix not in _FORMS:
        raise UserError(f"a report is a page or Markdown, got {out}; end its name in {' or '.join(_FORMS)}")
    files = [out] if out else [search.folder.path / f"report{form}" for form in _FORMS]
    for file in files:
        _write(file, overview)
    if output.as_json:
        write_json({**to_json(overview), "files": [str(file) for file in files]})
    elif not output.quiet:
        write_lines(output.console(), [f"Wrote {file}" for file in files])
    return 0


def _write(file: Path, overview: Overview) -> None:
    from search.report.html_page import page

    text = page(overview) if file.suffix == ".html" else report_of(overview).to_markdown()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"a report goes into a writable folder, got {file}: {error.strerror}") from error


def run_compare(first: str, second: str, runs: Path, output: Output) -> int:
    """Compares two versions or two searches; returns the exit code."""
    set_up_libraries()
    found: Comparison = compare(parse_side(first, runs), parse_side(second, runs))
    if output.as_json:
        write_json(found.to_dict())
        return 0
    console = output.console()
    for part in found.parts():
        console.print(part, highlight=False, soft_wrap=isinstance(part, str), markup=False)
    return 0


def run_sync(name: str | None, runs: Path, tracking_uri: str | None, output: Output) -> int:
    """Completes MLflow's mirror of a search from its journal; returns the exit code."""
    set_up_libraries()
    from search.tracking.mirror import mirror_all, reason

    folder = find_search(runs, name)
    stored = folder.open()
    tracking = Tracking.of(runs, tracking_uri, remembered(stored))
    with folder.lock():
        search = StoredSearch.read(folder)
        try:
            written = mirror_all(tracking, search)
        except Exception as error:  # MLflow has no common class for what may be wrong with it
            raise UserError(
                f"sync needs MLflow to answer, got {tracking.shown} ({reason(error)}); start its server, or name"
                " another with --tracking-uri"
            ) from error
    found: dict[str, Any] = {
        "search": folder.name, "tracking": tracking.shown, "trials": search.finished, "written": written
    }  # fmt: skip
    if output.as_json:
        write_json(found)
    elif not output.quiet:
        told = f"{folder.name}: {search.finished} trials in {tracking.shown}, {written} of them written now"
        write_lines(output.console(), [f"{told}, and the summary"])
    return 0
