"""Keys of study files that had another name once."""

import pytest

from search.config.study import Study, StudyError
from tests.helpers import tiny


def study(search: str, target: str = "") -> str:
    return tiny.STUDY.replace("search = {trials = 12}", f"search = {{trials = 12{search}}}").replace(
        "batch = 4", f"batch = 4{target}"
    )


def test_keys_of_before_are_read_with_a_line_that_names_the_new_one(caplog) -> None:
    before = Study.parse(study(", early = false, profile = true", ", bf16 = true, tf32 = false"), "mine.toml")
    now = Study.parse(study(", early_stopping = false, warm_start = true", ', fp32_in = "bf16"'), "mine.toml")
    assert before == now
    assert [record.getMessage() for record in caplog.records] == [
        "mine.toml: [search] early is called early_stopping now",
        "mine.toml: [search] profile is called warm_start now",
        'mine.toml: [target] tf32 = false is written fp32_in = "bf16" now',
        'mine.toml: [target] bf16 = true is written fp32_in = "bf16" now',
    ]
    assert before.question_key == now.question_key


def test_a_journal_of_before_is_read_without_a_word(caplog) -> None:
    now = Study.parse(study(""), "mine.toml")
    content = now.model_dump(mode="json")
    content["search"]["early"] = content["search"].pop("early_stopping")
    content["search"]["profile"] = content["search"].pop("warm_start")
    content["target"] |= {"tf32": False, "bf16": False}
    del content["target"]["fp32_in"]
    assert Study.stored(content) == now
    assert not caplog.records


@pytest.mark.parametrize(
    ("search", "target", "words"),
    [
        (", early = true, early_stopping = true", "", "former name of early_stopping, got both"),
        ("", ", tf32 = true, bf16 = true", "run in one type, got tf32 and bf16"),
        ("", ', tf32 = true, fp32_in = "tf32"', "takes the place of tf32 and bf16"),
        ("", ", tf32 = 1", "has no key 'tf32'"),
        ("", ', fp32_in = "tf16"', "target.fp32_in"),
    ],
)
def test_what_contradicts_itself_is_a_mistake(search: str, target: str, words: str) -> None:
    with pytest.raises(StudyError, match=words):
        Study.parse(study(search, target), "mine.toml")
