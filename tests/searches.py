"""What the tests of whole searches share."""

from pathlib import Path

from search.store import SearchFolder, StoredSearch

ROOT = Path(__file__).parent.parent


def stored(folder: Path, name: str = "one") -> StoredSearch:
    return StoredSearch.read(SearchFolder(folder / name))


def finished(trials) -> list:
    return [trial for trial in trials if trial.state.is_finished()]
