"""`python -m search sync`: writes missing trials of a search into MLflow."""

from pathlib import Path
from typing import Any

from search.commands.libraries import set_up_libraries
from search.report.output import Output, write_json, write_lines
from search.results.store import StoredSearch, find_search
from search.tracking.store import Tracking, remembered
from spaces.errors import UserError


def run_sync(name: str | None, runs: Path, tracking_uri: str | None, output: Output) -> int:
    """Completes MLflow's mirror of a search from its journal; returns the exit code."""
    set_up_libraries()
    from search.tracking.mirror import mirror_all, reason

    folder = find_search(runs, name)
    journal = folder.open()
    tracking = Tracking.of(runs, tracking_uri, remembered(journal))
    with folder.lock():
        search = StoredSearch.read(folder)
        try:
            written = mirror_all(tracking, search)
        except Exception as error:  # MLflow has no common class for what may be wrong with it
            raise UserError(
                f"sync needs MLflow to answer, got {tracking.shown} ({reason(error)}); start its server, or name"
                " another with --tracking-uri"
            ) from error
    content: dict[str, Any] = {
        "search": folder.name, "tracking": tracking.shown, "trials": search.finished, "written": written
    }  # fmt: skip
    if output.as_json:
        write_json(content)
    elif not output.quiet:
        text = f"{folder.name}: {search.finished} trials in {tracking.shown}, {written} of them written now"
        write_lines(output.console(), [f"{text}, and the summary"])
    return 0
