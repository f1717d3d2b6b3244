"""Which searches a folder has. Nothing heavy is imported here, so that a wrong name is told at once."""

import difflib
import re
from pathlib import Path

from spaces.errors import UserError

JOURNAL = "journal.log"
WHOLE_SEARCH = "all"
"""In place of a trial: a search as a whole."""
BEGUN = b'"baseline"'
"""Bytes that a journal contains once the baseline is measured."""
_VERSION = re.compile(r"\d+|dense|(given-)?(fp32|bf16|fp16|fp8|int8|int4)")
"""A trial, or the name of a simple version."""


class StoreError(UserError):
    """A search folder or its journal cannot be used."""


def search_names(runs: Path) -> list[str]:
    """Returns the names of the searches in a folder, the one that was written last first."""
    journals = sorted(runs.glob(f"*/{JOURNAL}"), key=lambda journal: journal.stat().st_mtime, reverse=True)
    return [journal.parent.name for journal in journals]


def known_search(runs: Path, name: str | None) -> str:
    """Returns the name of a search that exists: `name`, or else that of the one written last that has a baseline.

    Raises:
        StoreError: there is none.
    """
    names = search_names(runs)
    if name is not None:
        if (runs / name / JOURNAL).is_file():
            return name
        near = difflib.get_close_matches(name, names, 1)
        remedy = f"did you mean {near[0]}?" if near else "see: python -m search list"
        raise StoreError(f"a search is a folder with a {JOURNAL}, got {runs / name}; {remedy}")
    if not names:
        raise StoreError(f"no search in {runs} yet; start one with: python -m search --budget 'latency<5ms'")
    # A search that is still training must not hide an earlier one with results.
    return next((name for name in names if BEGUN in (runs / name / JOURNAL).read_bytes()), names[0])


def side_of(text: str, runs: Path) -> tuple[str, str]:
    """Returns the search and the version that one side of a comparison names; see `search.report.compare.parse_side`.

    Raises:
        StoreError: there is no such search.
    """
    search, colon, version = text.rpartition(":")
    if colon:
        return known_search(runs, search), version
    if not (runs / text).is_dir() and _VERSION.fullmatch(text):
        return known_search(runs, None), text
    return known_search(runs, text), WHOLE_SEARCH
