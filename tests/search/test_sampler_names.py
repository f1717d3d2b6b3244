"""A search that began when its sampler, or a study without a name, was called otherwise is found again, and goes on."""

from pathlib import Path

import pytest

from search.cli import run
from search.config.registries import SAMPLERS
from search.config.study import Study
from search.results.store import SearchFolder, store_sampler
from tests.helpers import tiny
from tests.helpers.searches import finished, stored


@pytest.fixture
def asked(tmp_path: Path, cache: Path) -> list[str]:
    """The command of a search of four versions."""
    text = f"{tiny.STUDY}\n[space]\ndrop_slower = false".replace(
        "tests.helpers.tiny:network", "tests.helpers.tiny:short"
    )
    (tmp_path / "study.toml").write_text(text)
    command = ["--study", str(tmp_path / "study.toml"), "--runs", str(tmp_path), "--budget", "latency<10000%"]
    return [*command, "--search-only", "precision", "--trials", "2"]


def test_a_search_of_before_goes_on_in_its_folder(asked, tmp_path, capsys) -> None:
    assert run(asked) == 0
    (new,) = tmp_path.glob("*-ehvi-0")
    assert "is called" not in capsys.readouterr().out
    for file in new.iterdir():
        file.unlink()
    new.rmdir()
    before = SearchFolder(tmp_path / new.name.replace("-ehvi-", "-front-"))
    with before.lock():
        store_sampler(before.create(), "front")
    assert run([*asked, "--sampler", "front"]) == 0
    assert "the sampler 'front' is called 'ehvi' now" in " ".join(capsys.readouterr().out.split())
    assert run([*asked, "--trials", "3"]) == 0
    assert f"Going on with search {before.name}: 2 trials are there" in " ".join(capsys.readouterr().out.split())
    assert not list(tmp_path.glob("*-ehvi-0"))
    search = stored(tmp_path, before.name)
    assert len(finished(search.trials)) == 3
    assert set(search.samplers.values()) == {"ehvi"}


def test_a_search_goes_on_under_the_name_that_was_made_up_for_it_before(asked, tmp_path, capsys) -> None:
    command = [*asked, "--data", "tests.helpers.tiny:splits"]
    assert run(command) == 0
    (new,) = tmp_path.glob("tiny-short-tiny-*-ehvi-0")
    study = Study.stored(SearchFolder(new).open().user_attrs["study"]).model_copy(update={"name": "short-splits"})
    before = new.rename(tmp_path / f"short-splits-{study.question_key}-ehvi-0")
    SearchFolder(before).open().set_user_attr("study", study.model_dump(mode="json"))
    assert run([*command, "--trials", "3"]) == 0
    assert f"Going on with search {before.name}: 2 trials are there" in " ".join(capsys.readouterr().out.split())
    assert run([*command, "--search", before.name, "--trials", "3"]) == 0


def test_a_study_file_of_before_is_accepted_as_it_is() -> None:
    study = Study.parse(tiny.STUDY.replace("trials = 12", 'trials = 12, sampler = "front"'), "test")
    assert study.search.sampler == "front"
    assert SAMPLERS.known(study.search.sampler) == Study.parse(tiny.STUDY, "test").search.sampler == "ehvi"
    assert Study.stored(study.model_dump(mode="json")) == study
