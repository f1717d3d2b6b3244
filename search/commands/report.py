"""`python -m search report`: a search as a page and as Markdown."""

import re
from pathlib import Path

from search.commands.libraries import set_up_libraries
from search.config.budget import Budget
from search.report.output import REPORT_FORMS, Output, write_json, write_lines
from search.report.overview import Overview
from search.report.report import report_of, to_json
from search.results.store import StoredSearch, find_search
from spaces.errors import UserError


def run_report(budget: Budget | None, name: str | None, runs: Path, out: Path | None, output: Output) -> int:
    """Writes the report of a search as HTML and Markdown, or one of them to `out`; returns the exit code."""
    set_up_libraries()
    search = StoredSearch.read(find_search(runs, name))
    overview = Overview.of(search, budget)
    files = [out] if out else [search.folder.path / f"{_stem(overview)}{form}" for form in REPORT_FORMS]
    for file in files:
        _write(file, overview)
    if output.as_json:
        write_json({**to_json(overview), "files": [str(file) for file in files]})
    elif not output.quiet:
        write_lines(output.console(), [f"Wrote {file}" for file in files])
    return 0


def _stem(overview: Overview) -> str:
    """Returns the name of a report, without its ending: a report within another budget replaces none of its own."""
    if str(overview.budget) == str(overview.search.budget):
        return "report"
    return re.sub(r"[^A-Za-z0-9._]+", "-", f"report-{overview.budget}".replace("%", "pct").replace(",", "-"))


def _write(file: Path, overview: Overview) -> None:
    from search.report.html_page import page

    text = page(overview) if file.suffix == ".html" else report_of(overview).to_markdown()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"a report goes into a writable folder, got {file}: {error.strerror}") from error
