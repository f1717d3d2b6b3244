"""The documentation is true as far as a test can tell: links resolve, commands exist, the reference is up to date."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import typer

from search.cli import app
from search.config.study import Study
from search.config.study_reference import description, reference, sections

ROOT = Path(__file__).parent.parent
PAGES = sorted(page for folder in ("", "docs/**/", "studies/**/", "search/**/") for page in ROOT.glob(f"{folder}*.md"))
NOT_WRITTEN_YET = ROOT / "docs" / "extending"
"""Pages that come with another change; nothing is left out once they are there."""


def _names(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _prose(page: Path) -> str:
    """Returns a page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def _anchors(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", _prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _links(page: Path) -> Iterator[str]:
    prose = re.sub(r"`[^`]*`", "", _prose(page))
    yield from (link for link in re.findall(r"\]\(([^)\s]+)\)", prose) if not urlsplit(link).scheme)


def _commands(page: Path) -> Iterator[str]:
    """Yields the lines `python -m search ...` of a page's blocks of code."""
    for block in re.findall(r"^```\n(.*?)^```|((?:^    .*\n)+)", page.read_text(), re.DOTALL | re.MULTILINE):
        for line in "".join(block).splitlines():
            yield from (part.strip() for part in line.split("&&") if part.strip().startswith("python -m search "))


@pytest.mark.parametrize("page", PAGES, ids=_names)
def test_links_inside_the_repository_resolve(page: Path) -> None:
    for link in _links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if target.parent == NOT_WRITTEN_YET and not NOT_WRITTEN_YET.is_dir():
            continue
        assert target.exists(), f"{link} leads nowhere"
        assert not anchor or anchor in _anchors(target), f"{link} has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=_names)
def test_quoted_commands_have_the_options_that_they_use(page: Path) -> None:
    group = typer.main.get_command(app)
    for line in _commands(page):
        words = shlex.split(line, comments=True)[3:]
        subcommands = getattr(group, "commands", {})
        command = subcommands[words.pop(0)] if words and words[0] in subcommands else group
        known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        used = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)} - {"--help"}
        assert used <= known, f"{line}: {used - known}"


@pytest.mark.parametrize("page", PAGES, ids=_names)
def test_lines_are_short_enough_to_read(page: Path) -> None:
    long = [line for line in _prose(page).splitlines() if len(line) > 120 and not line.startswith(("|", "!["))]
    assert not long, long


def test_the_readme_is_two_pages() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 1200


def test_the_reference_of_study_files_is_up_to_date() -> None:
    page = (ROOT / "docs" / "study-reference.md").read_text()
    assert page == reference(), "run: python -m search.config.study_reference > docs/study-reference.md"


def test_every_key_of_a_study_says_what_it_is() -> None:
    silent = [
        f"[{path}] {key}"
        for path, section in sections(Study)
        for key in section.model_fields
        if not description(section, key)
    ]
    assert not silent


def test_every_benchmark_has_a_page() -> None:
    index = (ROOT / "studies" / "benchmarks" / "README.md").read_text()
    pages = {page.name for page in (ROOT / "studies" / "benchmarks").glob("*.md")} - {"README.md"}
    assert all(f"({name})" in index for name in pages)
